"""Gymnasium's environments around an agent's functions."""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from jaxarch.rl.agent import Agent
from jaxarch.rl.algorithms import ppo
from jaxarch.rl.host import described, evaluate, train
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError


class Countdown(gymnasium.Env):
    """Observes its step; terminates after `dies` steps, or is truncated after `limit`; the reward is the step."""

    observation_space = gymnasium.spaces.Box(0, 100, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, dies: int, limit: int) -> None:
        self.dies, self.limit, self.t = dies, limit, 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), float(self.t), self.t >= self.dies, self.t >= self.limit, {}


def vectorised(mode: AutoresetMode = AutoresetMode.SAME_STEP):
    return SyncVectorEnv(
        [lambda: Countdown(2, 9), lambda: Countdown(9, 3), lambda: Countdown(3, 3)], autoreset_mode=mode
    )


def recorder(seen):
    """It remembers how many steps it has acted in an episode, and gives that away."""

    def act(learner, observation, key, memory, first, index):
        memory = jnp.where(first, 0, memory) + 1
        return jnp.zeros(len(first), jnp.int32), memory, {"acted": memory}

    def learn(learner, rollout, key, index):
        return learner + 1, {}

    def policy(learner, observation, key, memory, first, greedy):
        return act(learner, observation, key, memory, first, 0)[:2]

    return Agent(lambda key, hypers: jnp.zeros(()), act, learn, policy, lambda envs: jnp.zeros(envs, jnp.int32))


def test_both_ends_of_an_episode_come_with_what_was_really_seen(monkeypatch):
    rollouts = []
    agent = recorder(rollouts)
    monkeypatch.setattr("jaxarch.rl.host.jax.jit", lambda function, **_: function)  # so that rollouts can be read
    agent = agent._replace(learn=lambda learner, rollout, key, index: (rollouts.append(rollout), (learner + 1, {}))[1])
    learner, returns = train(agent, vectorised(), (), length=4, iterations=2)
    assert float(learner) == 2
    joined = SimpleNamespace(
        **{
            name: np.concatenate([getattr(part, name) for part in rollouts])
            for name in ("observation", "next_observation", "reward", "terminated", "truncated", "first")
        }
    )
    np.testing.assert_array_equal(
        joined.observation[..., 0].T, [[0, 1] * 4, [0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 0, 1]]
    )
    np.testing.assert_array_equal(joined.next_observation, joined.observation + 1)
    np.testing.assert_array_equal(joined.terminated.T, [[0, 1] * 4, [0] * 8, [0, 0, 1] * 2 + [0, 0]])
    np.testing.assert_array_equal(joined.truncated.T, [[0] * 8, [0, 0, 1] * 2 + [0, 0], [0] * 8])
    np.testing.assert_array_equal(joined.first, joined.observation[..., 0] == 0)
    np.testing.assert_array_equal(rollouts[1].extras["acted"], rollouts[1].observation[..., 0] + 1)
    np.testing.assert_array_equal(rollouts[1].memory, [2, 1, 1])
    assert sorted(returns) == [3, 3, 3, 3, 6, 6, 6, 6]


def test_an_episode_of_each_is_evaluated():
    np.testing.assert_array_equal(evaluate(recorder([]), jnp.zeros(()), vectorised()), [3, 6, 6])


def test_an_environment_that_resets_a_step_later_is_refused():
    with pytest.raises(ConfigError, match="SAME_STEP"):
        described(vectorised(AutoresetMode.NEXT_STEP))


def test_what_it_says_of_itself():
    found = described(vectorised())
    assert found.observation_space.shape == (1,) and found.action_space.n == 3


class Lever(gymnasium.Env):
    """One step; the reward is the sum of what was done, each number within bounds of its own."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(action.sum()), True, False, {}


@pytest.mark.parametrize(("given", "total"), [((0.0, 0.0), 5), ((0.5, -1.0), 1), ((9.0, 0.5), 9.5)])
def test_actions_are_scaled_to_their_bounds_and_clipped(given, total):
    envs = SyncVectorEnv([Lever] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    space = described(envs).action_space
    assert space.shape == (2,) and (space.low, space.high) == (-1, 1)
    agent = recorder([])._replace(policy=lambda *_: (jnp.tile(jnp.asarray(given), (2, 1)), jnp.zeros(2, jnp.int32)))
    np.testing.assert_allclose(evaluate(agent, jnp.zeros(()), envs), total)


def test_an_algorithm_learns_from_gymnasium_s_environments():
    """As the module's docstring says."""
    envs = gymnasium.make_vec("CartPole-v1", 2, "sync", {"autoreset_mode": AutoresetMode.SAME_STEP})
    config = ppo.PPOConfig(epochs=1, minibatches=1, model=NetworkConfig(layers=1, width=4))
    agent = ppo.make_agent(described(envs), config, envs.num_envs, length=32, iterations=2)
    learner, returns = train(agent, envs, config.hypers, length=32, iterations=1)
    assert returns and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(learner))
