"""Parallelised Q-network: Q-learning without replay and without a target network, all on the device.

    python -m experiments.pqn --scan 10
    python -m experiments.pqn acrobot --replicas 5 --scan 10
    python -m experiments.pqn breakout

Environment: any of gymnax's with discrete actions, or your own as `module:factory`; its options as `--env-options
memory_length=20`.

A step of the run is an iteration: `--length` steps of each of `--envs` environments, then what is learned from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxarch.rl.algorithms.pqn import PQNConfig, make_agent
from jaxarch.rl.environments import make, options_of, stacked
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.training import iterations, make_experiment
from jaxarch.run import Experiment, check_least, main


@dataclass(frozen=True)
class Config:
    env: str = "CartPole-v1"
    """an environment of gymnax, or MODULE:FACTORY"""
    env_options: tuple[str, ...] = ()
    """of the environment or its parameters, each as name=value"""
    frames: int = 1
    """observations joined, the newest last"""
    env_steps: int = 500_000
    """steps of all environments together"""
    envs: int = 32
    """environments side by side"""
    length: int = 64
    """steps of each in an iteration"""
    episodes: int = 32
    """of an evaluation, by the greedy policy and by the one that explores"""
    data_seed: int = 0
    """without effect: what is seen comes from the run's own key"""
    agent: PQNConfig = PQNConfig()

    def __post_init__(self) -> None:
        check_least(self, ("frames", "env_steps", "envs", "length", "episodes"), 1)

    @property
    def steps(self) -> int:
        return iterations(self.env_steps, self.envs, self.length)


PRESETS = {
    "cartpole": Config(),
    "acrobot": Config(env="Acrobot-v1"),
    "breakout": Config(
        env="Breakout-MinAtar",
        env_steps=10_000_000,
        envs=128,
        length=32,
        agent=PQNConfig(
            learning_rate=5e-4,
            q_lambda=0.65,
            epsilon=0.05,
            epsilon_steps=1_000_000,
            epochs=2,
            minibatches=32,
            model=NetworkConfig(layers=1, width=128, activation="relu"),
        ),
    ),
}


def experiment(config: Config) -> Experiment:
    environment = stacked(make(config.env, options_of(config.env_options)), config.frames)
    agent = make_agent(environment, config.agent, config.envs, config.length, config.steps)
    return make_experiment(environment, agent, config.agent.hypers, config.envs, config.length, config.episodes)


if __name__ == "__main__":
    main(experiment, Config, PRESETS)
