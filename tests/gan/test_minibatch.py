"""Minibatch deviation by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.minibatch import minibatch_deviation


def by_hand(x, group, maps):
    """Of each group, its samples batch / group apart, and of each part of the features: a mean of deviations."""
    batch, _, _, features = x.shape
    values = np.zeros((batch, maps))
    apart = batch // group
    for first in range(apart):
        members = [first + apart * n for n in range(group)]
        for part in range(maps):
            few = x[members][..., part * features // maps : (part + 1) * features // maps]
            values[members, part] = np.sqrt(few.var(axis=0) + 1e-8).mean()
    return values


@pytest.mark.parametrize(("batch", "asked", "group"), [(8, 4, 4), (6, 4, 3), (5, 4, 1), (2, 4, 2)])
def test_against_the_definition(batch, asked, group, maps=2):
    """The group is the largest that divides the batch."""
    x = np.random.default_rng(0).normal(size=(batch, 2, 3, 4)).astype(np.float32)
    y = minibatch_deviation(jnp.asarray(x), asked, maps)
    np.testing.assert_array_equal(y[..., :4], x)
    expected = np.broadcast_to(by_hand(x, group, maps)[:, None, None], (batch, 2, 3, maps))
    np.testing.assert_allclose(y[..., 4:], expected, rtol=1e-5)


def test_equal_pictures_are_seen():
    alike = minibatch_deviation(jnp.ones((4, 1, 1, 2)))[..., 2]
    np.testing.assert_allclose(alike, np.full((4, 1, 1), 1e-4), rtol=1e-5)
