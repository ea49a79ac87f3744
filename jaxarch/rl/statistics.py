"""What several seeds on several tasks say together (Agarwal et al. 2021, "Deep RL at the edge of the statistical
precipice").

Scores are `[seeds, tasks]` of one algorithm, larger the better, of a scale on which tasks can be averaged
(`normalized`). The interquartile mean is over seeds and tasks alike; intervals draw seeds anew within each task, so
that no task counts more for having varied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from jaxarch.run.metrics import interquartile_mean

Scores = Float[np.ndarray, "seeds tasks"]
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A statistic of the scores, and its percentile bootstrap interval."""

    value: Float[np.ndarray | np.generic, "..."]
    low: Float[np.ndarray | np.generic, "..."]
    high: Float[np.ndarray | np.generic, "..."]


def normalized(scores: Scores, low: Float[np.ndarray, " tasks"], high: Float[np.ndarray, " tasks"]) -> Scores:
    """0 where a task's score is `low` (of a random policy, say), 1 where it is `high`."""
    return (scores - low) / (high - low)


# --- statistics: of `[..., seeds, tasks]` ----------------------------------------------------------


def iqm(scores: Float[np.ndarray, "... seeds tasks"]) -> Float[np.ndarray | np.generic, "..."]:
    """The mean of the middle half of all scores."""
    return interquartile_mean(scores.reshape(*scores.shape[:-2], -1))


def optimality_gap(
    scores: Float[np.ndarray, "... seeds tasks"], target: float = 1.0
) -> Float[np.ndarray | np.generic, "..."]:
    """How far scores stay below the target on average; what exceeds it makes up for nothing."""
    return np.maximum(target - scores, 0.0).mean(axis=(-2, -1))


def profile(
    scores: Float[np.ndarray, "... seeds tasks"], levels: Float[np.ndarray, " levels"]
) -> Float[np.ndarray, "... levels"]:
    """Of each level, the share of scores above it (sec. 4.2, the score distribution)."""
    return (scores[..., None] > levels).mean(axis=(-3, -2))


def improvement(
    scores: Float[np.ndarray, "... seeds tasks"], others: Float[np.ndarray, "... other_seeds tasks"]
) -> Float[np.ndarray | np.generic, "..."]:
    """The probability that the one algorithm beats the other on a task drawn at random: over all pairs of seeds, equal
    scores counting half (sec. 4.3, the Mann-Whitney U statistic).
    """
    apart = scores[..., :, None, :] - others[..., None, :, :]
    return ((apart > 0) + 0.5 * (apart == 0)).mean(axis=(-3, -2, -1))


# --- their intervals ------------------------------------------------------------------------------


def estimate(
    statistic: Callable[..., Shaped[np.ndarray | np.generic, "..."]],
    *scores: Float[np.ndarray, "_ tasks"],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of one or more algorithms' scores, with its stratified bootstrap interval (sec. 4.1).

    statistic: takes `[..., seeds, tasks]` of each and gives `[..., *shape]`.
    """
    rng = np.random.default_rng(seed)
    drawn = np.asarray(statistic(*(resampled(of_one, rng, resamples) for of_one in scores)), float)
    ends = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)
    return Estimate(np.asarray(statistic(*scores)), ends[0], ends[1])


def resampled(scores: Scores, rng: np.random.Generator, resamples: int) -> Float[np.ndarray, "resamples seeds tasks"]:
    """Seeds drawn with replacement, of each task by itself."""
    chosen = rng.integers(len(scores), size=(resamples, *scores.shape))
    return np.take_along_axis(scores[None], chosen, axis=1)
