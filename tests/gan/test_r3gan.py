"""The R3GAN backbone: its block and its convolution against their definitions, and what it is at the start."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.r3gan import R3GANConfig, ResidualBlock, grouped_convolution, r3gan
from jaxarch.run import backend
from jaxarch.run.protocol import ConfigError

KEY = jax.random.key(0)
SMALL = R3GANConfig(latent_dim=5, channel_base=64, channel_max=8, blocks=2, group_width=4, label_dim=3)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def shaken(tree, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def by_definition(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each output sums over the `width` inputs of its own group."""
    width, outputs = kernel.shape[2:]
    around = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    per_group = outputs // (x.shape[-1] // width)
    y = np.zeros((*x.shape[:3], outputs))
    for o in range(outputs):
        first = o // per_group * width
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                window = around[:, i : i + 3, j : j + 3, first : first + width]
                y[:, i, j, o] = (window * kernel[:, :, :, o]).sum((1, 2, 3))
    return y


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_grouped_convolution_is_its_definition(platform, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    x, kernel = drawn(2, 3, 4, 6), drawn(3, 3, 2, 9, seed=1)
    found = grouped_convolution(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(found, by_definition(x, kernel), rtol=1e-4, atol=1e-5)


def test_a_block_is_its_definition():
    block = ResidualBlock(expansion=2, group_width=2, depth=3)
    x = drawn(2, 3, 4, 3)
    given = jnp.asarray(x, jnp.float32)
    p = shaken(jax.eval_shape(block.init, KEY, given)["params"])

    def a(x):
        return np.where(x > 0, x, 0.2 * x) * np.sqrt(2 / 1.04)

    w: dict = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    y = a(x @ w["expand"]["kernel"][0, 0] + w["expand"]["bias"])
    y = a(by_definition(y, w["kernel"]) + w["bias"])
    expected = x + y @ w["project"]["kernel"][0, 0]
    np.testing.assert_allclose(jax.jit(block.apply)({"params": p}, given), expected, rtol=1e-4, atol=1e-4)


def test_a_new_block_does_nothing_and_its_kernels_shrink_with_depth():
    x = jnp.asarray(drawn(1, 2, 2, 32), jnp.float32)
    for depth in (1, 16):
        block = ResidualBlock(2, 16, depth)
        y, variables = jax.jit(block.init_with_output)(KEY, x)
        np.testing.assert_array_equal(y, x)
        p = variables["params"]
        assert not p["project"]["kernel"].any()
        np.testing.assert_allclose(np.std(p["expand"]["kernel"]), depth**-0.25 / 32**0.5, rtol=0.05)
        np.testing.assert_allclose(np.std(p["kernel"]), depth**-0.25 / (9 * 16) ** 0.5, rtol=0.05)


GENERATOR, DISCRIMINATOR = r3gan(SMALL, (8, 8, 3), classes=2)
LATENTS, LABELS = jnp.asarray(drawn(4, 5), jnp.float32), jnp.arange(4) % 2


def test_both_networks_begin_with_unit_variance():
    """Blocks do nothing yet, and each map beside them keeps what it is given."""
    generator, discriminator = r3gan(R3GANConfig(channel_max=32), (4, 4, 8))
    latents, noise = (jnp.asarray(drawn(*shape), jnp.float32) for shape in ((64, 64), (400, 4, 4, 8)))
    pictures, _ = jax.jit(generator.init_with_output)(KEY, latents)
    np.testing.assert_allclose(np.mean(np.square(pictures)), 1, rtol=0.25)
    logits, _ = jax.jit(discriminator.init_with_output)(KEY, noise)
    np.testing.assert_allclose(np.std(logits), 1, rtol=0.25)


def test_a_label_counts_in_both_networks():
    """All of the discriminator's features are weighed by it: with an embedding of 0 it says nothing."""
    variables = jax.jit(GENERATOR.init)(KEY, LATENTS, LABELS)
    apply = jax.jit(GENERATOR.apply)
    pictures, others = apply(variables, LATENTS, LABELS), apply(variables, LATENTS, 1 - LABELS)
    assert pictures.shape == (4, 8, 8, 3) and np.abs(pictures - others).min(axis=(1, 2, 3)).max() > 0
    params = shaken(jax.eval_shape(DISCRIMINATOR.init, KEY, pictures, LABELS)["params"])
    params["embedding"] = params["embedding"].at[1].set(0)
    logits = jax.jit(DISCRIMINATOR.apply)({"params": params}, pictures, LABELS)
    assert logits.shape == (4,)
    np.testing.assert_array_equal(logits == 0, LABELS == 1)
    for network, x in ((GENERATOR, LATENTS), (DISCRIMINATOR, pictures)):
        with pytest.raises(ValueError, match="was given no labels"):
            jax.eval_shape(network.init, KEY, x)


def test_in_bfloat16_they_are_the_same_networks():
    variables = {"params": shaken(jax.eval_shape(GENERATOR.init, KEY, LATENTS, LABELS)["params"])}
    found = [
        np.asarray(jax.jit(network.apply)(variables, LATENTS, LABELS))
        for network in (GENERATOR, GENERATOR.clone(dtype=jnp.bfloat16))
    ]
    assert found[1].dtype == np.float32
    assert np.linalg.norm(found[1] - found[0]) < 0.05 * np.linalg.norm(found[0])


@pytest.mark.parametrize("image", [(4, 4, 1), (64, 64, 4)])
def test_every_power_of_two(image):
    generator, discriminator = r3gan(SMALL, image)
    pictures = jax.eval_shape(lambda: generator.init_with_output(KEY, LATENTS)[0])
    assert generator.latent_dim == 5 and pictures.shape == (4, *image)
    assert jax.eval_shape(lambda x: discriminator.init_with_output(KEY, x)[0], pictures).shape == (4,)


@pytest.mark.parametrize(
    "wrong, size, message",
    [
        ({}, 12, "pictures of 12 x 12 pixels are not square"),
        ({"blocks": 0}, 8, "--r3gan.blocks 0 is below 1."),
        ({"group_width": 6, "channel_max": 8}, 8, "--r3gan.group-width 6 does not divide the 16 channels within"),
    ],
)
def test_wrong_numbers_are_refused(wrong, size, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        jax.eval_shape(r3gan(R3GANConfig(**wrong), (size, size, 3))[0].init, KEY, jnp.zeros((1, 64)))
