"""The networks of pix2pix against their layers written out in plain numpy, float64."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.pix2pix import PatchDiscriminator, UNet, instance_norm, l1
from jaxarch.gan.training import GameConfig, OptimConfig, hypers, make_init, make_step
from jaxarch.run import ConfigError

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


# --- the layers by their definitions ------------------------------------------------------------


def conv(x: np.ndarray, kernel: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Sums over a sliding window, `padding` zeros on all sides."""
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcf->bhwf", windows, kernel)


def transposed(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each pixel adds its multiple of the 4 x 4 kernel, `[4, 4, out, in]`, two pixels apart; one row and column less on
    all sides.
    """
    batch, height, width, _ = x.shape
    out = np.zeros((batch, 2 * height + 2, 2 * width + 2, kernel.shape[2]))
    for i in range(height):
        for j in range(width):
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bf,ijcf->bijc", x[:, i, j], kernel)
    return out[:, 1:-1, 1:-1]


def norm(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def parameters_of(model, *inputs):
    """Drawn anew, biases too, so that no part is without effect."""
    shapes = jax.eval_shape(lambda: model.init({"params": KEY, "dropout": KEY}, *inputs))
    return jax.tree.map(lambda leaf: RNG.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes)


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# --- the networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "axes"), [("instance", (1, 2)), ("batch", (0, 1, 2))])
def test_the_u_net_by_hand(kind, axes):
    """Of 16 x 32, so that 1 x 2 pixels are left; the skips by hand too. In training, but without dropout."""
    model = UNet(channels=2, features=3, norm=kind, dropout=0.0)
    x = RNG.uniform(-1, 1, (2, 16, 32, 1)).astype(np.float32)
    variables = parameters_of(model, None, x)
    found, _ = jax.jit(lambda v, x: model.apply(v, None, x, mutable=["batch_stats"]))(variables, x)
    p, x = wide(variables["params"]), x.astype(np.float64)

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        x = norm(x, axes)
        return x * p[name]["scale"] + p[name]["bias"] if kind == "batch" else x

    down_0 = conv(x, p["down_0"]["kernel"], 2, 1) + p["down_0"]["bias"]
    down_1 = normed(conv(leaky(down_0), p["down_1"]["kernel"], 2, 1), "down_norm_1")
    down_2 = normed(conv(leaky(down_1), p["down_2"]["kernel"], 2, 1), "down_norm_2")
    down_3 = conv(leaky(down_2), p["down_3"]["kernel"], 2, 1) + p["down_3"]["bias"]
    up_3 = normed(transposed(np.maximum(down_3, 0), p["up_3"]["kernel"]), "up_norm_3")
    up_2 = normed(transposed(np.maximum(np.concatenate([down_2, up_3], -1), 0), p["up_2"]["kernel"]), "up_norm_2")
    up_1 = normed(transposed(np.maximum(np.concatenate([down_1, up_2], -1), 0), p["up_1"]["kernel"]), "up_norm_1")
    up_0 = transposed(np.maximum(np.concatenate([down_0, up_1], -1), 0), p["up_0"]["kernel"]) + p["up_0"]["bias"]
    assert down_3.shape == (2, 1, 2, 24) and up_3.shape[-1] == 12
    np.testing.assert_allclose(found, np.tanh(up_0), atol=2e-5)


def test_the_u_net_of_the_paper():
    """C64 to C512 eight times and back, for 256 x 256: 54.4 million weights; depth as asked; dropout in three layers,
    in training alone.
    """

    def shapes_of(model, size):
        inputs = None, jnp.zeros((1, size, size, 3))
        return jax.eval_shape(lambda: model.init({"params": KEY, "dropout": KEY}, *inputs))["params"]

    params = shapes_of(UNet(3), 256)
    widths = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    kernels = sum(16 * a * b for a, b in pairwise(widths))
    kernels += 16 * (512 * 512 + 3 * 1024 * 512 + 1024 * 256 + 512 * 128 + 256 * 64 + 128 * 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == kernels + 64 + 512 + 3
    assert len(shapes_of(UNet(3, depth=3), 64)) == 6

    model, x = UNet(1, features=2), jnp.asarray(RNG.normal(size=(1, 32, 32, 1)), jnp.float32)
    variables = parameters_of(model, None, x)
    apply = jax.jit(
        lambda key, train: model.apply(variables, None, x, train=train, rngs={"dropout": key}), static_argnums=1
    )
    assert not np.allclose(apply(KEY, True), apply(jax.random.key(1), True))
    np.testing.assert_array_equal(apply(KEY, False), apply(jax.random.key(1), False))
    count = str(jax.make_jaxpr(lambda: model.apply(variables, None, x, rngs={"dropout": KEY}))()).count("random_bits")
    assert count == 3


@pytest.mark.parametrize(("strided", "field"), [(0, 7), (1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_so_many_pixels(strided, field):
    """By its gradient, away from the edges; n strided layers before two others: 7, and f to 2 f + 2 for each."""
    size = 2 ** (strided + 1) * (6 if strided else 8)
    while size < 2 * field:
        size *= 2
    model = PatchDiscriminator(features=1, strided=strided, norm="none")
    x = jnp.zeros((1, size, size, 1))
    params = jax.tree.map(jnp.ones_like, model.init(KEY, x))  # so that nothing cancels
    shape = jax.eval_shape(lambda: model.apply(params, x)).shape
    assert shape[1:] == (size // 2**strided - 2,) * 2
    middle = shape[1] // 2
    gradient = jax.jit(jax.grad(lambda x: model.apply(params, x)[0, middle, middle]))(x + 1)[0, :, :, 0]
    rows, columns = np.flatnonzero(np.any(gradient, 1)), np.flatnonzero(np.any(gradient, 0))
    for seen in (rows, columns):
        assert len(seen) == field == seen[-1] - seen[0] + 1 and seen[0] > 0 and seen[-1] < size - 1


def test_the_patch_discriminator_by_hand():
    model = PatchDiscriminator(features=2, strided=1)
    condition, samples = (RNG.normal(size=(2, 12, 8, c)).astype(np.float32) for c in (1, 3))
    variables = parameters_of(model, samples, condition)
    found = jax.jit(model.apply)(variables, samples, condition)
    p = wide(variables["params"])
    x = np.concatenate([condition, samples], -1).astype(np.float64)
    x = leaky(conv(x, p["conv_0"]["kernel"], 2, 1) + p["conv_0"]["bias"])
    x = leaky(norm(conv(x, p["conv_1"]["kernel"], 1, 1), (1, 2)))
    x = conv(x, p["logits"]["kernel"], 1, 1) + p["logits"]["bias"]
    assert found.shape == (2, 4, 2)
    np.testing.assert_allclose(found, x[..., 0], atol=2e-5)


def test_instance_norm_of_half_precision_in_single():
    x = (RNG.normal(size=(2, 5, 7, 3)) * 3 + 40).astype(jnp.bfloat16)
    found = instance_norm(jnp.asarray(x))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), norm(x.astype(np.float64), (1, 2)), atol=0.02)


def test_in_the_common_step_with_the_distance_to_the_target():
    """The generator's loss is the game's and the distance's; with a weight of 0 the game's alone."""
    x, y = (jnp.asarray(RNG.uniform(-1, 1, (3, 8, 8, c)), jnp.float32) for c in (1, 3))
    generator, critic = UNet(3, features=2, depth=1, dropout=0.0), PatchDiscriminator(features=2, strided=0)
    game = GameConfig("least_squares", "none", reuse_fakes=True)
    optim = OptimConfig(beta1=0.5)
    state = jax.jit(make_init(generator, critic, game, optim, y, x))(KEY, hypers(game, optim))
    losses = [
        jax.jit(make_step(generator, critic, game, optim, lambda batch: (batch[1], batch[0]), extra=extra))(
            state, (x, y), jnp.int32(0)
        )[1]["train/g_loss"]
        for extra in (l1(0.0), l1(100.0))
    ]
    made = generator.apply({"params": state.generator}, None, x)
    np.testing.assert_allclose(losses[1] - losses[0], 100 * np.abs(np.asarray(made) - y).mean(), rtol=1e-4)


def test_what_is_refused():
    x = jnp.zeros((1, 24, 32, 1))
    with pytest.raises(ConfigError, match=r"--model.depth 4 .* pictures of 24 x 32: .* multiple of 16"):
        UNet(1, depth=4).init(KEY, None, x)
    with pytest.raises(ConfigError, match=r"--model.strided 3 needs .* multiples of 8 and at least 24, not of 16 x 16"):
        PatchDiscriminator().init(KEY, jnp.zeros((1, 16, 16, 1)))
