"""Deep deterministic policy gradients (Lillicrap et al. 2016, alg. 1): TD3 without what TD3 added.

One critic, no noise on the target policy's action, and the policy and the targets updated with each update of the
critic. As is now usual the noise on actions is Gaussian, where the paper's was an Ornstein-Uhlenbeck process, and
there is neither batch normalisation nor decay of weights.
"""

from __future__ import annotations

from dataclasses import replace

from jaxarch.rl.agent import Agent
from jaxarch.rl.algorithms import td3
from jaxarch.rl.algorithms.td3 import TD3Config
from jaxarch.rl.environments import Environment


def reduced(config: TD3Config) -> TD3Config:
    """Without the three additions."""
    return replace(config, critics=1, target_noise=0.0, delay=1)


def make_agent(environment: Environment, config: TD3Config, envs: int, length: int) -> Agent:
    """DDPG with TD3's other options; give its `init` the hypers of the `reduced` ones."""
    return td3.make_agent(environment, reduced(config), envs, length)
