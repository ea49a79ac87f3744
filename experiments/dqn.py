"""Deep Q-learning and its extensions, up to Rainbow, all on the device.

    python -m experiments.dqn --scan 500
    python -m experiments.dqn mountaincar --replicas 5 --scan 500
    python -m experiments.dqn breakout --scan 500
    python -m experiments.dqn breakout-rainbow --scan 500
    python -m experiments.dqn --agent.double True --agent.prioritized True --agent.horizon 3 --scan 500

Environment: any of gymnax's with discrete actions, or your own as `module:factory`; its options as `--env-options
memory_length=20`.

A step of the run is an iteration: `--length` steps of each of `--envs` environments, then `--agent.updates` updates.

Measured: 2026-11-26, two cores of an AMD EPYC (Zen 5), shared, jax 0.11.2, seeds 0 to 4 at once, greedy evaluation at
the end: cartpole 500 with each, in 17 seconds; mountaincar -102, -103, -104, -107, -104 (interquartile mean -104), in
85 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxarch.rl.algorithms.dqn import RAINBOW, DQNConfig, make_agent
from jaxarch.rl.environments import centered, make, options_of, stacked
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
    centered: bool = False
    """observations of a bounded space scaled to [-1, 1]"""
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
    agent: DQNConfig = DQNConfig(learning_rate=1e-3, anneal=True, target_every=1000, double=True)

    def __post_init__(self) -> None:
        check_least(self, ("frames", "env_steps", "envs", "length", "episodes"), 1)

    @property
    def steps(self) -> int:
        return iterations(self.env_steps, self.envs, self.length)


MINATAR = NetworkConfig(layers=1, width=128, activation="relu")

PRESETS = {
    "cartpole": Config(),
    "mountaincar": Config(
        env="MountainCar-v0",
        centered=True,
        envs=16,
        # The goal is found by values of what was not tried yet, which are too high; random actions only hinder.
        agent=DQNConfig(
            learning_rate=1e-3,
            anneal=True,
            epsilon_steps=10_000,
            replay=50_000,
            starts=1600,
            updates=4,
            target_every=800,
            double=True,
            dueling=True,
            horizon=10,
        ),
    ),
    "breakout": Config(
        env="Breakout-MinAtar",
        env_steps=10_000_000,
        agent=DQNConfig(replay=1_000_000, epsilon_steps=1_000_000, model=MINATAR),
    ),
    "breakout-rainbow": Config(
        env="Breakout-MinAtar",
        env_steps=10_000_000,
        agent=replace(RAINBOW, replay=1_000_000, model=MINATAR),
    ),
}


def experiment(config: Config) -> Experiment:
    environment = make(config.env, options_of(config.env_options))
    environment = stacked(centered(environment) if config.centered else environment, config.frames)
    agent = make_agent(environment, config.agent, config.envs, config.length, config.steps)
    return make_experiment(environment, agent, config.agent.hypers, config.envs, config.length, config.episodes)


if __name__ == "__main__":
    main(experiment, Config, PRESETS)
