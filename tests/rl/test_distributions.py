"""Distributions of actions against SciPy, and the change of variables against numerical integration."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxarch.rl.distributions import Beta, Categorical, Gaussian, TanhGaussian

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 5))
MEAN, LOG_STD = RNG.normal(size=(4, 2)), 0.3 * RNG.normal(size=(4, 2))
ALPHA, BETA = 1 + 2 * RNG.random((2, 4, 2))
LOW, HIGH = np.array([-2.0, 0.5]), np.array([2.0, 0.9])


def f32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def many(distribution, count=20_000):
    return np.asarray(jax.vmap(distribution.sample)(jax.random.split(jax.random.key(1), count)))


def test_categorical_log_prob_entropy_and_mode_by_definition():
    categorical = Categorical(*f32(LOGITS))
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    actions = RNG.integers(0, 5, (3, 4))
    expected = [[np.log(probs[i, j, actions[i, j]]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(categorical.log_prob(jnp.asarray(actions)), expected, rtol=1e-5)
    np.testing.assert_allclose(categorical.entropy(), scipy.stats.entropy(probs, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(categorical.mode(), LOGITS.argmax(-1))


def test_categorical_samples_have_the_probabilities():
    logits = LOGITS[0, 0]
    samples = many(Categorical(*f32(logits)))
    expected = np.exp(logits) / np.exp(logits).sum() * len(samples)
    assert scipy.stats.chisquare(np.bincount(samples, minlength=5), expected).pvalue > 0.01


def test_a_forbidden_action_costs_no_number():
    """Two allowed of three, equally likely: entropy log 2, and gradients that are numbers."""
    logits = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(Categorical(logits).entropy(), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(Categorical(logits).log_prob(jnp.array(2)), -np.log(2), rtol=1e-6)
    assert set(many(Categorical(logits), 100)) == {0, 2}
    gradient = jax.grad(lambda logits: Categorical(logits).entropy() + Categorical(logits).log_prob(jnp.array(2)))
    np.testing.assert_allclose(gradient(logits), [-0.5, 0, 0.5], atol=1e-6)


def test_gaussian_against_scipy():
    gaussian = Gaussian(*f32(MEAN, LOG_STD))
    reference = [scipy.stats.multivariate_normal(mean, np.diag(np.exp(2 * s))) for mean, s in zip(MEAN, LOG_STD)]
    actions = RNG.normal(size=(4, 2))
    expected = [normal.logpdf(action) for normal, action in zip(reference, actions)]
    np.testing.assert_allclose(gaussian.log_prob(*f32(actions)), expected, rtol=1e-5)
    np.testing.assert_allclose(gaussian.entropy(), [normal.entropy() for normal in reference], rtol=1e-5)
    samples = many(gaussian)
    for i in np.ndindex(MEAN.shape):
        assert scipy.stats.kstest(samples[:, *i], scipy.stats.norm(MEAN[i], np.exp(LOG_STD[i])).cdf).pvalue > 0.01


def test_one_deviation_for_the_whole_batch():
    one = Gaussian(*f32(MEAN, LOG_STD[0]))
    each = Gaussian(*f32(MEAN, np.broadcast_to(LOG_STD[0], MEAN.shape)))
    np.testing.assert_allclose(one.entropy(), each.entropy(), strict=True)
    np.testing.assert_allclose(one.log_prob(*f32(MEAN + 1)), each.log_prob(*f32(MEAN + 1)))


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.8, -1.0), (-2.0, 0.5)])
def test_the_tanh_gaussian_has_the_probability_of_every_interval(mean, log_std):
    """P(tanh(u) in [a, b]) = P(u in [atanh a, atanh b]), and the whole has probability 1."""
    edges = np.array([-0.999999, -0.9, -0.2, 0.1, 0.7, 0.999999])
    for low, high in itertools.pairwise(edges):
        # In t, where a = tanh t: the density is peaked at the bounds.
        t = np.linspace(np.arctanh(low), np.arctanh(high), 4001)
        actions = jnp.asarray(np.tanh(t)[:, None], jnp.float32)
        density = np.exp(TanhGaussian(jnp.full((4001, 1), mean), jnp.full((1,), log_std)).log_prob(actions))
        found = np.trapezoid(density * (1 - np.tanh(t) ** 2), t)
        normal = scipy.stats.norm(mean, np.exp(log_std))
        np.testing.assert_allclose(found, normal.cdf(np.arctanh(high)) - normal.cdf(np.arctanh(low)), atol=2e-4)


def test_the_tanh_gaussian_s_slope_is_that_of_the_definition():
    """Of several numbers: the Gaussian's density over the product of slopes, in float64."""
    before = RNG.normal(size=(4, 2))
    expected = scipy.stats.norm(MEAN, np.exp(LOG_STD)).logpdf(before).sum(-1)
    expected -= np.log(1 - np.tanh(before) ** 2).sum(-1)
    distribution = TanhGaussian(*f32(MEAN, LOG_STD))
    np.testing.assert_allclose(distribution.log_prob(*f32(np.tanh(before))), expected, rtol=1e-4)


