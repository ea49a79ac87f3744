"""REINFORCE with a learned baseline, all on the device.

    python -m experiments.reinforce --scan 20
    python -m experiments.reinforce --agent.baseline False
    python -m experiments.reinforce --env my_module:factory --env-steps 100000

Environment: any of gymnax's, or your own as `module:factory`; its options as `--env-options memory_length=20`.

A step of the run is an iteration: `--length` steps of each of `--envs` environments, then what is learned from them.

Measured: 2026-11-26, two cores of an AMD EPYC (Zen 5), jax 0.11.2, seeds 0 to 9 at once, the interquartile mean of
greedy evaluation: CartPole 486 in 3 seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from gymnax.environments import spaces

from jaxarch.rl.algorithms.reinforce import ReinforceConfig, make_agent
from jaxarch.rl.environments import make, options_of, rescaled, stacked
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
    envs: int = 8
    """environments side by side"""
    length: int = 500
    """steps of each in an iteration"""
    episodes: int = 32
    """of an evaluation, by the greedy policy and by the sampled one"""
    data_seed: int = 0
    """without effect: what is seen comes from the run's own key"""
    agent: ReinforceConfig = ReinforceConfig()

    def __post_init__(self) -> None:
        check_least(self, ("frames", "env_steps", "envs", "length", "episodes"), 1)

    @property
    def steps(self) -> int:
        return iterations(self.env_steps, self.envs, self.length)


PRESETS = {"cartpole": Config()}


def experiment(config: Config) -> Experiment:
    environment = stacked(make(config.env, options_of(config.env_options)), config.frames)
    if isinstance(environment.action_space, spaces.Box):
        environment = rescaled(environment)
    agent = make_agent(environment, config.agent, config.steps)
    return make_experiment(environment, agent, config.agent.hypers, config.envs, config.length, config.episodes)


if __name__ == "__main__":
    main(experiment, Config, PRESETS)
