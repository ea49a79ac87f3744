"""The controller against its definition, and differentiable augmentation against its own, picture by picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxarch.gan.augmentation import (
    AugmentationState,
    DiffAugmentConfig,
    adapt,
    diff_augment,
    initial,
    random_color,
    random_cutout,
    random_translation,
)
from jaxarch.run import ConfigError

# --- the controller -----------------------------------------------------------------------------


def test_the_probability_follows_the_definition():
    """Steps of 3 pictures with logits of either sign and of 0, written out in plain numbers."""
    rng = np.random.default_rng(0)
    logits = rng.choice([-2.0, -0.1, 0.0, 0.3, 5.0], p=[0.1, 0.1, 0.1, 0.2, 0.5], size=(60, 3)).astype(np.float32)
    step = jax.jit(lambda state, logits, index: adapt(state, logits, index, target=0.4, interval=5, thousands=0.06))
    state, probability, signs = initial(0.3), 0.3, []
    seen = set()
    for index, row in enumerate(logits):
        state = step(state, row, index)
        signs += list(np.sign(row))
        if index % 5 == 4:
            before, probability = probability, min(max(probability + 3 * 5 / 60 * np.sign(np.mean(signs) - 0.4), 0), 1)
            seen.add(np.sign(probability - before))
            signs = []
        np.testing.assert_allclose(state, (probability, sum(signs), len(signs)), rtol=1e-5, atol=1e-6)
    assert {-1, 1} <= seen


@pytest.mark.parametrize(("logit", "start", "end"), [(1.0, 0.0, 1.0), (-1.0, 1.0, 0.0)])
def test_the_probability_rises_and_falls_between_0_and_1(logit, start, end):
    """By 64 * 4 / 500,000 each 4 steps as by default, so that it takes 500,000 pictures from 0 to 1."""
    logits = jnp.full((64,), logit)
    state = jax.jit(lambda: jax.lax.fori_loop(0, 100, lambda i, s: adapt(s, logits, i), initial(start)))()
    np.testing.assert_allclose(state.probability, start + np.sign(end - start) * 25 * 64 * 4 / 500_000, rtol=1e-4)
    state = jax.jit(lambda: jax.lax.fori_loop(0, 8000, lambda i, s: adapt(s, logits, i), initial(start)))()
    assert state.probability == end


def test_a_mean_sign_below_the_target_is_no_overfitting():
    """3 of 4 logits above 0 have the mean sign 0.5, 5 of 6 have 0.67: by patches as by pictures."""
    for shape, negatives, direction in [((4,), 1, -1), ((6,), 1, 1), ((1, 2, 2), 1, -1), ((2, 3, 1), 1, 1)]:
        logits = np.ones(shape, np.float32)
        logits.flat[:negatives] = -1
        state = adapt(initial(0.5), jnp.asarray(logits), jnp.int32(3), batch_size=10)
        np.testing.assert_allclose(state.probability, 0.5 + direction * 40 / 500_000, rtol=1e-6)


def test_each_replica_has_its_own_probability():
    state = jax.vmap(lambda p: initial(p))(jnp.array([0.2, 0.8]))
    logits = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    found = jax.jit(jax.vmap(lambda s, x: adapt(s, x, jnp.int32(3), thousands=0.1)))(state, logits)
    assert isinstance(found, AugmentationState)
    np.testing.assert_allclose(found.probability, [0.28, 0.72], rtol=1e-6)


# --- differentiable augmentation ------------------------------------------------------------------

KEY = jax.random.key(0)
MANY = 4000


def test_colour_by_what_it_keeps():
    """The three numbers of a picture are read off it: the mean's shift, the spread about grey and about the mean."""
    picture = np.random.default_rng(0).uniform(-1, 1, (3, 4, 3)).astype(np.float32)
    found = np.asarray(jax.jit(random_color)(KEY, jnp.broadcast_to(picture, (MANY, 3, 4, 3))), np.float64)
    shift = found.mean((1, 2, 3)) - picture.mean()
    grey, own_grey = found.mean(-1), picture.mean(-1)
    contrast = ((grey - grey.mean((1, 2), keepdims=True)) / (own_grey - own_grey.mean()))[:, 0, 0]
    saturation = ((found - grey[..., None]) / (picture - own_grey[..., None]))[:, 0, 0, 0] / contrast
    for number, low, high in ((shift, -0.5, 0.5), (saturation, 0, 2), (contrast, 0.5, 1.5)):
        assert stats.kstest(number, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert np.abs(np.triu(np.corrcoef([shift, saturation, contrast]), 1)).max() < 0.06
    own = own_grey[..., None] + saturation[:, None, None, None] * (picture - own_grey[..., None])  # its mean stays
    expected = picture.mean() + contrast[:, None, None, None] * (own - picture.mean()) + shift[:, None, None, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # A grey picture has no saturation.
    grey = jnp.broadcast_to(picture[..., :1], (2, 3, 4, 1))
    np.testing.assert_allclose(
        jax.jit(random_color)(KEY, grey), jax.jit(random_color)(KEY, grey.repeat(3, -1))[..., :1], atol=1e-6
    )


def test_a_translation_is_each_move_alike_often():
    """Of pictures of 8 x 16 by an eighth: 1 down and 2 across at most, 15 moves, each 4,000 / 15 = 267 times."""
    picture = np.arange(1, 129, dtype=np.float32).reshape(8, 16, 1)
    padded = np.pad(picture, [(1, 1), (2, 2), (0, 0)])
    apply = jax.jit(lambda key, x: random_translation(key, x, 0.125))
    found = np.asarray(apply(KEY, jnp.broadcast_to(picture, (MANY, 8, 16, 1))))
    moves = [(found == padded[y : y + 8, x : x + 16]).all((1, 2, 3)) for y in range(3) for x in range(5)]
    assert np.array_equal(np.sum(moves, 0), np.ones(MANY))
    assert stats.chisquare(np.sum(moves, 1)).pvalue > 1e-3


@pytest.mark.parametrize(("size", "fraction", "hole"), [(6, 0.5, 3), (8, 0.5, 4), (5, 0.4, 2)])
def test_a_hole_is_at_each_place_alike_often(size, fraction, hole):
    """An odd hole's centre on each pixel, an even one's on each border of pixels, both outer ones too."""
    apply = jax.jit(lambda key, x: random_cutout(key, x, fraction))
    found = np.asarray(apply(KEY, jnp.ones((MANY, size, size, 2))))
    assert set(np.unique(found)) == {0, 1} and np.array_equal(found[..., 0], found[..., 1])
    rows, columns = (found[..., 0] == 0).any(2), (found[..., 0] == 0).any(1)
    np.testing.assert_array_equal(found[..., 0] == 0, rows[:, :, None] & columns[:, None, :])
    centres = range(size + 1) if hole % 2 == 0 else range(size)
    lines = [np.isin(np.arange(size), np.arange(centre - hole // 2, centre - hole // 2 + hole)) for centre in centres]
    for axis in (rows, columns):
        counts = [(axis == line).all(1).sum() for line in lines]
        assert sum(counts) == MANY and stats.chisquare(counts).pvalue > 1e-3


def test_all_of_it_with_a_gradient():
    """Linear in the picture but for brightness: directions' products with the gradient are differences. Opacity moves
    with the picture, and keeps its values.
    """
    x, y, along = np.random.default_rng(0).normal(size=(3, 4, 8, 8, 4)).astype(np.float32)
    augment = jax.jit(diff_augment())
    found, pull = jax.vjp(lambda x: augment(KEY, x), jnp.asarray(x))
    difference = augment(KEY, jnp.asarray(x + along)) - found
    np.testing.assert_allclose(np.vdot(pull(jnp.asarray(y))[0], along), np.vdot(y, difference), rtol=1e-3)
    assert np.isin(found[..., 3], [0, *x[..., 3].ravel()]).all() and not np.isin(found[..., 0], x[..., 0]).all()
    for fields in ({"color": False}, {"translation": 0.0}, {"cutout": 0.0}):
        assert not np.allclose(jax.jit(diff_augment(DiffAugmentConfig(**fields)))(KEY, x), found)
    off = diff_augment(DiffAugmentConfig(color=False, translation=0.0, cutout=0.0))
    np.testing.assert_array_equal(off(KEY, jnp.asarray(x), 0.3), x)
    with pytest.raises(ConfigError, match=r"DiffAugment's cutout 1.5 is not in \[0, 1\]; 0 is off."):
        DiffAugmentConfig(cutout=1.5)
