"""PQN: its target and its layers by definition, and what it learns of probes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms.pqn import PQNConfig, make_agent, network_of
from jaxarch.rl.environments import make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import together

PROBING = PQNConfig(
    learning_rate=1e-2,
    gamma=together.GAMMA,
    q_lambda=0.5,
    epsilon_steps=4000,
    epochs=2,
    minibatches=4,
    model=NetworkConfig(layers=1, width=32, activation="relu"),
)


def test_probe_environments():
    """That of `endless` tells that truncation is no death."""
    environment = together.DISCRETE
    agent = make_agent(environment, PROBING, 16, 8, 120)
    state, _ = together.train(environment, agent, PROBING.hypers, 16, 8, 120)

    def values(observations):
        return np.asarray(network_of(environment, PROBING).apply({"params": state.learner.params}, observations))

    # Returns look through random actions, which cost nothing but in one of the probes, and there one step.
    np.testing.assert_allclose(values(together.OBSERVATIONS).max(axis=1), together.VALUES, atol=0.2)
    np.testing.assert_array_equal(values(together.BY_BOTH).argmax(axis=1), [1, 0])


def test_targets_are_lambda_returns_of_greedy_values():
    """One update by all steps at once: its loss is that of targets summed step by step in numpy, rewards scaled."""
    config = dataclasses.replace(
        PROBING, epochs=1, minibatches=1, normalized=False, reward_scale=0.1, model=NetworkConfig(layers=0)
    )
    environment = make("CartPole-v1")
    agent = make_agent(environment, config, 3, 5, 10)
    learner = agent.init(jax.random.key(0), config.hypers)
    rng = np.random.default_rng(0)
    observation, following = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    action, reward = rng.integers(0, 2, (5, 3)), rng.normal(size=(5, 3)).astype(np.float32)
    terminated = rng.random((5, 3)) < 0.2
    truncated = (rng.random((5, 3)) < 0.3) & ~terminated
    assert terminated.any() and truncated.any()
    arrays = observation, terminated, action.astype(np.int32), reward, terminated, truncated, following
    rollout = Rollout(*map(jnp.asarray, arrays), (), ())
    _, metrics = jax.jit(agent.learn)(learner, rollout, jax.random.key(1), jnp.asarray(0))

    layer = jax.tree.map(np.asarray, learner.params["Dense_0"])
    values, next_values = observation @ layer["kernel"] + layer["bias"], following @ layer["kernel"] + layer["bias"]
    greedy = next_values.max(axis=-1)
    targets = np.zeros((5, 3))
    for env in range(3):
        for t in reversed(range(5)):
            after = greedy[t, env]
            if t < 4 and not (terminated | truncated)[t, env]:
                after = 0.5 * after + 0.5 * targets[t + 1, env]
            targets[t, env] = 0.1 * reward[t, env] + together.GAMMA * (not terminated[t, env]) * after
    errors = np.take_along_axis(values, action[..., None], axis=-1)[..., 0] - targets
    np.testing.assert_allclose(metrics["train/value_loss"], np.mean(errors**2) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/td_error"], np.mean(abs(errors)), rtol=1e-5)


def test_hidden_layers_are_normalised_before_their_activation():
    """Of numbers and of pictures, by numpy."""
    rng = np.random.default_rng(0)

    def normalised(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    for name in ("CartPole-v1", "Breakout-MinAtar"):
        environment = make(name)
        network = network_of(environment, PROBING)
        x = rng.normal(size=(2, *network.shape)).astype(np.float32)
        params = network.init(jax.random.key(0), jnp.asarray(x))["params"]
        weights = jax.tree.map(np.asarray, params)
        found = x
        if "kernel" in weights:
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            found = np.einsum("bhwcij,ijcf->bhwf", windows, weights["kernel"])
            found = np.maximum(normalised(found), 0).reshape(2, -1)
        found = np.maximum(normalised(found @ weights["Dense_0"]["kernel"]), 0)
        wanted = found @ weights["Dense_1"]["kernel"]
        np.testing.assert_allclose(network.apply({"params": params}, jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-4)


def test_minibatches_that_do_not_divide_a_rollout_are_refused():
    with pytest.raises(ConfigError, match="--agent.minibatches 7 does not divide the 6 steps of a rollout"):
        make_agent(together.DISCRETE, PQNConfig(minibatches=7), 3, 2, 1)
