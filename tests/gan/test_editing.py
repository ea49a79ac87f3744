"""Latents and styles: closed forms by hand, directions against their definition, the search against what is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan import editing
from jaxarch.gan.editing import (
    ProjectionConfig,
    correlation,
    directions,
    linear,
    mixed,
    mixing_grid,
    moved,
    projected,
    spherical,
    standardized,
    style_statistics,
    styles_of,
    synthesized,
    through,
)
from jaxarch.gan.stylegan2 import StyleGAN2Config, stylegan2, truncated
from jaxarch.run.protocol import ConfigError

KEY = jax.random.key(0)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def numbered(batch: int, layers: int, dim: int = 2, offset: float = 0.0) -> jax.Array:
    """Style n of layer l holds 10 n + l."""
    values = 10.0 * np.arange(batch)[:, None] + np.arange(layers) + offset
    return jnp.asarray(np.repeat(values[:, :, None], dim, -1), jnp.float32)


def test_mixing_takes_whole_layers():
    found = mixed(numbered(1, 4), numbered(1, 4, offset=100.0), [0, 2])
    np.testing.assert_array_equal(found[0, :, 0], [100, 1, 102, 3])
    grid = mixing_grid(numbered(2, 3), numbered(2, 3, offset=100.0), [1, 2])
    expected = [[[0, 101, 102], [0, 111, 112]], [[10, 101, 102], [10, 111, 112]]]
    np.testing.assert_array_equal(grid[..., 0], expected)


def test_spherical_interpolation_by_hand():
    """A right angle, lengths 1 and 3: in the middle at 45 degrees with length 2; in thirds at 30 and 60 degrees."""
    one, other = jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0])
    np.testing.assert_allclose(spherical(one, other, 0.5), [2**0.5, 2**0.5], rtol=1e-6)
    third = np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)]) * 5 / 3
    np.testing.assert_allclose(spherical(one, other, 1 / 3), third, rtol=1e-6)
    for share, expected in ((0.0, one), (1.0, other)):
        np.testing.assert_allclose(spherical(one, other, share), expected, atol=1e-6)
    np.testing.assert_allclose(spherical(one, 2 * one, 0.5), [1.5, 0], atol=1e-6)  # no angle: a straight line
    close = jnp.array([1.0, 1e-4])
    np.testing.assert_allclose(spherical(one, close, 0.5), [1, 0.5e-4], rtol=1e-5)
    np.testing.assert_allclose(linear(one, other, 0.25), [0.75, 0.75])


def test_a_film_goes_through_its_points_and_back():
    points = jnp.array([[0.0], [4.0], [2.0]])
    np.testing.assert_allclose(through(points, linear, 2)[:, 0], [0, 2, 4, 3, 2, 1])


# --- directions ---------------------------------------------------------------------------------


def affine_maps(*kernels: np.ndarray) -> dict:
    names = ["convs_4_1", "convs_8_0", "convs_8_1", "convs_16_0"]
    params = {name: {"affine": {"kernel": jnp.asarray(k, jnp.float32)}} for name, k in zip(names, kernels)}
    return params | {"to_rgb_4": {"affine": {"kernel": jnp.full((3, 2), 99.0)}}, "constant": jnp.ones(())}


def test_directions_are_eigenvectors_of_the_affine_maps():
    kernels = [drawn(3, width, seed=width) for width in (4, 5, 2, 6)]
    stacked = np.concatenate(kernels, axis=1)
    values, vectors = np.linalg.eigh(stacked @ stacked.T)
    found, sizes = directions(affine_maps(*kernels), 2)
    np.testing.assert_allclose(sizes, values[::-1][:2], rtol=1e-5)
    for one, expected in zip(found, vectors.T[::-1]):
        np.testing.assert_allclose(abs(one @ expected), 1, rtol=1e-5)
    only, _ = directions(affine_maps(*kernels), 9, layers=[3])  # 16_0 comes after 8_1, not before 4_1
    values, vectors = np.linalg.eigh(kernels[3] @ kernels[3].T)
    assert only.shape == (3, 3)
    np.testing.assert_allclose(abs(only[0] @ vectors[:, -1]), 1, rtol=1e-5)
    few, sizes = directions(affine_maps(*kernels), 3, layers=[2])  # of two columns: the third moves nothing
    np.testing.assert_allclose(few @ few.T, np.eye(3), atol=1e-5)
    assert sizes[2] == 0
    np.testing.assert_allclose(few[2] @ kernels[2], 0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"--layers must be of the convolutions 0 to 3\."):
        directions(affine_maps(*kernels), 1, layers=[4])


def test_moving_adds_to_the_chosen_layers():
    found = moved(numbered(1, 3), jnp.array([1.0, 0.0]), -2.0, layers=[1])
    np.testing.assert_array_equal(found[0], [[0, 0], [-1, 1], [2, 2]])
    np.testing.assert_array_equal(moved(numbered(1, 3), jnp.array([1.0, 0.0]), 2.0)[0, :, 0], [2, 3, 4])


# --- the search for styles ----------------------------------------------------------------------


def test_the_correlation_of_noise_is_its_definition():
    noise = drawn(2, 16, 16)
    expected = np.zeros(2)
    coarse = noise.reshape(2, 8, 2, 8, 2).sum((2, 4)) / 2
    for n in range(2):
        for level in (noise[n], coarse[n]):
            down = sum(level[i, j] * level[i - 1, j] for i in range(len(level)) for j in range(len(level)))
            across = sum(level[i, j] * level[i, j - 1] for i in range(len(level)) for j in range(len(level)))
            expected[n] += (down / level.size) ** 2 + (across / level.size) ** 2
    np.testing.assert_allclose(correlation(jnp.asarray(noise[..., None], jnp.float32)), expected, rtol=1e-4)
    found = standardized(jnp.asarray(5 * noise[..., None] + 3, jnp.float32))
    np.testing.assert_allclose([found.mean((1, 2, 3)), found.std((1, 2, 3))], [[0, 0], [1, 1]], atol=1e-5)


CONFIG = StyleGAN2Config(latent_dim=6, style_dim=6, mapping_layers=2, channel_base=64, channel_max=8)
GENERATOR = stylegan2(CONFIG, (8, 8, 1))[0]
LATENTS = jnp.asarray(drawn(6, 6)[[0, 3]], jnp.float32)


@pytest.fixture(scope="module")
def variables():
    keys = dict(zip(("params", "noise"), jax.random.split(KEY), strict=True))
    return jax.jit(GENERATOR.init)(keys, LATENTS)


@pytest.fixture(scope="module")
def search(variables):
    """Of the targets' styles, one each (W) or free in each layer (W+)."""

    def by(free):
        config = ProjectionConfig(steps=200, latents=100, free=free)
        return jax.jit(lambda targets: projected(GENERATOR, variables, targets, KEY, config))

    return {free: by(free) for free in (False, True)}


