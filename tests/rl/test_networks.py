"""The perceptron's own gradients; heads, flattening and pictures."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.rl.networks import FEW, Network, NetworkConfig, perceptron, product

PLAIN = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def drawn(sizes, batch, seed=0):
    rng = np.random.default_rng(seed)
    layers = [(rng.normal(size=(i, o)) / np.sqrt(i), rng.normal(size=o) / 3) for i, o in itertools.pairwise(sizes)]
    return layers, rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))


def plainly(activation, layers, x):
    """In numpy or, under autodiff, in jax.numpy, where the activation is given as its function."""
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        x = activation(x) if number < len(layers) - 1 else x
    return x


# Few and many inputs, examples and outputs, on both sides of where the form changes.
@pytest.mark.parametrize("activation", list(PLAIN))
@pytest.mark.parametrize("sizes, batch", [((3, 11, 10, 2), 5), ((FEW + 3, 9, FEW + 1), FEW + 9), ((4, FEW), 20)])
def test_a_perceptron_and_its_gradients(activation, sizes, batch):
    """In float64: its values by numpy, its gradients by autodiff of the plain form, alone and under vmap."""
    layers, x, weights = drawn(sizes, batch)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, tuple(layers))
        found = perceptron(activation, given, jnp.asarray(x))
        np.testing.assert_allclose(found, plainly(PLAIN[activation], layers, x), rtol=1e-12, atol=1e-12)

        def own(layers, x):
            return jnp.sum(perceptron(activation, layers, x) * weights)

        def naive(layers, x):
            return jnp.sum(plainly(getattr(jax.nn, activation), layers, x) * weights)

        gradients, wanted = (jax.grad(f, (0, 1))(given, jnp.asarray(x)) for f in (own, naive))
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), (given, jnp.asarray(x)))
        gradients, wanted = (jax.vmap(jax.grad(f))(*two) for f in (own, naive))
        for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, FEW, FEW + 1])
@pytest.mark.parametrize("inputs", [1, FEW, FEW + 1])
@pytest.mark.parametrize("outputs", [1, FEW, FEW + 1])
def test_a_product_of_few_is_the_product(batch, inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(batch, inputs)), rng.normal(size=(inputs, outputs))
    with jax.enable_x64(True):
        found = product(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-12, atol=1e-14)


def test_heads_begin_at_their_scales_side_by_side():
    network = Network(NetworkConfig(layers=1, width=16), (4,), 0, ((2, 0.01), (1, 1.0)))
    x = jax.random.normal(jax.random.key(1), (3, 5, 4))
    params = network.init(jax.random.key(0), x)["params"]
    weights = jax.tree.map(np.asarray, params["Perceptron_0"])
    for head, scale in ((0, 0.01), (1, 1.0)):
        kernel = weights[f"head_{head}_kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, scale**2 * np.eye(kernel.shape[1]), atol=1e-6)
    hidden = np.tanh(np.asarray(x) @ weights["hidden_0_kernel"] + weights["hidden_0_bias"])
    wanted = np.concatenate([hidden @ weights["head_0_kernel"], hidden @ weights["head_1_kernel"]], -1)
    np.testing.assert_allclose(network.apply({"params": params}, x), wanted, rtol=1e-5, atol=1e-6)


def test_pictures_and_numbers_are_seen_alike_in_any_batch():
    """Of pictures one row a picture, through a convolution; of a discrete space a row of the kernel."""
    pictures = Network(NetworkConfig(layers=1, width=4, channels=2), (5, 6, 3), 0, ((2, 1.0),))
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 6, 3))
    params = pictures.init(jax.random.key(0), x)
    found = pictures.apply(params, x)
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(found[1, 2], pictures.apply(params, x[1, 2][None])[0], rtol=1e-5, atol=1e-6)
    tabular = Network(NetworkConfig(layers=0), (), 6, ((2, 1.0),))
    params = tabular.init(jax.random.key(0), jnp.arange(6))
    rows = params["params"]["Perceptron_0"]["head_0_kernel"][jnp.array([4, 1])]
    np.testing.assert_allclose(tabular.apply(params, jnp.array([[4, 1]]))[0], rows)
