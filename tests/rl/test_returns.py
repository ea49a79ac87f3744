"""Returns against their definitions as double sums, with random ends, and against published values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.rl import returns

GAMMA = 0.9
TIME = 37


class Steps:
    """A random rollout in float64, and how an episode goes on in it."""

    def __init__(self, seed: int, envs: tuple[int, ...] = ()):
        rng = np.random.default_rng(seed)
        self.rewards, self.values, self.next_values = rng.normal(size=(3, TIME, *envs))
        terminated, truncated = rng.random((2, TIME, *envs)) < 0.15
        self.discounts, self.boundaries = GAMMA * ~terminated, terminated | truncated
        self.ratios = rng.lognormal(0, 0.7, (TIME, *envs))

    def call(self, function, *names, **others):
        given = [jnp.asarray(getattr(self, name)) for name in (*names, "next_values", "discounts", "boundaries")]
        return function(*given, **others)

    def span(self, t):
        """The last step that belongs to the episode of step t."""
        return next((k for k in range(t, TIME) if self.boundaries[k]), TIME - 1)

    def n_step(self, t, n):
        """Sum of gamma^i r_{t+i}, and the value of where that leads."""
        last = min(t + n - 1, self.span(t))
        weight, total = 1.0, 0.0
        for k in range(t, last + 1):
            total += weight * self.rewards[k]
            weight *= self.discounts[k]
        return total + weight * self.next_values[last]


SEEDS = range(6)


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
def test_generalized_advantages(lambda_):
    for steps in map(Steps, SEEDS):
        errors = steps.rewards + steps.discounts * steps.next_values - steps.values
        expected = np.zeros(TIME)
        for t in range(TIME):
            weight = 1.0
            for k in range(t, steps.span(t) + 1):
                expected[t] += weight * errors[k]
                weight *= lambda_ * steps.discounts[k]
        actual = steps.call(returns.generalized_advantages, "rewards", "values", lambda_=lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, TIME, 2 * TIME])
def test_n_step_returns(n):
    for steps in map(Steps, SEEDS):
        expected = [steps.n_step(t, n) for t in range(TIME)]
        actual = steps.call(returns.n_step_returns, "rewards", n=n)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_discounted_returns():
    for steps in map(Steps, SEEDS):
        expected = [steps.n_step(t, TIME) for t in range(TIME)]
        np.testing.assert_allclose(steps.call(returns.discounted_returns, "rewards"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
def test_lambda_returns(lambda_):
    """(1 - lambda) sum lambda^(n-1) G^n, and all that is left of the weight on the longest."""
    for steps in map(Steps, SEEDS):
        expected = np.zeros(TIME)
        for t in range(TIME):
            most = steps.span(t) - t + 1
            for n in range(1, most):
                expected[t] += (1 - lambda_) * lambda_ ** (n - 1) * steps.n_step(t, n)
            expected[t] += lambda_ ** (most - 1) * steps.n_step(t, most)
        actual = steps.call(returns.lambda_returns, "rewards", lambda_=lambda_)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lambda_, most, most_of_policy", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.0)])
def test_v_trace(lambda_, most, most_of_policy):
    for steps in map(Steps, SEEDS):
        errors = steps.rewards + steps.discounts * steps.next_values - steps.values
        targets = steps.values.copy()
        for t in range(TIME):
            weight = 1.0
            for k in range(t, steps.span(t) + 1):
                targets[t] += weight * min(most, steps.ratios[k]) * errors[k]
                weight *= steps.discounts[k] * lambda_ * min(1, steps.ratios[k])
        advantages = np.zeros(TIME)
        for t in range(TIME):
            inside = t < steps.span(t)
            correction = targets[t + 1] - steps.values[t + 1] if inside else 0.0
            reached = steps.next_values[t] + lambda_ * correction
            advantages[t] = min(most_of_policy, steps.ratios[t]) * (
                steps.rewards[t] + steps.discounts[t] * reached - steps.values[t]
            )
        actual = steps.call(
            returns.v_trace,
            "rewards",
            "values",
            ratios=jnp.asarray(steps.ratios),
            lambda_=lambda_,
            most=most,
            most_of_policy=most_of_policy,
        )
        np.testing.assert_allclose(actual.targets, targets, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actual.advantages, advantages, rtol=1e-5, atol=1e-5)


def test_retrace():
    for steps in map(Steps, SEEDS):
        errors = steps.rewards + steps.discounts * steps.next_values - steps.values
        expected = steps.values.copy()
        for t in range(TIME):
            for k in range(t, steps.span(t) + 1):
                traces = np.prod([0.8 * min(1, steps.ratios[i]) for i in range(t + 1, k + 1)])
                expected[t] += np.prod(steps.discounts[t:k]) * traces * errors[k]
        actual = steps.call(returns.retrace, "rewards", "values", ratios=jnp.asarray(steps.ratios), lambda_=0.8)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_on_the_policy_v_trace_is_the_lambda_return():
    """With ratios 1 (and V of the next step's own observation inside an episode), so is GAE's target."""
    steps = Steps(0)
    for t in range(TIME - 1):
        if not steps.boundaries[t]:
            steps.next_values[t] = steps.values[t + 1]
    target = steps.call(returns.lambda_returns, "rewards", lambda_=0.8)
    traced = steps.call(returns.v_trace, "rewards", "values", ratios=jnp.ones(TIME), lambda_=0.8)
    advantages = steps.call(returns.generalized_advantages, "rewards", "values", lambda_=0.8)
    np.testing.assert_allclose(traced.targets, target, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(advantages + steps.values, target, rtol=1e-5, atol=1e-5)


def test_environments_do_not_mix():
    steps = Steps(1, (3, 2))
    both = steps.call(returns.generalized_advantages, "rewards", "values", lambda_=0.8)
    for name in ("rewards", "values", "next_values", "discounts", "boundaries"):
        setattr(steps, name, getattr(steps, name)[:, 2, 1])
    alone = steps.call(returns.generalized_advantages, "rewards", "values", lambda_=0.8)
    np.testing.assert_allclose(both[:, 2, 1], alone, rtol=1e-6)


def test_a_time_limit_is_not_a_death():
    """Reward 1 for ever, cut every 10 steps by a time limit: the value r / (1 - gamma) has no error."""
    value = jnp.full(50, 1 / (1 - GAMMA))
    boundaries = jnp.arange(50) % 10 == 9
    given = value, jnp.full(50, GAMMA), boundaries
    advantages = returns.generalized_advantages(jnp.ones(50), value, *given, 0.95)
    np.testing.assert_allclose(advantages, 0, atol=1e-5)
    np.testing.assert_allclose(returns.discounted_returns(jnp.ones(50), *given), value, rtol=1e-5)
    # As a death it would be worth 1 on the last step.
    dead = value, jnp.where(boundaries, 0.0, GAMMA), boundaries
    assert returns.discounted_returns(jnp.ones(50), *dead)[9] == 1


# --- values that rlax publishes in its tests (0.1.6) -----------------------------------------------

REWARDS = np.array([[1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1]]).T
DISCOUNTS = np.array([[0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]]).T
NEXT_VALUES = np.array([[3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7]]).T
NOWHERE = np.zeros((5, 2), bool)


def test_published_lambda_returns():
    expected = [[1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], [0.7866317, 0.9913063, 0.1101501, 2.834, 3.99]]
    actual = returns.lambda_returns(*map(jnp.asarray, (REWARDS, NEXT_VALUES, DISCOUNTS, NOWHERE)), 0.75)
    np.testing.assert_allclose(actual.T, expected, rtol=1e-5)


def test_published_discounted_returns():
    expected = [[1.315, 0.63, 0.7, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.99]]
    actual = returns.discounted_returns(*map(jnp.asarray, (REWARDS, NEXT_VALUES, DISCOUNTS, NOWHERE)))
    np.testing.assert_allclose(actual.T, expected, rtol=1e-5)


def test_published_n_step_returns():
    expected = [[2.8, -3.15, 0.7, 1.7, 3.4], [1.2155, 0.714, 0.2576, 3.192, 3.99]]
    actual = returns.n_step_returns(*map(jnp.asarray, (REWARDS, NEXT_VALUES, DISCOUNTS, NOWHERE)), 3)
    np.testing.assert_allclose(actual.T, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "lambda_, first, second",
    [
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0, -4.9]),
    ],
)
def test_published_advantages(lambda_, first, second):
    rewards = np.array([[0.0, 0.0, 1.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0, 1.0]]).T
    values = np.array([[1.0, 4.0, -3.0, -2.0, -1.0, -1.0], [-3.0, -2.0, -1.0, 0.0, 5.0, -1.0]]).T
    discounts = np.array([[0.99] * 5, [0.9, 0.9, 0.9, 0.0, 0.9]]).T
    given = rewards, values[:-1], values[1:], discounts, discounts == 0
    actual = returns.generalized_advantages(*map(jnp.asarray, given), lambda_)
    np.testing.assert_allclose(actual.T, [first, second], atol=1e-3)


def test_published_v_trace():
    behaviour = np.array(
        [
            [[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
            [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]],
        ]
    )
    target = np.array(
        [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
    )
    actions = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])

    def probability(logits):
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.take_along_axis(shares, actions[..., None], -1)[..., 0]

    values = np.array([[2.1, 1.1, -3.1, 0.0, 8.4], [3.1, 0.1, -1.1, 7.4, -1.2]]).T
    discounts = np.array([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]]).T
    rewards = np.array([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]]).T
    ratios = (probability(target) / probability(behaviour)).T
    given = rewards, values[:-1], values[1:], discounts, discounts == 0, ratios
    errors, advantages = returns.v_trace(*map(jnp.asarray, given))
    expected = [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327e-5, -13.54]]
    np.testing.assert_allclose((errors - values[:-1]).T, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(advantages.T, expected, rtol=1e-3, atol=1e-6)


def test_published_retrace():
    own = np.array(
        [[[1.1, 2.1], [-1.1, 1.1], [3.1, -3.1], [-1.2, 0.0]], [[2.1, 3.1], [9.5, 0.1], [-2.1, -1.1], [0.1, 7.4]]]
    )
    target = np.array(
        [[[1.2, 2.2], [-1.2, 0.2], [2.2, -1.2], [-2.25, -6.0]], [[4.2, 2.2], [1.2, 1.2], [-1.2, -2.2], [1.5, 1.0]]]
    )
    actions = np.array([[0, 1, 0, 0], [1, 0, 0, 1]])
    rewards = np.array([[-1.3, -1.3, 2.3], [1.3, 5.3, -3.3]]).T
    discounts = np.array([[0.0, 0.89, 0.85], [0.88, 1.0, 0.83]]).T
    policy = np.array(
        [[[0.5, 0.5], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1]], [[0.1, 0.9], [1.0, 0.0], [0.3, 0.7], [0.7, 0.3]]]
    )
    acted = np.array([[0.5, 0.1, 0.9, 0.3], [0.4, 0.6, 1.0, 0.9]])

    def taken(table):
        return np.take_along_axis(table, actions[..., None], -1)[..., 0].T

    ratios = taken(policy) / acted.T
    expected_values = (policy * target).sum(-1).T
    given = rewards, taken(target)[:-1], expected_values[1:], discounts, discounts == 0, ratios[:-1]
    errors = returns.retrace(*map(jnp.asarray, given), 0.9) - taken(own)[:-1]
    expected = [[2.8800001, 3.8934109, 4.5942383], [0.31121615, 20.253206, 0.0031601219]]
    np.testing.assert_allclose(0.5 * np.square(errors.T), expected, rtol=1e-4)