def test_a_sampled_tanh_gaussian_s_log_prob_is_its_action_s():
    distribution = TanhGaussian(*f32(MEAN, LOG_STD))
    action, log_prob = distribution.sample_and_log_prob(jax.random.key(0))
    np.testing.assert_array_equal(action, distribution.sample(jax.random.key(0)))
    np.testing.assert_allclose(log_prob, distribution.log_prob(action), rtol=1e-4)
    np.testing.assert_allclose(distribution.mode(), np.tanh(MEAN), rtol=1e-6)


def test_far_out_the_tanh_gaussian_stays_exact():
    """At a mean of 20, tanh is 1 in float32; log p = log N(u) - 2 (log 2 - u) to rounding, with a finite gradient."""
    key = jax.random.key(0)

    def log_prob(mean):
        return TanhGaussian(mean, jnp.zeros(1)).sample_and_log_prob(key)[1]

    noise = np.asarray(jax.random.normal(key, (1,)), np.float64)
    expected = scipy.stats.norm.logpdf(noise).sum() - 2 * (np.log(2) - (20 + noise)).sum()
    np.testing.assert_allclose(log_prob(jnp.full(1, 20.0)), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(log_prob)(jnp.full(1, 20.0)), 2, rtol=1e-5)  # of -2 (log 2 - u)
    assert np.isfinite(TanhGaussian(jnp.zeros(1), jnp.zeros(1)).log_prob(jnp.ones(1)))


def test_beta_against_scipy():
    distribution = Beta(*f32(ALPHA, BETA, LOW, HIGH))
    reference = scipy.stats.beta(ALPHA, BETA, loc=LOW, scale=HIGH - LOW)
    actions = LOW + (HIGH - LOW) * RNG.uniform(0.05, 0.95, (4, 2))
    np.testing.assert_allclose(distribution.log_prob(*f32(actions)), reference.logpdf(actions).sum(-1), rtol=2e-4)
    np.testing.assert_allclose(distribution.entropy(), reference.entropy().sum(-1), rtol=2e-4, atol=1e-5)
    samples = many(distribution)
    for i in np.ndindex(ALPHA.shape):
        arguments = ALPHA[i], BETA[i], LOW[i[1]], HIGH[i[1]] - LOW[i[1]]
        assert scipy.stats.kstest(samples[:, *i], scipy.stats.beta(*arguments).cdf).pvalue > 0.01


def test_beta_s_mode_is_its_maximum():
    distribution = Beta(*f32(ALPHA, BETA, LOW, HIGH))
    grid = np.linspace(LOW, HIGH, 2001)[:, None]
    densities = scipy.stats.beta(ALPHA, BETA, loc=LOW, scale=HIGH - LOW).pdf(grid)
    expected = LOW + (HIGH - LOW) * densities.argmax(0) / 2000
    np.testing.assert_allclose(distribution.mode(), expected, atol=2e-3)
    np.testing.assert_allclose(Beta(jnp.ones(1), jnp.ones(1)).mode(), 0.5)


def test_beta_at_its_bounds_is_a_number():
    distribution = Beta(*f32([2.0], [3.0], [-1.0], [1.0]))
    assert np.isfinite(distribution.log_prob(jnp.array([-1.0]))) and np.isfinite(distribution.log_prob(jnp.ones(1)))
