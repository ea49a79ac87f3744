"""How a cost grows with length: exponents with an interval, and the terms of a polynomial that cannot be negative."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

ABOVE = 20  # times the overhead, from which on a point is used


class Exponent(NamedTuple):
    """cost ~ length ** exponent, and its 95 % interval."""

    exponent: float
    low: float
    high: float


def exponent(
    lengths: Sequence[int], costs: Sequence[Sequence[float]], overhead: float = 0.0, resamples: int = 2000
) -> Exponent | None:
    """The slope of log cost against log length, over the lengths whose cost is well above `overhead`.

    The interval is that of a bootstrap (Efron 1979) which draws at each length from its repeated measurements, and
    adds what the points' own distance from the line leaves open (normal, by the residuals' variance). None where
    fewer than three lengths are left.

    costs: of each length, the repeated measurements.
    overhead: what a call costs that does nothing; it is taken off.
    """
    used = [
        (n, np.asarray(c) - overhead) for n, c in zip(lengths, costs, strict=True) if np.median(c) > ABOVE * overhead
    ]
    if len(used) < 3:
        return None
    x = np.log([n for n, _ in used])
    x = x - x.mean()
    slope_of = x / (x @ x)  # a slope is this times the logarithms of the costs
    rng = np.random.default_rng(0)
    y = np.array([np.log(np.median(c)) for _, c in used])
    best = float(slope_of @ y)
    residuals = y - y.mean() - best * x
    spread = (residuals @ residuals / (len(y) - 2) / (x @ x)) ** 0.5
    drawn = np.stack([np.log(np.median(rng.choice(c, (resamples, len(c))), axis=1)) for _, c in used], axis=1)
    slopes = drawn @ slope_of + rng.standard_t(len(y) - 2, resamples) * spread
    low, high = np.percentile(slopes, [2.5, 97.5])
    return Exponent(best, float(low), float(high))


def local_slopes(lengths: Sequence[int], costs: Sequence[float]) -> list[float]:
    """The exponent between each length and the next."""
    return list(np.diff(np.log(costs)) / np.diff(np.log(lengths)))


def terms(lengths: Sequence[int], costs: Sequence[float]) -> Float[np.ndarray, "3"]:
    """(a, b, c) of cost = a + b n + c n^2, none negative, with the least sum of squared relative errors.

    Non-negative least squares (Lawson & Hanson 1974, ch. 23); of three unknowns all eight supports are tried.
    """
    n, cost = np.asarray(lengths, float), np.asarray(costs, float)
    powers = np.stack([np.ones_like(n), n, n**2], axis=1) / cost[:, None]
    scale = powers.max(axis=0)
    best, error = np.zeros(3), float(len(n))
    for count in (1, 2, 3):
        for support in itertools.combinations(range(3), count):
            columns = list(support)
            solution = np.linalg.lstsq(powers[:, columns] / scale[columns], np.ones(len(n)), rcond=None)[0]
            if (solution < 0).any():
                continue
            trial = np.zeros(3)
            trial[columns] = solution / scale[columns]
            distance = float(np.sum((powers @ trial - 1) ** 2))
            if distance < error * (1 - 1e-9):
                best, error = trial, distance
    return best
