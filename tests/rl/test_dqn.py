"""Deep Q-learning: updates by definition, schedules by the iteration's number, and what it learns of probes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms.dqn import PRIORITY_FLOOR, DQNConfig, NoisyDense, make_agent, network_of, priorities_of
from jaxarch.rl.distributional import projected
from jaxarch.rl.environments import make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import probes, together
from tests.rl.test_distributional import shared_out

PROBING = DQNConfig(
    learning_rate=5e-3,
    gamma=together.GAMMA,
    epsilon=0.2,
    epsilon_steps=2000,
    replay=1024,
    starts=64,
    batch_size=64,
    target_every=80,
    lowest=-2.0,
    highest=6.0,
    atoms=33,
    model=NetworkConfig(layers=1, width=32, activation="relu"),
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"double": True, "prioritized": True, "horizon": 3},
        {"noisy": True, "returns": "quantile"},
        {"double": True, "dueling": True, "prioritized": True, "horizon": 3, "noisy": True, "returns": "categorical"},
    ],
    ids=lambda options: "-".join(map(str, options if len(options) < 6 else ["rainbow"])) or "plain",
)
def test_probe_environments(options):
    """That of `endless` tells that truncation is no death."""
    config, environment = dataclasses.replace(PROBING, **options), together.DISCRETE
    agent = make_agent(environment, config, 8, 1, 1000)
    state, _ = together.train(environment, agent, config.hypers, 8, 1, 1000)

    def values(observations):
        returns = network_of(environment, config).apply({"params": state.learner.params}, observations)
        if config.returns == "categorical":
            return jax.nn.softmax(returns) @ jnp.linspace(config.lowest, config.highest, config.atoms)
        return returns.mean(axis=-1)

    found = np.asarray(values(together.OBSERVATIONS)).max(axis=1)
    np.testing.assert_allclose(found, together.VALUES, atol=0.2)
    np.testing.assert_array_equal(np.asarray(values(together.BY_BOTH)).argmax(axis=1), [1, 0])


def test_what_is_predicted_exactly_keeps_a_priority():
    """The divergence of a target, which sums to a little less than 1, from what it predicts exactly is below 0."""
    support = jnp.linspace(-10.0, 10.0, 51)
    rewards = jnp.linspace(-9.0, 9.0, 1801)[:, None]
    targets = projected(jnp.full((1801, 51), 1 / 51), jnp.broadcast_to(rewards, (1801, 51)), support)
    surprise = optax.losses.kl_divergence(jax.nn.log_softmax(jnp.log(jnp.maximum(targets, 1e-30))), targets)
    assert surprise.min() < -PRIORITY_FLOOR
    assert priorities_of(surprise, 0.5).min() == pytest.approx(PRIORITY_FLOOR**0.5)


# --- updates by definition ------------------------------------------------------------------------

REWARD, GAMMA = 0.7, 0.9
OBSERVATION, NEXT = np.array([0.5, -1.0, 2.0, 0.3]), np.array([1.0, 0.4, -0.6, 1.5])
ACTION = 1


def outputs(params: dict, observation: np.ndarray, dueling: bool, atoms: int) -> np.ndarray:
    """Of a network without hidden layers, `[actions, atoms]`."""
    layers = [observation @ layer["head_0_kernel"] + layer["head_0_bias"] for _, layer in sorted(params.items())]
    advantages = layers[0].reshape(2, atoms)
    return layers[1].reshape(1, atoms) + advantages - advantages.mean(axis=0) if dueling else advantages


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max(axis=-1, keepdims=True)) / np.exp(x - x.max(axis=-1, keepdims=True)).sum(-1, keepdims=True)


@pytest.mark.parametrize("returns", ["mean", "categorical", "quantile"])
@pytest.mark.parametrize("extended", [False, True])
def test_losses_and_priorities_are_by_definition(returns, extended):
    """On a ring full of one and the same transition, so that it does not matter what is drawn.

    The online and the target network prefer different actions of the next observation.
    """
    atoms = 1 if returns == "mean" else 5
    config = DQNConfig(
        gamma=GAMMA,
        starts=0,
        batch_size=6,
        replay=8,
        target_every=10_000,
        double=extended,
        dueling=extended,
        prioritized=extended,
        horizon=2 if extended else 1,
        returns=returns,
        atoms=5,
        lowest=-2.0,
        highest=2.0,
        model=NetworkConfig(layers=0),
    )
    environment = make("CartPole-v1", {"max_steps_in_episode": 1})
    agent = make_agent(environment, config, 4, 2, 100)
    learner = agent.init(jax.random.key(0), config.hypers)
    target = jax.tree.map(lambda x: -x + 0.1, learner.params)
    online = jax.tree.map(np.asarray, learner.params)

    def every(value, dtype=np.float32):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (2, 4, *np.shape(value)))

    quiet = jnp.zeros((2, 4), bool)
    rollout = Rollout(
        every(OBSERVATION), quiet, every(ACTION, np.int32), every(REWARD), quiet, ~quiet, every(NEXT), (), ()
    )
    learner, metrics = jax.jit(agent.learn)(
        dataclasses.replace(learner, target=target), rollout, jax.random.key(1), jnp.asarray(0)
    )

    support = np.linspace(-2, 2, 5)

    def means(described: np.ndarray) -> np.ndarray:
        return softmax(described) @ support if returns == "categorical" else described.mean(axis=-1)

    following = outputs(target, NEXT, extended, atoms)
    deciding = outputs(online, NEXT, extended, atoms) if extended else following
    assert means(outputs(online, NEXT, extended, atoms)).argmax() != means(following).argmax()
    following = following[means(deciding).argmax()]
    own = outputs(online, OBSERVATION, extended, atoms)[ACTION]
    # Every step was truncated, so two steps joined are one, bootstrapped.
    if returns == "categorical":
        wanted = shared_out(softmax(following), REWARD + GAMMA * support, support)
        loss = surprise = np.sum(wanted * (np.log(np.maximum(wanted, 1e-30)) - np.log(softmax(own))))
    elif returns == "quantile":
        loss = 0.0
        for i, quantile in enumerate(own):
            errors = REWARD + GAMMA * following - quantile
            huber = np.where(abs(errors) <= 1, errors**2 / 2, abs(errors) - 0.5)
            loss += np.mean(abs((i + 0.5) / 5 - (errors < 0)) * huber)
        surprise = loss
    else:
        surprise = abs(REWARD + GAMMA * following - own)[0]
        loss = surprise**2
    np.testing.assert_allclose(metrics["train/value_loss"].total, loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["train/td_error"].total, surprise, rtol=1e-4)
    if extended:
        given = np.asarray(learner.replay.priorities.levels[0]).reshape(-1)
        drawn = given[(given > 0) & (given != 1)]
        assert len(drawn)
        np.testing.assert_allclose(drawn, (surprise + PRIORITY_FLOOR) ** config.alpha, rtol=1e-4)


def test_a_first_update_is_adams_by_the_annealed_rate():
    """Adam's first step is the rate in every direction; the rate at iteration 25 of 100 is three quarters."""
    config = DQNConfig(learning_rate=0.01, anneal=True, starts=0, replay=2, model=NetworkConfig(layers=0))
    environment = probes.CONSTANT
    agent = make_agent(environment, config, 2, 1, 100)
    learner = agent.init(jax.random.key(0), config.hypers)
    one = jnp.ones((1, 2, 1))
    ended = jnp.ones((1, 2), bool)
    rollout = Rollout(one, ended, jnp.ones((1, 2), jnp.int32), 9 * one[..., 0], ended, ~ended, one, (), ())
    after, _ = jax.jit(agent.learn)(learner, rollout, jax.random.key(0), jnp.asarray(25))
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), after.params, learner.params)
    (layer,) = moved.values()
    np.testing.assert_allclose(layer["head_0_kernel"], [[0, 0.0075]], rtol=1e-4)
    np.testing.assert_allclose(layer["head_0_bias"], [0, 0.0075], rtol=1e-4)


