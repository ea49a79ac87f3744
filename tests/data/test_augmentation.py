"""Each change of a batch against its definition on single pictures, drawn often enough to see every case."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.data.augmentation import cutmix, mixup, random_crop, random_flip

KEY = jax.random.key(0)


def test_a_crop_is_each_move_alike_often():
    """By slices of a padded picture: of 25 moves each comes about 4,000 / 25 = 160 times, its own for each picture."""
    picture = np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1)
    padded = np.full((7, 8, 1), -5, np.float32)
    padded[2:5, 2:6] = picture
    found = np.asarray(jax.jit(partial(random_crop, padding=2, fill=-5.0))(KEY, np.stack([picture] * 4000)))
    moves = [(found == padded[y : y + 3, x : x + 4]).all((1, 2, 3)) for y in range(5) for x in range(5)]
    counts = np.sum(moves, axis=1)
    assert np.array_equal(np.sum(moves, axis=0), np.ones(4000))
    assert counts.min() > 110 and counts.max() < 215


def test_a_crop_keeps_the_type_and_without_padding_all():
    pictures = jax.random.randint(KEY, (5, 4, 6, 3), 0, 256).astype(jnp.uint8)
    found = jax.jit(partial(random_crop, padding=0))(KEY, pictures)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, pictures)


def test_half_of_the_pictures_are_mirrored():
    pictures = np.random.default_rng(0).normal(size=(1000, 2, 3, 2)).astype(np.float32)
    found = np.asarray(jax.jit(random_flip)(KEY, pictures))
    mirrored = [np.array_equal(one, picture[:, ::-1]) for one, picture in zip(found, pictures)]
    same = [np.array_equal(one, picture) for one, picture in zip(found, pictures)]
    assert sum(mirrored) + sum(same) == 1000 and 440 < sum(mirrored) < 560


def test_mixup_by_hand():
    """Picture i is i all over and of class i: whatever pairs are mixed, the picture tells the target's mean class.

    A share ~ Beta(a, a) has the variance 1 / (4 (2 a + 1)); the pictures that meet themselves are left out.
    """
    count, alpha = 400, 0.3
    pictures = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, 2, 3, 1))
    mixed, targets = (
        np.asarray(part, np.float64) for part in jax.jit(partial(mixup, alpha=alpha))(KEY, pictures, jnp.eye(count))
    )
    np.testing.assert_allclose(
        mixed, np.broadcast_to((targets @ np.arange(count))[:, None, None, None], mixed.shape), rtol=1e-4
    )
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    own = np.diag(targets)
    assert ((targets > 0).sum(1) <= 2).all() and np.unique(own.round(5)).size > 200  # a share for each pair
    partners = (targets - np.diag(own)).argmax(1)[own < 1 - 1e-6]
    assert np.unique(partners).size == partners.size  # a permutation
    assert abs(own.mean() - 0.5) < 0.06 and abs(own.var() - 1 / (4 * (2 * alpha + 1))) < 0.02


def test_cutmix_by_hand():
    """Of picture i, the pixels that are j form a rectangle, and the target's share of j is theirs.

    With a large alpha lambda is 1/2, and boxes that are not cut off at the edge have sides of 0.707 of the picture's:
    28.3 of 40 rows and 14.1 of 20 columns.
    """
    count, height, width = 200, 40, 20
    pictures = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, height, width, 1))
    mixed, targets = (np.asarray(part) for part in jax.jit(partial(cutmix, alpha=1e5))(KEY, pictures, jnp.eye(count)))
    rows, columns = [], []
    for number, (picture, target) in enumerate(zip(mixed[..., 0], targets)):
        inside = picture != number
        if not inside.any():
            continue
        (other,) = np.unique(picture[inside])
        down, across = inside.any(1), inside.any(0)
        np.testing.assert_array_equal(inside, np.outer(down, across))
        assert (np.diff(np.flatnonzero(down)) == 1).all() and (np.diff(np.flatnonzero(across)) == 1).all()
        assert target[int(other)] == pytest.approx(inside.mean(), abs=1e-6)
        assert target[number] == pytest.approx(1 - inside.mean(), abs=1e-6)
        rows.append(down.sum())
        columns.append(across.sum())
    assert len(rows) > 190 and max(rows) in (28, 29) and max(columns) in (14, 15) and min(rows) < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda key, x, y: random_crop(key, x, 2),
        lambda key, x, y: random_flip(key, x),
        lambda key, x, y: mixup(key, x, y, 0.5),
        lambda key, x, y: cutmix(key, x, y, 0.5),
    ],
)
def test_the_key_decides(change):
    x, y = jax.random.normal(KEY, (16, 6, 6, 1)), jax.nn.one_hot(jnp.arange(16) % 4, 4)
    change = jax.jit(change)
    one, again, other = (np.asarray(jax.tree.leaves(change(jax.random.key(n), x, y))[0]) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other) and not np.array_equal(one, x)
