"""How good generated pictures are, and how varied: distances between two sets of features.

Features are `[samples, dim]`, of fakes and of real pictures, from an extractor (`jaxarch.gan.features`). All is
computed in float64 on the host, neighbour searches in blocks, so that memory is bounded whatever their number.

Every number depends on how many pictures there are, so it is read beside its floor: what as many real pictures get in
the place of the fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, UInt8
from scipy.special import rel_entr

from jaxarch.gan.features import Extractor, extracted
from jaxarch.run.protocol import ConfigError

BLOCK = 2**24  # distances held at once: 128 MiB
PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5  # as their papers have them
SPLITS = 5  # of the real pictures, for what real ones get in the place of fakes
LEAST = 2 * (COVERAGE_NEIGHBOURS + 1)  # pictures on each side
INTERVAL = 1.96  # standard errors on each side of a 95 % interval

Features = Float[np.ndarray, "samples dim"]
Others = Float[np.ndarray, "others dim"]


# --- distances between distributions ------------------------------------------------------------


def frechet_distance(
    mean: Float[np.ndarray, " dim"],
    covariance: Float[np.ndarray, "dim dim"],
    other_mean: Float[np.ndarray, " dim"],
    other_covariance: Float[np.ndarray, "dim dim"],
) -> float:
    """|m - m'|^2 + Tr(C + C' - 2 (C C')^1/2), the squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017,
    eq. 6; Dowson & Landau 1982).

    The trace of (C C')^1/2 is the sum of the singular values of C^1/2 C'^1/2, which exist for any covariances, singular
    ones too: no square root of a matrix that has none, and no imaginary part to be thrown away.
    """
    cross = np.linalg.svd(_root(covariance) @ _root(other_covariance), compute_uv=False).sum()
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * cross
    return max(float(np.sum((mean - other_mean) ** 2) + spread), 0.0)  # below 0 by rounding alone


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    # What rounding makes of zeros: its root would be 1e-8 of the largest, for each of them.
    values = np.where(values > len(values) * np.finfo(np.float64).eps * values[-1], values, 0.0)
    return (vectors * np.sqrt(values)) @ vectors.T


def frechet(fakes: Features, real: Others) -> float:
    """The Frechet distance of the Gaussians with the sets' means and covariances.

    Biased: on average above the distance of the distributions, by a part that falls as 1 / samples, differs from
    generator to generator, and is there for equal distributions too.
    """
    (mean, factor), (other_mean, other_factor) = _factored(fakes), _factored(real)
    # As in `frechet_distance`: F C'^1/2 has the singular values of C^1/2 C'^1/2 where C = F^T F, and so on.
    cross = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    spread = np.sum(factor**2) + np.sum(other_factor**2) - 2 * cross
    return max(float(np.sum((mean - other_mean) ** 2) + spread), 0.0)


def _factored(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and F such that F^T F is the covariance, of no more rows than there are samples or features."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    return mean, np.linalg.qr(factor, mode="r") if len(factor) > factor.shape[1] else factor


class Frechet(NamedTuple):
    """value: the distance as it is usually given, of all samples, with its bias.

    low, high: a 95 % interval for what value is on average over sets of these sizes. It is about chance, not bias.
    infinity: the distance without the bias, as of infinitely many samples; as uncertain as value.
    """

    value: float
    low: float
    high: float
    infinity: float


def frechet_interval(fakes: Features, real: Others, halves: int = 50, seed: int = 0) -> Frechet:
    """The Frechet distance with its uncertainty and without its bias, from random halves of both sets.

    Over halves without replacement the distance varies as it would over whole sets (the delete-half jackknife, Shao &
    Wu 1989), and its bias, which is as 1 / samples, is twice as large: value - (mean of halves - value) is the line in
    1 / samples that Chong & Forsyth 2020 follow to infinitely many, through two points. A bootstrap's repeated samples
    would lower the covariances' rank: its interval is too wide, and its bias wrong where features are many.

    The halves need more samples than there are features for the line to hold. Near 0, where the distance is of second
    order in what chance changes, the interval is about twice too wide.
    """
    rng = np.random.default_rng(seed)
    value = frechet(fakes, real)
    of_halves = [frechet(_some(fakes, len(fakes) // 2, rng), _some(real, len(real) // 2, rng)) for _ in range(halves)]
    error = INTERVAL * float(np.std(of_halves, ddof=1))
    return Frechet(value, max(value - error, 0.0), value + error, 2 * value - float(np.mean(of_halves)))


def _some(array: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return array[rng.choice(len(array), count, replace=False)]


class Estimate(NamedTuple):
    """error: one standard error."""

    value: float
    error: float


def kernel_distance(fakes: Features, real: Others, subsets: int = 50, size: int = 1000, seed: int = 0) -> Estimate:
    """KID (Binkowski et al. 2018): the squared MMD under the kernel (x . y / dim + 1)^3, the mean over random subsets.

    Unbiased: on average 0 for equal distributions, so a single estimate may be below 0.
    size: of the subsets of each set; at most half of the smaller set.
    error: from the subsets' spread, for the estimate from all samples (the delete-d jackknife, Shao & Wu 1989).
    """
    least = min(len(fakes), len(real))
    size, rng = min(size, least // 2), np.random.default_rng(seed)
    found = [maximum_mean_discrepancy(_some(fakes, size, rng), _some(real, size, rng)) for _ in range(subsets)]
    return Estimate(float(np.mean(found)), float(np.std(found, ddof=1) * np.sqrt(size / (least - size))))


def maximum_mean_discrepancy(fakes: Features, real: Others) -> float:
    """MMD^2 under the kernel (x . y / dim + 1)^3, without bias (Gretton et al. 2012, eq. 3)."""
    fakes, real = fakes.astype(np.float64), real.astype(np.float64)
    return float(_within(fakes) + _within(real) - 2 * _kernel(fakes, real).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x @ y.T / x.shape[1] + 1
    return products * products * products  # ** 3 takes ten times as long


def _within(x: np.ndarray) -> float:
    products = _kernel(x, x)
    return (products.sum() - np.trace(products)) / (len(x) * (len(x) - 1))


def inception_score(
    probabilities: Float[np.ndarray, "samples classes"], splits: int = 10, seed: int = 0
) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | picture) from p(class) (Salimans et al. 2016, sec. 4).

    The mean over the splits, and their standard deviation, as is customary. Between 1 and the number of classes; too
    low where a split has few pictures for its classes. Samples are shuffled first: fakes made class by class would give
    each split few classes.
    """
    order = np.random.default_rng(seed).permutation(len(probabilities))
    scores = []
    for part in np.array_split(probabilities.astype(np.float64)[order], min(splits, len(order))):
        scores.append(np.exp(rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


# --- neighbours ---------------------------------------------------------------------------------


def nearest(
    queries: Features, references: Others, count: int, *, themselves: bool = False, block: int = BLOCK
) -> tuple[Int[np.ndarray, "samples count"], Float64[np.ndarray, "samples count"]]:
    """Of each query the nearest references, the nearest first: their places and Euclidean distances.

    themselves: the queries are the references, and none is its own neighbour.
    block: distances held at once.
    """
    if not 1 <= count <= len(references) - themselves:
        raise ConfigError(f"{len(references)} samples have no {count} neighbours; give more.")
    places, distances = [], []
    for rows, squared in _squared_distances(queries, references, block):
        if themselves:
            squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        some = np.argpartition(squared, count - 1, axis=1)[:, :count]
        # Anew, by differences, so that copies are at a distance of 0.
        of_some = np.linalg.norm(queries[rows][:, None].astype(np.float64) - references[some], axis=-1)
        order = np.argsort(of_some, axis=1, kind="stable")
        places.append(np.take_along_axis(some, order, axis=1))
        distances.append(np.take_along_axis(of_some, order, axis=1))
    return np.concatenate(places), np.concatenate(distances)


def _squared_distances(queries: Features, references: Others, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    # About a common mean, so that |x|^2 + |y|^2 - 2 x . y loses few digits.
    mean = references.mean(axis=0, dtype=np.float64)
    references = references - mean
    norms = np.sum(references**2, axis=1)
    step = max(block // (len(references) + references.shape[1]), 1)
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        some = queries[rows] - mean
        squared = np.sum(some**2, axis=1)[:, None] + norms - 2 * some @ references.T
        yield rows, np.maximum(squared, 0, out=squared)


class Balls(NamedTuple):
    """holding: how many of the balls hold each point. hit: which balls hold a point."""

    holding: Int[np.ndarray, " samples"]
    hit: Bool[np.ndarray, " others"]


def in_balls(points: Features, centres: Others, neighbours: int, block: int = BLOCK) -> Balls:
    """Points against the balls around centres that reach to the centre's `neighbours`-th nearest other centre."""
    radii = nearest(centres, centres, neighbours, themselves=True, block=block)[1][:, -1]
    holding, hit = [], np.zeros(len(centres), bool)
    for _, squared in _squared_distances(points, centres, block):
        inside = squared <= radii**2 * (1 + 1e-9)  # a closed ball: a copy of the neighbour on its edge is in it
        holding.append(inside.sum(axis=1))
        hit |= inside.any(axis=0)
    return Balls(np.concatenate(holding), hit)


def precision_and_recall(fakes: Features, real: Others, neighbours: int = PRECISION_NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 1 and 2).

    precision: the share of fakes in a ball of the real ones. recall: the share of real ones in a ball of the fakes.
    One outlier's ball holds much: real outliers raise precision, fake ones recall.
    """
    precision, recall = in_balls(fakes, real, neighbours), in_balls(real, fakes, neighbours)
    return float(np.mean(precision.holding > 0)), float(np.mean(recall.holding > 0))


def density_and_coverage(fakes: Features, real: Others, neighbours: int = COVERAGE_NEIGHBOURS) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, eqs. 3 and 5), both by balls around real ones.

    density: how many of these balls hold a fake, on average, divided by `neighbours`; 1 for equal distributions, and
    above where fakes crowd where real ones are dense. coverage: the share of the balls that hold a fake.
    """
    balls = in_balls(fakes, real, neighbours)
    return float(balls.holding.mean()) / neighbours, float(balls.hit.mean())


class TwoSample(NamedTuple):
    """accuracy: 0.5 where nothing tells the sets apart. p_value: the chance of one as high then.

    of_fakes, of_real: the accuracy on each set; accuracy is that on both.
    """

    accuracy: float
    p_value: float
    of_fakes: float
    of_real: float


def two_sample(fakes: Features, real: Others, permutations: int = 1000, seed: int = 0) -> TwoSample:
    """Classifier two-sample test with the nearest other sample as the classifier (Lopez-Paz & Oquab 2017).

    The answers left one out depend on one another, so the p-value is not the binomial one but by permutation of what is
    called fake, exact for any sample. The sets should be of one size.

    Read beside the accuracy on each set (Xu et al. 2018, sec. 3): fakes more spread than the real ones have real
    neighbours alone, 0 and 1, whose mean tells nothing; collapsed ones 1 and less. Both far below 0.5: fakes lie
    nearer to real ones than real ones to one another, as copies do.
    """
    both, is_fake = np.concatenate([fakes, real]), np.arange(len(fakes) + len(real)) < len(fakes)
    neighbour = nearest(both, both, 1, themselves=True)[0][:, 0]
    right, rng = is_fake == is_fake[neighbour], np.random.default_rng(seed)
    shuffled = (rng.permutation(is_fake) for _ in range(permutations))
    as_high = sum(np.sum(labels == labels[neighbour]) >= right.sum() for labels in shuffled)
    p_value = (1 + int(as_high)) / (1 + permutations)
    return TwoSample(float(right.mean()), p_value, float(right[is_fake].mean()), float(right[~is_fake].mean()))


def copying(fakes: Features, others: Others, training: Float[np.ndarray, "trained dim"]) -> float:
    """The chance that a fake is nearer to a training picture than an unseen real one is (Meehan et al. 2020, sec. 3).

    0.5 where a generator gives what is new; near 1 where it copies; below where its fakes are far from everything.
    """
    of_fakes, of_others = (np.sort(nearest(some, training, 1)[1][:, 0]) for some in (fakes, others))
    nearer = np.searchsorted(of_fakes, of_others, "left") + np.searchsorted(of_fakes, of_others, "right")
    return float(nearer.mean()) / 2 / len(fakes)  # what is as far counts half: the statistic of Mann & Whitney


# --- pictures -----------------------------------------------------------------------------------


def nearest_pictures(
    extractor: Extractor,
    fakes: UInt8[np.ndarray, "fakes _ _ _"],
    training: UInt8[np.ndarray, "trained _ _ _"],
    count: int = 5,
) -> tuple[Int[np.ndarray, "fakes count"], Float64[np.ndarray, "fakes count"]]:
    """For a panel: the training pictures nearest to each fake, by their places, and how far they are."""
    return nearest(extracted(extractor, fakes)[0], extracted(extractor, training)[0], count)


def evaluate(
    extractor: Extractor,
    fakes: UInt8[np.ndarray, "fakes _ _ _"],
    real: UInt8[np.ndarray, "real _ _ _"],
    other: UInt8[np.ndarray, "other _ _ _"] | None = None,
    *,
    halves: int = 50,
    seed: int = 0,
) -> dict[str, Array]:
    """All metrics of generated pictures by name, as `val/fid[digits-cnn]`; see `make_evaluate`."""
    return make_evaluate(extractor, real, other, halves=halves, seed=seed)(fakes)


def make_evaluate(
    extractor: Extractor,
    real: UInt8[np.ndarray, "real _ _ _"],
    other: UInt8[np.ndarray, "other _ _ _"] | None = None,
    *,
    halves: int = 50,
    seed: int = 0,
    prefix: str = "val",
) -> Callable[[UInt8[np.ndarray, "fakes _ _ _"]], dict[str, Array]]:
    """`fakes -> metrics`, with the real pictures' features taken once.

    real: what fakes are compared with: the training pictures, as a rule.
    other: real pictures not among them, held out. None: half of `real`, drawn at random.
    halves: for the interval; each costs one more Frechet distance: seconds with 2,048 features of as many pictures.

    As many fakes are taken, at random, as there are other pictures. Of `real` all are taken for fid, kid and copying,
    that many for the others.

        fid, fid_low, fid_high      Frechet distance, and the 95 % interval of chance (`frechet_interval`)
        fid_infinity                the same without bias; left out where halves have no more samples than features
        kid, kid_error              kernel distance and its standard error (`kernel_distance`)
        inception_score             left out where the extractor knows of no classes
        precision, recall, density, coverage
        c2st, c2st_p, c2st_fakes, c2st_real     two-sample test: accuracy, p-value, accuracy on each set
        copying                     0.5: fakes are as far from `real` as unseen pictures; towards 1: copies
        fid_floor, kid_floor, precision_real, recall_real, density_real, coverage_real, inception_score_real
                                    what as many real pictures get in the place of the fakes

    The last ones are means over random splits of all real pictures into sets of the same sizes, so that nothing but
    chance tells these apart. The given split itself would not do: where each class is held out in its share, the two
    parts are more alike than independent ones.

    Raises ConfigError where there are fewer than 12 fakes, or real pictures on either side.
    """
    if other is None:
        first, second = np.array_split(np.random.default_rng(seed).permutation(len(real)), 2)
        real, other = real[np.sort(first)], real[np.sort(second)]
    _check("real pictures", len(real))
    _check("other real pictures", len(other))
    (features_real, _), (features_other, _) = outputs = extracted(extractor, real), extracted(extractor, other)
    features_all, probabilities_all = (np.concatenate(parts) for parts in zip(*outputs, strict=True))

    def both(features: np.ndarray, probabilities: np.ndarray, equal: np.ndarray) -> dict[str, float]:
        """What is measured of fakes and of real ones alike."""
        found: dict[str, float] = {}
        found["precision"], found["recall"] = precision_and_recall(features, equal)
        found["density"], found["coverage"] = density_and_coverage(features, equal)
        if probabilities.shape[1] > 1:
            found["inception_score"] = inception_score(probabilities)[0]
        return found

    @cache
    def floors(count: int) -> dict[str, float]:
        splits = []
        for split in range(SPLITS):
            order = np.random.default_rng((seed, split)).permutation(len(features_all))
            fakes, rest = order[:count], order[count:][: len(features_real)]
            features, reference = features_all[fakes], features_all[rest]
            found = both(features, probabilities_all[fakes], reference[:count])
            values = {f"{name}_real": value for name, value in found.items()}
            values["fid_floor"] = frechet(features, reference)
            values["kid_floor"] = kernel_distance(features, reference).value
            splits.append(values)
        return {name: float(np.mean([values[name] for values in splits])) for name in splits[0]}

    def evaluate(fakes: UInt8[np.ndarray, "fakes _ _ _"]) -> dict[str, Array]:
        _check("fakes", len(fakes))
        count = min(len(fakes), len(features_other), len(features_real))
        features, probabilities = extracted(extractor, _some(fakes, count, np.random.default_rng(seed)))
        equal = _some(features_real, count, np.random.default_rng(seed))
        fid, kid = frechet_interval(features, features_real, halves), kernel_distance(features, features_real)
        found = {"fid": fid.value, "fid_low": fid.low, "fid_high": fid.high}
        if count // 2 > features.shape[1]:
            found["fid_infinity"] = fid.infinity
        found |= {"kid": kid.value, "kid_error": kid.error} | both(features, probabilities, equal)
        test = two_sample(features, equal)
        found |= {"c2st": test.accuracy, "c2st_p": test.p_value}
        found |= {"c2st_fakes": test.of_fakes, "c2st_real": test.of_real}
        found["copying"] = copying(features, features_other, features_real)
        found |= floors(count)
        return {f"{prefix}/{name}[{extractor.name}]": jnp.float32(value) for name, value in found.items()}

    return evaluate


def _check(what: str, count: int) -> None:
    if count < LEAST:
        raise ConfigError(f"{count} {what} are too few for metrics of generated pictures; {LEAST} is the least.")