# --- schedules ------------------------------------------------------------------------------------


def test_learning_begins_and_the_target_follows_by_the_iterations_number():
    """16 steps an iteration: learning begins with the one that makes 64, the target is copied every 48."""
    config = DQNConfig(starts=64, target_every=48, batch_size=4, replay=128, updates=2, model=PROBING.model)
    environment = probes.BY_BOTH
    agent = make_agent(environment, config, 4, 4, 100)

    def step(carry, index):
        learner, rollout = carry
        learner, metrics = agent.learn(learner, rollout, jax.random.fold_in(jax.random.key(0), index), index)
        return (learner, rollout), (learner.params, learner.target, metrics)

    ended = jnp.ones((4, 4), bool)
    one = jnp.ones((4, 4, 1))
    rollout = Rollout(one, ended, jnp.zeros((4, 4), jnp.int32), one[..., 0], ended, ~ended, one, (), ())
    start = agent.init(jax.random.key(0), config.hypers)
    _, (params, target, metrics) = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(12)))((start, rollout))
    params, target = ([np.asarray(jax.tree.leaves(tree)[0][i]) for i in range(12)] for tree in (params, target))
    before = [np.asarray(jax.tree.leaves(start.params)[0]), *params]
    changed = [not np.array_equal(old, new) for old, new in pairwise(before)]
    assert changed == [False] * 3 + [True] * 9
    np.testing.assert_array_equal(metrics["train/value_loss"].weight, [0] * 3 + [2] * 9)
    for index in range(12):
        last = (index + 1) // 3 * 3 - 1  # the latest iteration, this one counted, that copied
        np.testing.assert_array_equal(target[index], params[last] if last >= 0 else before[0])


