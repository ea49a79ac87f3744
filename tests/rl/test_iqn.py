"""Implicit quantile networks: quantiles of a known return, risk, and what they learn of probes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms.iqn import IQNConfig, QuantileNetwork, make_agent, network_of
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import probes, together

PROBING = IQNConfig(
    learning_rate=5e-3,
    gamma=together.GAMMA,
    epsilon=0.2,
    epsilon_steps=2000,
    replay=1024,
    starts=64,
    batch_size=64,
    target_every=80,
    acting_quantiles=8,
    cosines=16,
    model=NetworkConfig(layers=1, width=32, activation="relu"),
)


def test_probe_environments():
    """That of `endless` tells that truncation is no death."""
    environment = together.DISCRETE
    agent = make_agent(environment, PROBING, 8, 1, 1000)
    state, _ = together.train(environment, agent, PROBING.hypers, 8, 1, 1000)

    def values(observations):
        levels = jnp.broadcast_to((jnp.arange(32) + 0.5) / 32, (len(observations), 32))
        network = network_of(environment, PROBING)
        return np.asarray(network.apply({"params": state.learner.params}, observations, levels).mean(axis=1))

    np.testing.assert_allclose(values(together.OBSERVATIONS).max(axis=1), together.VALUES, atol=0.2)
    np.testing.assert_array_equal(values(together.BY_BOTH).argmax(axis=1), [1, 0])


def test_quantiles_and_risk():
    """One step of a reward that is 0 for action 0, and Gaussian of mean 0.3 and deviation 1 for action 1: the mean
    prefers 1; the mean of the worst quarter, which is known, prefers 0.
    """
    config = dataclasses.replace(
        PROBING, learning_rate=1e-2, anneal=True, replay=8192, starts=0, batch_size=512, quantiles=16, updates=100
    )
    environment = probes.CONSTANT
    agent = make_agent(environment, config, 64, 128, 12)
    rng = np.random.default_rng(0)
    action = rng.integers(0, 2, (128, 64)).astype(np.int32)
    reward = np.where(action == 1, rng.normal(0.3, 1.0, (128, 64)), 0.0).astype(np.float32)
    one, ended = jnp.ones((128, 64, 1)), jnp.ones((128, 64), bool)
    rollout = Rollout(one, ended, jnp.asarray(action), jnp.asarray(reward), ended, ~ended, one, (), ())
    learn = jax.jit(agent.learn)
    learner = jax.jit(agent.init)(jax.random.key(0), jax.tree.map(jnp.asarray, config.hypers))
    for index in range(12):
        learner, _ = learn(learner, rollout, jax.random.key(index), jnp.asarray(index))
    levels = jnp.linspace(0.1, 0.9, 9)
    found = network_of(environment, config).apply({"params": learner.params}, one[0, :1], levels[None])[0]
    np.testing.assert_allclose(found[:, 0], 0, atol=0.1)
    # Huber's kappa of 1 draws quantiles towards the middle, as it does the true minimiser.
    wanted = [huber_quantile(level) for level in np.asarray(levels)]
    np.testing.assert_allclose(found[:, 1], wanted, atol=0.15)

    def greedy(risk):
        averse = dataclasses.replace(learner, hypers=learner.hypers._replace(risk=jnp.asarray(risk)))
        return int(agent.policy(averse, one[0, :1], None, (), None, True)[0][0])

    assert (greedy(1.0), greedy(0.25)) == (1, 0)


def huber_quantile(level: float, kappa: float = 1.0) -> float:
    """Where the expected quantile Huber loss of a Gaussian of mean 0.3 is least, on a fine grid."""
    samples = stats.norm.ppf((np.arange(2000) + 0.5) / 2000, 0.3, 1.0)
    candidates = np.linspace(-2.5, 3, 1101)
    errors = samples - candidates[:, None]
    huber = np.where(abs(errors) <= kappa, errors**2 / 2, abs(errors) - kappa / 2)
    return candidates[np.mean(abs(level - (errors < 0)) * huber, axis=1).argmin()]


def test_the_network_is_that_of_the_paper():
    """Features times the embedding of cos(pi i level), i = 0 ... n - 1, by numpy."""
    network = QuantileNetwork(NetworkConfig(layers=0, width=5, activation="relu"), (3,), 0, 2, 4)
    rng = np.random.default_rng(0)
    x, levels = rng.normal(size=(2, 3)).astype(np.float32), rng.random((2, 6)).astype(np.float32)
    params = network.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(levels))["params"]
    embed, hidden, last = (jax.tree.map(np.asarray, params[f"Dense_{n}"]) for n in range(3))
    for b in range(2):
        for n in range(6):
            waves = np.cos(np.pi * np.arange(4) * levels[b, n])
            features = x[b] * np.maximum(waves @ embed["kernel"], 0)
            wanted = np.maximum(features @ hidden["kernel"], 0) @ last["kernel"]
            got = network.apply({"params": params}, jnp.asarray(x), jnp.asarray(levels))[b, n]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "said"), [({"risk": 0.0}, "--agent.risk 0 is not"), ({"cosines": 0}, "cosines 0")])
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        IQNConfig(**options)
