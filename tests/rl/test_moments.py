"""Running moments against NumPy's, in one pass and in many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.rl.moments import normalized, nothing_seen, updated

VALUES = np.random.default_rng(0).normal([3.0, -50.0], [0.1, 20.0], (6, 7, 2))


@pytest.mark.parametrize("parts", [1, 2, 6], ids="in {}".format)
def test_moments_are_those_of_all_values(parts):
    """Of parts of one size and, at last, of a single value."""
    with jax.enable_x64(True):
        moments = nothing_seen((2,))
        for part in [*np.split(VALUES, parts), VALUES[0, 0]]:
            moments = updated(moments, jnp.asarray(part))
        every = np.concatenate([VALUES.reshape(-1, 2), VALUES[0, :1]])
        assert moments.count == len(every)
        np.testing.assert_allclose(moments.mean, every.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, every.var(0), rtol=1e-12)
        expected = np.clip((VALUES - every.mean(0)) / every.std(0), -1.5, 1.5)
        np.testing.assert_allclose(normalized(moments, jnp.asarray(VALUES), 1.5), expected, rtol=1e-6)


def test_moments_of_what_has_no_shape_in_float32():
    """Far from zero and of many steps, where a running sum of squares would have no digit left."""
    values = np.random.default_rng(1).normal(1000.0, 0.5, (300, 64)).astype(np.float32)
    moments, _ = jax.lax.scan(lambda moments, some: (updated(moments, some), None), nothing_seen(), jnp.asarray(values))
    exact = values.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, exact.var(), rtol=1e-3)


def test_before_anything_was_seen_nothing_changes():
    values = jnp.array([0.5, -2.0])
    np.testing.assert_allclose(normalized(nothing_seen((2,)), values), values, rtol=1e-6)