def test_exploration_falls_linearly():
    config = DQNConfig(epsilon=0.1, epsilon_steps=1000, model=NetworkConfig(layers=0))
    agent = make_agent(probes.CONSTANT, config, 10, 1, 1000)
    learner = agent.init(jax.random.key(0), config.hypers)
    learner = dataclasses.replace(learner, params=jax.tree.map(jnp.zeros_like, learner.params))
    observation = jnp.zeros((20_000, 1))

    @jax.jit
    def other(index):
        """The share of actions that are not the greedy one, which is half of the random ones."""
        return jnp.mean(agent.act(learner, observation, jax.random.key(1), (), None, index)[0] != 0, dtype=jnp.float32)

    for index, epsilon in ((0, 1.0), (50, 0.55), (100, 0.1), (900, 0.1)):
        np.testing.assert_allclose(other(jnp.asarray(index)), epsilon / 2, atol=0.015)
    exploring = agent.policy(learner, observation, jax.random.key(1), (), None, False)[0]
    np.testing.assert_allclose(exploring.mean(), 0.05, atol=0.01)
    assert not agent.policy(learner, observation, jax.random.key(1), (), None, True)[0].any()


def test_noise_of_weights_has_mean_zero_and_its_variance():
    """f(e)^2 = |e|, of mean sqrt(2 / pi); a weight's noise is a product of two of them, a bias's one."""
    layer = NoisyDense(3)
    x = jnp.asarray([[0.5, -2.0]])
    params = layer.init(jax.random.key(0), x)["params"]
    params["kernel_deviation"] = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    params["bias_deviation"] = jnp.asarray([0.7, 0.8, 0.9])
    keys = jax.random.split(jax.random.key(1), 40_000)
    drawn = jax.jit(jax.vmap(lambda key: layer.apply({"params": params}, x, rngs={"noise": key})[0]))(keys)
    mean = layer.apply({"params": params}, x)[0]
    np.testing.assert_allclose(mean, x[0] @ params["kernel"] + params["bias"], rtol=1e-6)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.02)
    variance = np.square(x[0]) @ np.square(params["kernel_deviation"]) * 2 / np.pi
    variance += np.square(params["bias_deviation"]) * np.sqrt(2 / np.pi)
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.04)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"atoms": 1}, "--agent.atoms 1 is below 2."),
        ({"horizon": 0}, "--agent.horizon 0 is below 1."),
        ({"adam_eps": -1.0}, "--agent.adam-eps -1 is not 0 or above"),
        ({"lowest": -np.inf}, "--agent.lowest -inf, --agent.highest 10: they are finite numbers."),
        ({"lowest": 2.0, "highest": 2.0}, "--agent.lowest 2 is not below --agent.highest 2."),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        DQNConfig(**options)


def test_continuous_actions_are_refused():
    with pytest.raises(ConfigError, match="dqn chooses among discrete actions; those of Pendulum-v1 are continuous"):
        make_agent(make("Pendulum-v1"), DQNConfig(), 1, 1, 1)
