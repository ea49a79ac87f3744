"""Implicit quantile networks, with or without regard to risk, all on the device.

    python -m experiments.iqn --scan 500
    python -m experiments.iqn --agent.risk 0.25 --scan 500
    python -m experiments.iqn breakout --scan 500

Environment: any of gymnax's with discrete actions, or your own as `module:factory`; its options as `--env-options
memory_length=20`.

A step of the run is an iteration: `--length` steps of each of `--envs` environments, then `--agent.updates` updates.

Measured: 2026-11-26, two busy cores of an AMD EPYC (Zen 5), jax 0.11.2, seeds 0 to 4 at once, greedy evaluation at the
end: cartpole 359, 500, 132, 484, 144 (interquartile mean 329). `experiments.dqn`, by default with four times the
learning rate and half as many copies to the target, has 500; with the settings here, 488 and 382 (seeds 0 and 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxarch.rl.algorithms.iqn import IQNConfig, make_agent
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
    envs: int = 10
    """environments side by side"""
    length: int = 1
    """steps of each in an iteration"""
    episodes: int = 32
    """of an evaluation, by the greedy policy and by the one that explores"""
    data_seed: int = 0
    """without effect: what is seen comes from the run's own key"""
    agent: IQNConfig = IQNConfig(anneal=True)

    def __post_init__(self) -> None:
        check_least(self, ("frames", "env_steps", "envs", "length", "episodes"), 1)

    @property
    def steps(self) -> int:
        return iterations(self.env_steps, self.envs, self.length)


PRESETS = {
    "cartpole": Config(),
    "breakout": Config(
        env="Breakout-MinAtar",
        env_steps=10_000_000,
        # The convolution's features are what levels multiply, as in the paper.
        agent=IQNConfig(
            replay=1_000_000, epsilon_steps=1_000_000, model=NetworkConfig(layers=0, width=128, activation="relu")
        ),
    ),
}


def experiment(config: Config) -> Experiment:
    environment = stacked(make(config.env, options_of(config.env_options)), config.frames)
    agent = make_agent(environment, config.agent, config.envs, config.length, config.steps)
    return make_experiment(environment, agent, config.agent.hypers, config.envs, config.length, config.episodes)


if __name__ == "__main__":
    main(experiment, Config, PRESETS)
