"""Spectral normalisation against singular value decompositions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.convolution import Convolution, Dense
from jaxarch.gan.spectral import power_iteration

KEY = jax.random.key(0)


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LAYERS = [(Dense(4, spectral=True), (2, 6)), (Convolution(4, 3, spectral=True), (1, 3, 3, 2))]


def test_converges_to_the_largest_singular_value_and_its_vector():
    matrix = some(7, 4)
    _, values, right = np.linalg.svd(matrix)
    value, vector = power_iteration(jnp.asarray(matrix), jnp.asarray(some(4, seed=1)), steps=100)
    np.testing.assert_allclose(value, values[0], rtol=1e-5)
    np.testing.assert_allclose(np.abs(vector @ right.T), [1, 0, 0, 0], atol=1e-3)


def test_a_step_by_hand():
    """M = [[3, 0], [0, 1]] and v = (1, 1) / sqrt 2: M v ~ (3, 1), M^T (3, 1) ~ (9, 1), and |M (9, 1)| / |(9, 1)|."""
    matrix = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    value, vector = power_iteration(matrix, jnp.ones(2), steps=1)
    np.testing.assert_allclose(vector, np.array([9, 1]) / np.sqrt(82), rtol=1e-6)
    np.testing.assert_allclose(value, np.sqrt(730 / 82), rtol=1e-6)
    value, vector = power_iteration(matrix, jnp.ones(2), steps=0)
    np.testing.assert_allclose(vector, np.ones(2) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(value, np.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_the_gradient_is_the_product_of_both_vectors(steps):
    """u v^T (Miyato et al. 2018, eq. 11), also where they are not the singular ones yet."""
    matrix, start = some(5, 3), jnp.asarray(some(3, seed=1))
    value, right = power_iteration(jnp.asarray(matrix), start, steps)
    left = matrix @ right / np.linalg.norm(matrix @ right)
    gradient = jax.grad(lambda m: power_iteration(m, start, steps)[0])(jnp.asarray(matrix))
    np.testing.assert_allclose(gradient, np.outer(left, right), atol=1e-5)
    np.testing.assert_allclose(value, left @ matrix @ right, rtol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_divides_its_kernel_and_moves_its_vector_in_training_alone(layer, shape):
    x = jnp.asarray(some(*shape))
    variables = layer.init(KEY, x)
    kernel = np.asarray(variables["params"]["kernel"])
    plain = layer.clone(spectral=False)
    largest = np.linalg.svd(kernel.reshape(-1, 4))[1][0]
    step = jax.jit(lambda variables: layer.apply(variables, x, mutable=["spectral"]))
    for _ in range(60):
        y, moved = step(variables)
        variables = {**variables, **moved}
    expected = plain.apply({"params": {**variables["params"], "kernel": jnp.asarray(kernel / largest)}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)

    # A vector that is none: one step moves it, evaluation reads it as it is.
    variables = {**variables, "spectral": {"vector": jnp.array([1.0, 0.0, 0.0, 0.0])}}
    column = np.linalg.norm(kernel.reshape(-1, 4)[:, 0])
    y, same = layer.apply(variables, x, train=False, mutable=["spectral"])
    np.testing.assert_array_equal(same["spectral"]["vector"], [1, 0, 0, 0])
    expected = plain.apply({"params": {**variables["params"], "kernel": jnp.asarray(kernel / column)}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    _, moved = layer.apply(variables, x, train=True, mutable=["spectral"])
    step = kernel.reshape(-1, 4).T @ kernel.reshape(-1, 4)[:, 0]
    np.testing.assert_allclose(moved["spectral"]["vector"], step / np.linalg.norm(step), rtol=1e-4)


def test_the_first_vector_is_near_the_singular_one():
    layer = Dense(8, spectral=True)
    variables = layer.init(KEY, jnp.ones((1, 16)))
    values = np.linalg.svd(np.asarray(variables["params"]["kernel"]))[1]
    estimate = np.linalg.norm(np.asarray(variables["params"]["kernel"]) @ np.asarray(variables["spectral"]["vector"]))
    assert 0.97 < estimate / values[0] < 1.0001


def test_a_kernel_of_zeros_stays_one():
    layer = Dense(3, spectral=True)
    variables = layer.init(KEY, jnp.ones((1, 2)))
    variables = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    np.testing.assert_array_equal(layer.apply(variables, jnp.ones((1, 2)), mutable=["spectral"])[0], np.zeros((1, 3)))
