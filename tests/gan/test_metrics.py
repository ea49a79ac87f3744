"""Metrics of generated pictures against closed forms and their definitions in plain numpy."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

from jaxarch.gan import features, metrics
from jaxarch.run.protocol import ConfigError


def gaussian(count, dim, seed, shift=0.0, scale=1.0):
    return np.random.default_rng(seed).normal(shift, scale, (count, dim)).astype(np.float32)


def all_distances(x, y):
    """By the definition, one difference at a time."""
    return np.array([[math.dist(one, other) for other in y.tolist()] for one in x.tolist()])


def radii(centres, neighbours):
    return np.sort(all_distances(centres, centres), axis=1)[:, neighbours]  # 0 is the distance to itself


# --- Frechet distance ---------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_with_common_axes_by_hand():
    """|m - m'|^2 + sum (s - s')^2 where both covariances are diagonal in one basis: 9 + 1 + 4."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    one, other = (turn @ np.diag(np.square(deviations)) @ turn.T for deviations in ([1.0, 2.0, 5.0], [2.0, 0.0, 5.0]))
    found = metrics.frechet_distance(np.zeros(3), one, np.array([0.0, 3.0, 0.0]), other)
    np.testing.assert_allclose(found, 14, rtol=1e-12)


def test_frechet_distance_of_any_gaussians_is_that_by_the_matrix_root():
    rng = np.random.default_rng(1)
    one, other = (np.cov(rng.normal(size=(9, 9)) @ rng.normal(size=(9, 40))) for _ in range(2))
    mean, other_mean = rng.normal(size=(2, 9))
    expected = np.sum((mean - other_mean) ** 2) + np.trace(one + other - 2 * sqrtm(one @ other).real)
    np.testing.assert_allclose(metrics.frechet_distance(mean, one, other_mean, other), expected, rtol=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Along one axis each, at an angle: (C C')^1/2 has the trace |s s' cos|. And of a set with itself, 0."""
    x, y = np.array([3.0, 0, 0]), np.array([2.0 * math.cos(1), 2.0 * math.sin(1), 0])
    found = metrics.frechet_distance(np.zeros(3), np.outer(x, x), np.zeros(3), np.outer(y, y))
    np.testing.assert_allclose(found, 9 + 4 - 2 * 6 * math.cos(1), rtol=1e-12)
    few = gaussian(10, 50, 0)
    assert metrics.frechet(few, few) < 1e-9
    collapsed = np.repeat(few[:1], 20, axis=0)
    mean, variance = few.mean(axis=0, dtype=float), few.var(axis=0, ddof=1, dtype=float)
    np.testing.assert_allclose(metrics.frechet(collapsed, few), np.sum((few[0] - mean) ** 2) + variance.sum(), 1e-6)


@pytest.mark.parametrize("counts", [(30, 40), (5, 40), (30, 7), (5, 7)])
def test_frechet_distance_of_samples_is_that_of_their_moments(counts):
    """Fewer samples than features, or more, on either side."""
    sets = [gaussian(count, 12, seed, seed / 3, 1 + seed).astype(float) for seed, count in enumerate(counts)]
    moments = [part for one in sets for part in (one.mean(axis=0), np.cov(one, rowvar=False))]
    np.testing.assert_allclose(metrics.frechet(*sets), metrics.frechet_distance(*moments), rtol=1e-7)


def test_frechet_interval_holds_the_mean_and_the_bias_is_gone():
    """64 features of 250 samples, moved by 1 and 1.1 times as wide: 1 + 64 * 0.01 = 1.64 for infinitely many."""
    found = []
    for seed in range(30):
        fakes, real = gaussian(250, 64, 2 * seed, scale=1.1), gaussian(250, 64, 2 * seed + 1)
        fakes[:, 0] += 1
        found.append(metrics.frechet_interval(fakes, real, halves=10, seed=seed))
    value, low, high, infinity = np.array(found).T
    truth, error = 1.64, infinity.std() / 30**0.5
    assert value.mean() > 5 * truth  # what is being corrected
    assert abs(infinity.mean() - truth) < 3 * error < 0.25 * truth
    held = np.mean((low < value.mean()) & (value.mean() < high))
    assert 0.85 <= held <= 1 and 0.6 < np.mean(high - low) / (2 * 1.96 * value.std()) < 1.7


# --- kernel distance ----------------------------------------------------------------------------


def test_maximum_mean_discrepancy_is_its_definition():
    x, y = gaussian(5, 3, 0).astype(float), gaussian(4, 3, 1, 0.5).astype(float)

    def kernel(a, b):
        return (np.dot(a, b) / 3 + 1) ** 3

    expected = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    expected += np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    np.testing.assert_allclose(metrics.maximum_mean_discrepancy(x, y), expected, rtol=1e-12)


def test_kernel_distance_is_unbiased_and_its_error_true():
    """Near 0, on average, for equal distributions however few; and a closed form in one dimension.

    E (x y + 1)^3 of independent x and y is 1 + 3 m m' + 3 s s' + t t' in their first three moments: for N(0, 1) and
    N(1, 1) these are 0, 1, 0 and 1, 2, 4, so the distance is (1 - 0)^2 * 3 + 3 * (2 - 1)^2 + (4 - 0)^2 = 22.
    """
    found = [metrics.kernel_distance(gaussian(40, 8, 2 * i), gaussian(60, 8, 2 * i + 1), subsets=10) for i in range(60)]
    same = np.array(found)[:, 0]
    assert abs(same.mean()) < 3 * same.std() / 60**0.5 < 0.05
    found = [estimate_of_moved(i, subsets=20) for i in range(50)]
    value, error = np.array(found).T
    assert abs(value.mean() - 22) < 3 * value.std() / 50**0.5 < 4
    assert 0.7 < error.mean() / value.std() < 1.4


def estimate_of_moved(seed, **options):
    return metrics.kernel_distance(gaussian(200, 1, 2 * seed, 1.0), gaussian(200, 1, 2 * seed + 1), **options)


def test_small_subsets_estimate_the_error_of_all_samples():
    """A tenth of the samples a subset: one of them varies by more than three times what the estimate does."""
    value, error = np.array([estimate_of_moved(i, subsets=40, size=20) for i in range(30)]).T
    assert 0.6 < error.mean() / value.std() < 1.7


# --- Inception score ----------------------------------------------------------------------------


def test_inception_score_by_hand():
    sure = np.eye(4, dtype=np.float32)[np.arange(400) % 4]
    np.testing.assert_allclose(metrics.inception_score(sure, splits=1), (4, 0), atol=1e-12)
    assert metrics.inception_score(np.full((50, 4), 0.25)) == (1, 0)
    one, two = np.array([0.9, 0.1]), np.array([0.3, 0.7])  # the mean is 0.6, 0.4
    terms = [p * math.log(p / m) for row in (one, two) for p, m in zip(row, (0.6, 0.4))]
    found = metrics.inception_score(np.stack([one, two]), splits=1)
    np.testing.assert_allclose(found[0], math.exp(sum(terms) / 2), rtol=1e-12)


def test_inception_score_of_fakes_sorted_by_class():
    """Ten splits in the given order would each have one class, and a score of 1."""
    score, deviation = metrics.inception_score(np.repeat(np.eye(4), 250, axis=0), splits=10)
    assert 3.8 < score <= 4 and 0 < deviation < 0.2


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_nearest_is_its_definition_in_blocks_of_any_size(block):
    queries, references = gaussian(23, 4, 0, 50.0), gaussian(31, 4, 1, 50.0)
    expected = all_distances(queries, references)
    places, distances = metrics.nearest(queries, references, 3, block=block)
    np.testing.assert_array_equal(places, np.argsort(expected, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :3], rtol=1e-6)
    places, distances = metrics.nearest(queries, queries, 22, themselves=True, block=block)
    np.testing.assert_array_equal(places, np.argsort(all_distances(queries, queries), axis=1)[:, 1:])
    with pytest.raises(ConfigError, match="23 samples have no 23 neighbours"):
        metrics.nearest(queries, queries, 23, themselves=True)


def test_a_copy_is_at_no_distance():
    """Far from 0, where |x|^2 + |y|^2 - 2 x . y in float32 would be wrong by 1."""
    real = gaussian(50, 8, 0, 1000.0)
    places, distances = metrics.nearest(real[[7, 3]], real, 1)
    assert places.tolist() == [[7], [3]] and distances.max() == 0


@pytest.mark.parametrize("block", [50, 10**6])
def test_balls_are_their_definition(block):
    points, centres = gaussian(30, 3, 0, 0.5), gaussian(40, 3, 1)
    inside = all_distances(points, centres) <= radii(centres, 4)
    found = metrics.in_balls(points, centres, 4, block=block)
    np.testing.assert_array_equal(found.holding, inside.sum(axis=1))
    np.testing.assert_array_equal(found.hit, inside.any(axis=0))


def test_copies_are_in_the_balls_of_their_neighbours():
    """Each real one is a neighbour of others as often as others are its own: density 1 + 1 / k, with the own ball."""
    real = gaussian(60, 5, 0, 30.0)
    assert metrics.density_and_coverage(real, real, 4) == (1.25, 1)


def test_precision_recall_density_and_coverage_by_hand():
    """Two neighbours. Real 0, 1, 2, 10 reach 2, 1, 2, 9; fakes 0.5, 1.5, 20, 23 reach 19.5, 18.5, 18.5, 21.5.

    Fake 0.5 lies in the balls of 0, 1, 2, not of 10; 1.5 in all; 20 and 23 in none. Real 0 to 10 lie in fakes' balls.
    """
    real, fakes = (np.array(values)[:, None] for values in ([0.0, 1, 2, 10], [0.5, 1.5, 20, 23]))
    assert metrics.precision_and_recall(fakes, real, 2) == (0.5, 1)
    assert metrics.density_and_coverage(fakes, real, 2) == ((3 + 4) / 4 / 2, 1)
    assert metrics.density_and_coverage(fakes[:1], real, 2) == (3 / 2, 0.75)
    assert metrics.precision_and_recall(real, fakes, 2) == (1, 0.5)


def test_coverage_and_density_of_equal_distributions_are_those_of_the_paper():
    """Naeem et al. 2020, eq. 8: 1 - (n - 1) ... (n - k) / ((2n - 1) ... (2n - k)); density 1."""
    n, k = 100, 5
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    pairs = [(gaussian(n, 4, 2 * i), gaussian(n, 4, 2 * i + 1)) for i in range(40)]
    density, coverage = np.array([metrics.density_and_coverage(*pair, k) for pair in pairs]).T
    assert abs(coverage.mean() - expected) < 3 * coverage.std() / 40**0.5 < 0.02
    assert abs(density.mean() - 1) < 3 * density.std() / 40**0.5 < 0.06


# --- two samples --------------------------------------------------------------------------------


def test_two_sample_by_hand():
    """The nearest others of 0, 1, 5 (fakes) and 1.4, 5.1, 9 are 1, 1.4, 5.1, 1, 5, 5.1; right for 0 and 9."""
    fakes, real = np.array([[0.0], [1], [5]]), np.array([[1.4], [5.1], [9]])
    found = metrics.two_sample(fakes, real)
    assert (found.accuracy, found.of_fakes, found.of_real) == (2 / 6, 1 / 3, 1 / 3)
    found = metrics.two_sample(fakes[:2], np.array([[2.5], [9.0]]))
    assert (found.accuracy, found.of_fakes, found.of_real) == (0.75, 1, 0.5)


def test_two_sample_p_values():
    """Uniform where the sets are alike, small where they are not, 1 for copies, whose accuracy is 0."""
    alike = [metrics.two_sample(gaussian(40, 3, 2 * i), gaussian(40, 3, 2 * i + 1), 99) for i in range(100)]
    accuracy, p_value, *_ = np.array(alike).T
    assert abs(accuracy.mean() - 0.5) < 0.03 and np.mean(p_value <= 0.1) < 0.2 < np.mean(p_value <= 0.5) < 0.65
    assert metrics.two_sample(gaussian(40, 3, 0, 2.0), gaussian(40, 3, 1), 99).p_value == 0.01
    assert metrics.two_sample(gaussian(40, 3, 0), gaussian(40, 3, 0), 99) == (0, 1, 0, 0)


def test_copying():
    training, unseen = gaussian(300, 3, 0), gaussian(200, 3, 1)
    copies = training[:100] + gaussian(100, 3, 2, scale=0.01)
    assert metrics.copying(copies, unseen, training) > 0.95
    assert abs(metrics.copying(gaussian(200, 3, 3), unseen, training) - 0.5) < 0.1
    assert metrics.copying(gaussian(100, 3, 4, 5.0), unseen, training) < 0.05
    fakes, others = np.array([[0.1], [1.0]]), np.array([[2.0], [0.2]])  # 0.1 is nearer than both, 1 than one
    assert metrics.copying(fakes, others, np.zeros((1, 1))) == 0.75
    assert metrics.copying(training[:10], training[10:30], training) == 0.5  # all as near


# --- pictures -----------------------------------------------------------------------------------

DIM = 6


def shapes(count, seed, modes=8):
    """Pictures of 8 x 8: each mode is a bright column, on a random grey."""
    rng = np.random.default_rng(seed)
    pictures = rng.normal(60, 15, (count, 8, 8, 1))
    pictures[np.arange(count), :, rng.integers(0, modes, count)] += 120
    return np.clip(pictures, 0, 255).astype(np.uint8)


def shapes_of(mode, count, seed):
    return np.roll(shapes(count, 100 * seed + mode, 1), mode, axis=2)


@pytest.fixture(scope="module")
def extractor():
    return features.pixels(8, 1)


@pytest.fixture(scope="module")
def evaluate(extractor):
    """The same pictures are measured once."""
    measure, known = metrics.make_evaluate(extractor, shapes(300, 0), shapes(300, 1)), {}

    def evaluate(pictures):
        key = pictures.tobytes()
        return known[key] if key in known else known.setdefault(key, measure(pictures))

    return evaluate


def found(evaluate, pictures):
    return {name.removeprefix("val/").removesuffix("[pixels]"): float(v) for name, v in evaluate(pictures).items()}


def noisy(pictures, amount):
    noise = np.random.default_rng(5).normal(0, amount, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def blurred(pictures, amount):
    mean = (np.roll(pictures, 1, 2).astype(float) + np.roll(pictures, -1, 2)) / 2
    return ((1 - amount) * pictures + amount * mean).astype(np.uint8)


def test_names(evaluate):
    names = {
        *("fid", "fid_low", "fid_high", "fid_infinity", "fid_floor", "kid", "kid_error", "kid_floor"),
        *("precision", "recall", "density", "coverage", "c2st", "c2st_p", "c2st_fakes", "c2st_real", "copying"),
        *("precision_real", "recall_real", "density_real", "coverage_real"),
    }
    assert set(evaluate(shapes(300, 2))) == {f"val/{name}[pixels]" for name in names}
    assert "val/fid_infinity[pixels]" not in evaluate(shapes(100, 2))  # halves of 50 for 64 features


def test_real_pictures_in_the_place_of_fakes_are_at_the_floor(evaluate):
    real = found(evaluate, shapes(300, 2))
    assert 0.8 < real["fid"] / real["fid_floor"] < 1.2 and real["fid_low"] < real["fid_floor"] < real["fid_high"]
    assert abs(real["fid_infinity"]) < 0.3 * real["fid"] and abs(real["kid"]) < 4 * real["kid_error"]
    for name in ("precision", "recall", "density", "coverage"):
        assert abs(real[name] - real[f"{name}_real"]) < 0.1
    assert real["c2st_p"] > 0.01 and abs(real["copying"] - 0.5) < 0.1


def test_the_floor_is_that_of_chance(extractor):
    """Two parts with equally many of each mode are more alike than independent ones, which fakes would be."""
    real, other = (np.concatenate([shapes_of(mode, 40, seed) for mode in range(8)]) for seed in (0, 1))
    found = metrics.evaluate(extractor, other, real, other)
    assert found["val/fid[pixels]"] < 0.9 * found["val/fid_floor[pixels]"]


def test_the_floor_is_of_as_many_pictures(evaluate):
    many, few = found(evaluate, shapes(300, 2)), found(evaluate, shapes(60, 2))
    assert few["fid"] > 1.5 * many["fid"] and 0.8 < few["fid"] / few["fid_floor"] < 1.2


@pytest.mark.parametrize("corrupt, amounts", [(noisy, (0, 20, 40, 80)), (blurred, (0, 0.3, 0.4, 0.5))])
def test_growing_corruption_is_seen(evaluate, corrupt, amounts):
    each = [found(evaluate, corrupt(shapes(300, 2), amount)) for amount in amounts]
    for name in ("fid", "kid"):
        values = [one[name] for one in each]
        assert all(np.diff(values) > 0) and values[-1] > 1.5 * values[0]
    for name in ("precision", "density") if corrupt is noisy else ("recall", "coverage"):
        assert all(np.diff([one[name] for one in each]) <= 0) and each[-1][name] < 0.5 * each[0][name]
    # Noise far around: neighbours of all are real. Blurred columns are the likest to one another.
    assert each[-1]["c2st_real"] > 0.9 and (
        each[-1]["c2st_fakes"] < 0.1 if corrupt is noisy else each[-1]["c2st_p"] < 0.01
    )


def test_dropped_modes_are_found_by_recall_and_coverage_alone(evaluate):
    """Four of eight columns: half of the real pictures are out of reach; two: three quarters."""
    full, half, quarter = (found(evaluate, shapes(300, 2, modes)) for modes in (8, 4, 2))
    for name in ("recall", "coverage"):
        assert abs(half[name] - 0.5 * full[name]) < 0.1 and abs(quarter[name] - 0.25 * full[name]) < 0.1
    assert full["fid"] < half["fid"] < quarter["fid"] and full["kid"] < half["kid"] < quarter["kid"]
    assert min(half["precision"], quarter["precision"]) > full["precision"] - 0.1


def test_nearest_pictures_and_copies(evaluate, extractor):
    training = shapes(300, 0)
    places, distances = metrics.nearest_pictures(extractor, noisy(training[[5, 17]], 3), training, 2)
    assert places[:, 0].tolist() == [5, 17] and (distances[:, 0] < 0.5 * distances[:, 1]).all()
    copied = found(evaluate, training[::-1])
    assert copied["copying"] == 1 and copied["c2st"] < 0.1 and copied["fid"] < 0.1 * copied["fid_floor"]


def test_half_of_the_real_pictures_stand_in_where_there_are_no_others(extractor):
    alone = metrics.evaluate(extractor, shapes(200, 2), shapes(400, 0))
    pair = metrics.evaluate(extractor, shapes(200, 2), shapes(200, 0), shapes(200, 1))
    assert 0.8 < alone["val/fid_floor[pixels]"] / pair["val/fid_floor[pixels]"] < 1.2


def test_too_few_pictures(extractor):
    with pytest.raises(ConfigError, match="11 fakes are too few"):
        metrics.evaluate(extractor, shapes(11, 0), shapes(30, 0))
    with pytest.raises(ConfigError, match="10 real pictures are too few"):
        metrics.evaluate(extractor, shapes(12, 0), shapes(20, 0))


def test_sorted_fakes_are_cut_at_random(extractor):
    """Twice as many as are compared, mode by mode: the first half would lack half of the modes."""
    rows = np.argsort(shapes(600, 2).sum(axis=(1, 3)).argmax(axis=1), kind="stable")
    some = metrics.evaluate(extractor, shapes(600, 2)[rows], shapes(300, 0), shapes(300, 1))
    assert some["val/recall[pixels]"] > 0.8 * some["val/recall_real[pixels]"]


def test_the_score_is_left_to_extractors_with_classes():
    def apply(batch):
        bright = batch.astype(jnp.float32).mean(axis=(1, 3))
        return bright, (bright == bright.max(axis=1, keepdims=True)).astype(jnp.float32)

    sure = features.Extractor("columns", 8, 1, apply)
    values = metrics.evaluate(sure, shapes(300, 2, 4), shapes(300, 0), shapes(300, 1))
    np.testing.assert_allclose(values["val/inception_score[columns]"], 4, atol=0.3)
    np.testing.assert_allclose(values["val/inception_score_real[columns]"], 7.1, atol=0.5)  # of splits of 30
