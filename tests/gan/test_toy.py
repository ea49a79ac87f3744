"""Laws of counted modes: the mixture itself has all of them, at the ceiling; what is lost is seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.toy import CEILING, Mixture, grid, modes_of, reverse_kl, ring


@pytest.mark.parametrize("mixture, modes", [(ring(), 8), (grid(), 25)])
def test_the_mixture_has_its_modes(mixture, modes):
    samples = mixture.samples(jax.random.key(0), 20_000)
    found = modes_of(samples, mixture)
    assert found.found == modes
    np.testing.assert_allclose(found.high_quality, CEILING, atol=0.003)
    np.testing.assert_allclose(found.reverse_kl, (modes - 1) / 2 / 20_000, atol=1e-3)  # of a uniform sample
    np.testing.assert_allclose(CEILING, 0.9889, atol=1e-4)


def test_where_the_modes_lie():
    np.testing.assert_allclose(np.linalg.norm(ring().centres, axis=1), 1)
    assert sorted({float(x) for x in grid().centres[:, 0]}) == [-1, -0.5, 0, 0.5, 1]
    assert grid().scale / 0.5 == 0.05 / 2
    assert len({tuple(centre) for centre in grid().centres}) == 25


def test_samples_between_and_beyond_are_of_low_quality():
    mixture = Mixture(np.array([[0.0, 0.0], [1.0, 0.0]]), 0.1)
    samples = jnp.array([[0.29, 0.0], [0.31, 0.0], [1.0, 0.29], [0.5, 0.0], [9.0, 9.0]])
    found = modes_of(samples, mixture)
    assert found.found == 2
    np.testing.assert_allclose(found.high_quality, 2 / 5)
    assert found.reverse_kl == 0


def test_one_mode_alone_and_none():
    mixture = ring()
    alone = modes_of(jnp.tile(jnp.asarray(mixture.centres[3], jnp.float32), (10, 1)), mixture)
    assert alone.found == 1
    np.testing.assert_allclose(alone.reverse_kl, np.log(8), rtol=1e-6)
    none = modes_of(jnp.full((10, 2), 50.0), mixture)
    assert (none.found, none.high_quality) == (0, 0)
    np.testing.assert_allclose(none.reverse_kl, np.log(8), rtol=1e-6)


def test_reverse_kl_is_the_sum():
    counts = np.array([5.0, 3.0, 2.0, 0.0])
    shares = counts[:3] / 10
    np.testing.assert_allclose(reverse_kl(jnp.asarray(counts)), np.sum(shares * np.log(shares / 0.25)), rtol=1e-6)