@pytest.fixture(scope="module")
def known(variables):
    """Styles not far from the mean one: further out a new generator's pictures have more than one valley."""
    mean, _ = style_statistics(GENERATOR, variables, KEY, 100, 2)
    return truncated(styles_of(GENERATOR, variables, LATENTS), mean[0], 0.5)


def test_the_search_finds_a_known_style(variables, search, known):
    """And so its picture, for each of several on its own."""
    found = search[False](synthesized(GENERATOR, variables, known))
    assert found.styles.shape == (200, 2, 4, 6) and found.distances.shape == (200, 2)
    assert np.all(found.distances[0] > 0.05) and np.all(found.distances[-1] < 1e-5)
    np.testing.assert_allclose(found.found, known, atol=0.01)
    shapes = {name: one.shape for name, one in found.noise.items()}
    assert shapes == {"4_1": (2, 4, 4, 1), "8_0": (2, 8, 8, 1), "8_1": (2, 8, 8, 1)}
    for one in found.noise.values():
        np.testing.assert_allclose(np.std(one, axis=(1, 2, 3)), 1, rtol=1e-3)
        assert np.all(correlation(one) < 1e-4)  # of drawn noise a few hundredths


def test_styles_are_shaken_for_three_quarters_of_the_search():
    """Where nothing is learned, distances differ for that reason alone."""
    generator = stylegan2(CONFIG, (4, 4, 1))[0]
    keys = dict(zip(("params", "noise"), jax.random.split(KEY), strict=True))
    variables = jax.jit(generator.init)(keys, LATENTS)
    config = ProjectionConfig(steps=8, latents=20, learning_rate=0.0, regularization=0.0)
    found = jax.jit(lambda x: projected(generator, variables, x, KEY, config))(jnp.zeros((2, 4, 4, 1)))
    assert np.ptp(found.styles, axis=0).max() == 0
    assert np.ptp(found.distances[6:], axis=0).max() < 1e-6 < np.ptp(found.distances[4:], axis=0).min()
    moves = np.abs(np.asarray(found.distances - found.distances[-1])).mean(1)
    assert moves[0] > 3 * moves[5] > 0


def test_a_mixed_picture_asks_for_a_style_in_each_layer(variables, search, known):
    targets = synthesized(GENERATOR, variables, mixed(known, known[::-1], [2, 3]))
    one, free = search[False](targets), search[True](targets)
    assert np.all(np.ptp(one.found, axis=1) == 0) and np.all(np.ptp(free.found, axis=1).max(-1) > 0.1)
    assert np.all(free.distances[-1] < 0.2 * one.distances[-1])


def test_statistics_of_styles(variables):
    mean, deviation = style_statistics(GENERATOR, variables, KEY, 50, 2)
    styles = np.asarray(styles_of(GENERATOR, variables, jax.random.normal(KEY, (50, 6))))[:, 0]
    np.testing.assert_allclose(mean, np.broadcast_to(styles.mean(0), (2, 6)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(deviation, [np.sqrt(styles.var(0).sum())] * 2, rtol=1e-4)


def test_statistics_are_of_each_pictures_own_label():
    generator = stylegan2(CONFIG, (4, 4, 1), classes=3)[0]
    keys, labels = dict(zip(("params", "noise"), jax.random.split(KEY), strict=True)), jnp.array([2, 0])
    variables = jax.jit(generator.init)(keys, LATENTS, labels)
    mean, _ = style_statistics(generator, variables, KEY, 20, 2, labels)
    for row, label in zip(mean, (2, 0)):
        styles = styles_of(generator, variables, jax.random.normal(KEY, (20, 6)), jnp.full(20, label))
        np.testing.assert_allclose(row, styles[:, 0].mean(0), rtol=1e-4, atol=1e-7)


def test_the_schedule_of_the_search():
    """Its rate falls over the last quarter along half a cosine."""
    times = jnp.array([0.0, 0.5, 0.75, 0.875, 1.0])
    np.testing.assert_allclose(editing.ramp_down(times), [1, 1, 1, 0.5, 0], atol=1e-6)


def test_wrong_numbers_are_refused():
    with pytest.raises(ConfigError, match=r"--steps 0 is below 1\."):
        ProjectionConfig(steps=0)
    with pytest.raises(ConfigError, match=r"--spread -1 is not 0 or above\."):
        ProjectionConfig(spread=-1.0)
