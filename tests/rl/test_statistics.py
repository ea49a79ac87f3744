"""Statistics of several seeds and tasks, against scipy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from jaxarch.rl import statistics

RNG = np.random.default_rng(0)


def test_iqm_is_the_trimmed_mean_of_all_scores():
    scores = RNG.normal(size=(7, 5))
    np.testing.assert_allclose(statistics.iqm(scores), stats.trim_mean(scores, 0.25, axis=None))
    # Not the mean of the tasks' own trimmed means.
    uneven = np.stack([np.zeros(8), np.r_[np.zeros(6), 100, 100]], axis=1)
    assert statistics.iqm(uneven) == 0
    many = RNG.normal(size=(3, 7, 5))
    np.testing.assert_allclose(statistics.iqm(many), [statistics.iqm(one) for one in many])


def test_optimality_gap():
    scores = np.array([[0.5, 2.0], [1.0, 0.0]])
    assert statistics.optimality_gap(scores) == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert statistics.optimality_gap(scores, 2.0) == pytest.approx((1.5 + 0 + 1 + 2) / 4)


def test_profile():
    scores = np.array([[0.0, 1.0], [2.0, 3.0]])
    found = statistics.profile(scores, np.array([-1.0, 0.0, 1.5, 3.0]))
    assert found.tolist() == [1.0, 0.75, 0.5, 0.0]


def test_improvement_is_mann_whitney_s():
    scores = RNG.integers(0, 6, (6, 4)).astype(float)
    others = RNG.integers(0, 6, (9, 4)).astype(float)
    by_task = [
        stats.mannwhitneyu(scores[:, task], others[:, task]).statistic / (len(scores) * len(others))
        for task in range(4)
    ]
    np.testing.assert_allclose(statistics.improvement(scores, others), np.mean(by_task))
    np.testing.assert_allclose(statistics.improvement(others, scores), 1 - np.mean(by_task))


def test_intervals_draw_within_tasks():
    """Two tasks of no variance but different levels: nothing is uncertain. One drawing over both would vary."""
    scores = np.tile([0.0, 10.0], (5, 1))
    for function in (lambda s: s.mean(axis=(-2, -1)), statistics.iqm):
        found = statistics.estimate(function, scores)
        assert found.low == found.value == found.high == 5.0


def test_the_interval_of_a_mean_is_the_normal_one():
    """Of 400 scores the percentile interval is mean +- 1.96 standard errors, and 90 % of it +- 1.64."""
    scores = RNG.normal(3.0, 2.0, (400, 1))
    error = scores.std() / np.sqrt(400)
    for confidence, z in ((0.95, 1.96), (0.9, 1.645)):
        value, low, high = statistics.estimate(lambda s: s.mean(axis=(-2, -1)), scores, confidence=confidence)
        assert value == pytest.approx(scores.mean())
        assert low == pytest.approx(value - z * error, abs=0.15 * error)
        assert high == pytest.approx(value + z * error, abs=0.15 * error)


def test_each_task_s_seeds_are_drawn_by_themselves():
    """With the same seeds in all tasks the mean over tasks would vary `sqrt(tasks)` times as much."""
    scores = np.repeat(RNG.normal(size=(200, 1)), 16, axis=1)
    drawn = statistics.resampled(scores, np.random.default_rng(1), 1000)
    assert drawn.shape == (1000, 200, 16)
    expected = scores.std() / np.sqrt(200 * 16)
    assert drawn.mean(axis=(1, 2)).std() == pytest.approx(expected, rel=0.1)


def test_intervals_of_two_algorithms_and_of_curves():
    worse, better = RNG.normal(0, 1, (10, 3)), RNG.normal(5, 1, (12, 3))
    found = statistics.estimate(statistics.improvement, better, worse)
    assert found.low > 0.95 and found.high <= 1.0
    levels = np.linspace(-2, 2, 5)
    curve = statistics.estimate(lambda scores: statistics.profile(scores, levels), worse)
    assert curve.value.shape == curve.low.shape == curve.high.shape == (5,)
    assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()
    again = statistics.estimate(statistics.improvement, better, worse)
    assert again == found


def test_normalized():
    scores = np.array([[0.0, 5.0], [10.0, -5.0]])
    found = statistics.normalized(scores, np.array([0.0, -5.0]), np.array([10.0, 5.0]))
    assert found.tolist() == [[0.0, 1.0], [1.0, 0.0]]
