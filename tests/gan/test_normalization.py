"""Batch normalisation and its conditional form against their definitions in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.normalization import BatchNorm, batch_norm, column_sums

KEY = jax.random.key(0)


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def by_hand(x, scale, bias, eps=1e-5):
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    return (x - mean) / np.sqrt(variance + eps) * scale + bias, mean, variance


def shaken(variables):
    """Parameters and statistics of which none is 0 or 1."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten([jnp.asarray(0.5 + np.abs(some(*leaf.shape, seed=n))) for n, leaf in enumerate(leaves)])


def test_column_sums():
    np.testing.assert_array_equal(column_sums(jnp.array([[1.0, 2.0], [3.0, 5.0], [0.5, -1.0]])), [4.5, 6.0])


def test_against_the_definition_with_its_gradients():
    with jax.enable_x64(True):
        x, scale, bias = 3 + 2 * some(4, 3, 2, 5), some(5, seed=1), some(5, seed=2)
        for one, other in zip(batch_norm(*map(jnp.asarray, (x, scale, bias)), 1e-5), by_hand(x, scale, bias)):
            np.testing.assert_allclose(one, other, rtol=1e-12)
        # Along a line through all three, and twice: R1 differentiates a gradient.
        directions = [some(*a.shape, seed=7 + n) for n, a in enumerate((x, scale, bias))]
        weights = some(*x.shape, seed=3)

        def at(t, norm=by_hand):
            return norm(*(a + t * d for a, d in zip((x, scale, bias), directions, strict=True)))[0]

        def value(t):
            return jnp.sum(jnp.asarray(weights) * at(t, lambda *a: batch_norm(*a, 1e-5)) ** 3)

        values = [np.sum(weights * at(t) ** 3) for t in (-2e-3, -1e-3, 0, 1e-3, 2e-3)]
        slope, curvature = np.dot([1, -8, 0, 8, -1], values) / 12e-3, np.dot([-1, 16, -30, 16, -1], values) / 12e-6
        backwards = jax.jit(jax.grad(value))
        np.testing.assert_allclose(backwards(0.0), slope, rtol=1e-7)
        np.testing.assert_allclose(jax.jit(jax.grad(backwards))(0.0), curvature, rtol=1e-5)


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_training_moves_the_statistics_and_evaluation_uses_them(classes):
    layer, x = BatchNorm(classes, decay=0.75), jnp.asarray(some(4, 3, 2, 5), jnp.float32)
    labels = None if not classes else jnp.array([2, 0, 2, 1]) % classes
    variables = shaken(layer.init(KEY, x, labels))
    scale, bias = (np.asarray(variables["params"][name]) for name in ("scale", "bias"))
    if classes:
        scale, bias = scale[labels][:, None, None], bias[labels][:, None, None]
    stats = jax.tree.map(np.asarray, variables["batch_stats"])

    y, moved = layer.apply(variables, x, labels, mutable=["batch_stats"])
    expected, mean, variance = by_hand(np.asarray(x), scale, bias)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    # The variance is the unbiased one, of 24 numbers.
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.75 * stats["mean"] + 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.75 * stats["var"] + 0.25 * variance * 24 / 23, rtol=1e-5)

    y, moved = layer.apply(variables, x, labels, train=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * scale + bias, atol=1e-5)
    for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_class_is_the_plain_form():
    x, labels = jnp.asarray(some(4, 2, 2, 3), jnp.float32), jnp.zeros(4, jnp.int32)
    plain, conditional = BatchNorm(), BatchNorm(1)
    variables = shaken(plain.init(KEY, x))
    tables = jax.tree.map(lambda leaf: leaf[None], variables["params"])
    assert jax.tree.map(jnp.shape, tables) == jax.tree.map(jnp.shape, conditional.init(KEY, x, labels)["params"])

    def value(variables, layer, labels, train):
        return jnp.sum(layer.apply(variables, x, labels, train=train, mutable=["batch_stats"])[0] ** 3)

    for train in (True, False):
        one, grads = jax.value_and_grad(value)(variables, plain, None, train)
        other, tables_grads = jax.value_and_grad(value)({**variables, "params": tables}, conditional, labels, train)
        np.testing.assert_allclose(other, one, rtol=1e-6)
        for name in ("scale", "bias"):
            np.testing.assert_allclose(tables_grads["params"][name][0], grads["params"][name], rtol=1e-4)


def test_the_first_statistics_and_a_batch_of_one():
    layer, x = BatchNorm(), jnp.full((1, 1, 1, 2), 3.0)
    variables = layer.init(KEY, x)
    stats = variables["batch_stats"]
    np.testing.assert_array_equal([stats["mean"], stats["var"]], [[0, 0], [1, 1]])  # not moved by `init`
    y, moved = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, np.zeros((1, 1, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], [0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(moved["batch_stats"]["var"], [0.9, 0.9], rtol=1e-6)


def test_half_precision_has_exact_statistics():
    """Of numbers about 1000 a mean in bfloat16, of 8 bits, would be off by up to 2."""
    x = jnp.asarray(1000 + 8 * some(64, 2, 2, 3), jnp.bfloat16)
    layer = BatchNorm()
    y, moved = layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])
    wide = np.asarray(x, np.float64)
    assert y.dtype == jnp.bfloat16 and moved["batch_stats"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.1 * wide.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), by_hand(wide, 1, 0)[0], atol=0.02)
