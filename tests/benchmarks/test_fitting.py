"""Planted costs: what is put in must come out, within its interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import nnls

from benchmarks.fitting import exponent, local_slopes, terms

LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
PLANTED = {
    "linear": (lambda n: 1e-6 * n, 1.0, 0.0),
    "n^1.5": (lambda n: 1e-7 * n**1.5, 1.5, 0.0),
    "quadratic": (lambda n: 1e-9 * n**2, 2.0, 0.0),
    "quadratic and an overhead": (lambda n: 1e-9 * n**2 + 2e-5, 2.0, 2e-5),
}


def measured(cost, rng, repeats=7, noise=0.05):
    """Each repetition is slowed by a factor of its own, now and then by much."""
    slow = np.exp(np.abs(rng.normal(0, noise, repeats))) * np.where(rng.random(repeats) < 0.05, 1.5, 1.0)
    return cost * slow


@pytest.mark.parametrize("name", PLANTED)
def test_planted_exponents_are_within_their_intervals(name):
    cost, planted, overhead = PLANTED[name]
    rng = np.random.default_rng(0)
    fits = [exponent(LENGTHS, [measured(cost(n), rng) for n in LENGTHS], overhead) for _ in range(100)]
    within = sum(fit.low <= planted <= fit.high for fit in fits)
    assert within >= 90, within
    assert np.median([fit.high - fit.low for fit in fits]) < 0.15, "an interval that says something"


def test_the_interval_is_not_as_wide_as_to_hold_any_exponent():
    rng = np.random.default_rng(1)
    fit = exponent(LENGTHS, [measured(1e-9 * n**2, rng) for n in LENGTHS])
    assert not fit.low <= 1.8 <= fit.high and not fit.low <= 2.2 <= fit.high


def test_too_few_points_above_the_overhead_give_none():
    assert exponent([1, 2, 4], [[1.0], [1.1], [30.0]], overhead=1.0) is None


def test_local_slopes_by_hand():
    np.testing.assert_allclose(local_slopes([1, 2, 4], [1.0, 2.0, 8.0]), [1, 2])


@pytest.mark.parametrize("planted", [(1e-4, 0, 1e-9), (0, 2e-6, 0), (1e-3, 1e-6, 3e-9), (0, 0, 1e-9)])
def test_planted_terms_come_out(planted):
    costs = [planted[0] + planted[1] * n + planted[2] * n**2 for n in LENGTHS]
    np.testing.assert_allclose(terms(LENGTHS, costs), planted, rtol=1e-6, atol=1e-12)


def test_terms_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs = [np.median(measured(1e-4 + 1e-9 * n**2, rng, noise=0.3)) for n in LENGTHS]
        n = np.array(LENGTHS, float)
        powers = np.stack([np.ones_like(n), n, n**2], axis=1) / np.array(costs)[:, None]
        scale = powers.max(axis=0)
        np.testing.assert_allclose(
            terms(LENGTHS, costs), nnls(powers / scale, np.ones(6))[0] / scale, rtol=1e-6, atol=1e-15
        )
