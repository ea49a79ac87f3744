from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.transformer.positions import rotary, sinusoidal

RNG = np.random.default_rng(0)


def test_sinusoidal_equals_the_definition():
    """PE(pos, 2i) = sin(pos / base^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    positions = np.array([[0, 1, 7], [2, 2, 300]])
    expected = np.zeros((2, 3, 6))
    for b, t, i in np.ndindex(2, 3, 3):
        angle = positions[b, t] / 50.0 ** (2 * i / 6)
        expected[b, t, 2 * i], expected[b, t, 2 * i + 1] = np.sin(angle), np.cos(angle)
    np.testing.assert_allclose(sinusoidal(jnp.asarray(positions), 6, 50.0), expected, atol=1e-5)


def test_a_rotation_by_hand():
    """Four features, base 100: the pairs (0, 2) and (1, 3) turn by 1 and by 1/10 at each position."""
    x = jnp.asarray([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], jnp.float32)[None, :, None]
    turned = rotary(x, jnp.array([[1, 1, 2, 2]]), base=100.0)[0, :, 0]
    c, s = np.cos, np.sin
    expected = [[c(1), 0, s(1), 0], [0, c(0.1), 0, s(0.1)], [-s(2), 0, c(2), 0], [0, -s(0.2), 0, c(0.2)]]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def products(shift_q, shift_k):
    q, k = (jnp.asarray(np.random.default_rng(n).normal(size=(1, 6, 2, 8)), jnp.float32) for n in (1, 2))
    positions = jnp.arange(6)[None]
    q, k = rotary(q, positions + shift_q), rotary(k, positions + shift_k)
    return np.einsum("bthd,bshd->bhts", q, k)


@pytest.mark.parametrize("shift", [1, 37, -5])
def test_only_distances_matter(shift):
    np.testing.assert_allclose(products(shift, shift), products(0, 0), atol=2e-5)
    assert np.abs(products(shift, 0) - products(0, 0)).max() > 0.1, "and they do"


def test_turning_keeps_lengths_and_the_type():
    x = jnp.asarray(RNG.normal(size=(2, 3, 2, 8)), jnp.bfloat16)
    turned = rotary(x, jnp.array([[0, 5, 1000]]))
    assert turned.dtype == jnp.bfloat16
    norms = [np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (turned, x)]
    np.testing.assert_allclose(*norms, rtol=0.01)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
