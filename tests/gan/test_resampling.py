"""Resampling against its definition in loops, scipy's, and its own transpose; the joined convolutions likewise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from jaxarch.gan.resampling import (
    BINOMIAL,
    convolved,
    convolved_down,
    convolved_up,
    downsampled,
    upfirdn,
    upsampled,
)

ODD = (1.0, 2.0, 1.0)
TAPS = (1.0, -2.0, 5.0, 3.0)  # of no symmetry
CASES = [
    {},
    {"padding": (2, 1)},
    {"up": 2, "padding": (2, 1)},
    {"up": 2, "padding": (-1, 3)},
    {"down": 2, "padding": (1, 1)},
    {"up": 3, "down": 2, "padding": (4, 3)},
    {"up": 2, "down": 2, "padding": (1, 2)},
    {"up": 2, "down": 4, "padding": (0, -2)},
]


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def by_definition(x, taps, up=1, down=1, padding=(0, 0)):
    """In two dimensions at once: y[i, j] = sum over s, t of taps[s] taps[t] u[i down + S - s, j down + S - t]."""
    height, width = x.shape
    u = np.zeros((height * up, width * up))
    u[::up, ::up] = x
    lo, hi = padding
    big = np.zeros((u.shape[0] + 20, u.shape[1] + 20))
    big[10:-10, 10:-10] = u
    u = big[10 - lo : u.shape[0] + 10 + hi, 10 - lo : u.shape[1] + 10 + hi]
    last = len(taps) - 1
    rows, columns = ((size - len(taps)) // down + 1 for size in u.shape)
    y = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            for s, one in enumerate(taps):
                for t, other in enumerate(taps):
                    y[i, j] += one * other * u[i * down + last - s, j * down + last - t]
    return y


@pytest.mark.parametrize("options", CASES)
def test_upfirdn_is_its_definition(options):
    x = drawn(2, 6, 5, 3)
    found = jax.jit(lambda x: upfirdn(x, TAPS, **options))(x)
    for n, c in ((0, 0), (1, 2)):
        np.testing.assert_allclose(found[n, :, :, c], by_definition(x[n, :, :, c], TAPS, **options), atol=1e-12)


def test_upfirdn_is_scipys():
    """With the zeros that scipy's full convolution takes for granted."""
    x = drawn(1, 7, 7, 1)
    for up, down in ((1, 1), (2, 1), (1, 2), (3, 2)):
        rows = scipy.signal.upfirdn(TAPS, x[0, :, :, 0], up, down, axis=0)
        expected = scipy.signal.upfirdn(TAPS, rows, up, down, axis=1)
        padding = len(TAPS) - 1, len(TAPS) - up
        found = jax.jit(lambda x, up=up, down=down, p=padding: upfirdn(x, TAPS, up, down, p))(x)
        np.testing.assert_allclose(found[0, : len(expected), : len(expected), 0], expected, atol=1e-12)


@pytest.mark.parametrize("options", CASES)
def test_its_transpose_is_upfirdn_the_other_way(options):
    """<A x, y> = <x, A^T y>, where A^T has the taps reversed, and up and down exchanged."""
    up, down, (lo, _) = options.get("up", 1), options.get("down", 1), options.get("padding", (0, 0))
    x = drawn(2, 6, 5, 3)
    y = drawn(*jax.eval_shape(lambda x: upfirdn(x, TAPS, **options), jnp.asarray(x)).shape, seed=1)

    @jax.jit
    def both(x, y):
        forward, transpose = jax.vjp(lambda x: upfirdn(x, TAPS, **options), x)
        twice = jax.grad(lambda y: jnp.vdot(jax.vjp(lambda x: upfirdn(x, TAPS, **options), x)[1](y)[0], x))(y)
        return forward, twice, *transpose(y), upfirdn(y, TAPS[::-1], down, up, (len(TAPS) - 1 - lo, 40))

    forward, twice, back, other = both(x, y)
    np.testing.assert_allclose(np.vdot(forward, y), np.vdot(x, back), rtol=1e-12)
    np.testing.assert_allclose(twice, forward, atol=1e-12)
    np.testing.assert_allclose(back, other[:, :6, :5], atol=1e-12)


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="nothing is left of 2 pixels under 4 taps"):
        upfirdn(jnp.zeros((1, 2, 2, 1)), TAPS)


def test_doubling_interpolates_and_halving_averages():
    """By hand along a row: 1331 weighs the nearest pixel 3/4 and the next 1/4."""
    row = jnp.broadcast_to(jnp.array([2.0, 6.0, 4.0, 0.0])[None, None, :, None], (1, 4, 4, 1))
    inner = [0.75 * 2 + 0.25 * 6, 0.25 * 2 + 0.75 * 6, 0.75 * 6 + 0.25 * 4, 0.25 * 6 + 0.75 * 4]
    np.testing.assert_allclose(upsampled(row, BINOMIAL)[0, 3, 1:5, 0], inner)
    np.testing.assert_allclose(downsampled(row, BINOMIAL)[0, 0, 0, 0], (3 * 2 + 3 * 6 + 4) / 8 * 7 / 8)  # zeros above
    six = jnp.broadcast_to(jnp.array([9.0, 2.0, 6.0, 4.0, 0.0, 9.0])[None, None, :, None], (1, 6, 6, 1))
    np.testing.assert_allclose(downsampled(six, BINOMIAL)[0, 1, 1, 0], (2 + 3 * 6 + 3 * 4 + 0) / 8)


def test_a_constant_stays():
    flat = jnp.full((1, 8, 8, 2), 3.0)
    for taps in (BINOMIAL, ODD):
        np.testing.assert_allclose(upsampled(flat, taps)[:, 2:-2, 2:-2], 3, rtol=1e-12)
        np.testing.assert_allclose(downsampled(flat, taps)[:, 1:-1, 1:-1], 3, rtol=1e-12)


# --- with a convolution -------------------------------------------------------------------------


def full(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Full two-dimensional convolution, channels `[inputs, outputs]` summed."""
    shape = np.array(x.shape[:2]) + kernel.shape[:2] - 1
    y = np.zeros((*shape, kernel.shape[3]))
    for i in range(kernel.shape[2]):
        for o in range(kernel.shape[3]):
            y[:, :, o] += scipy.signal.convolve2d(x[:, :, i], kernel[:, :, i, o])
    return y


@pytest.mark.parametrize("taps", [BINOMIAL, ODD])
@pytest.mark.parametrize("size", [1, 3])
def test_joined_convolutions_are_their_parts(taps, size):
    """Up: zeros in between, the kernel, the taps. Down: the taps, the kernel turned, every second pixel."""
    x, kernel = drawn(1, 6, 4, 2), drawn(size, size, 2, 3, seed=1)
    filter_ = np.outer(taps, taps) / np.sum(taps) ** 2
    spread = np.zeros((12, 8, 2))
    spread[::2, ::2] = x[0]
    whole = 4 * full(full(spread, kernel), filter_[:, :, None, None] * np.eye(3))
    start = (len(taps) - 2) // 2 + (size - 1) // 2
    up, down = (jax.jit(lambda x, k, f=f: f(x, k, taps)[0])(x, kernel) for f in (convolved_up, convolved_down))
    np.testing.assert_allclose(up, whole[start : start + 12, start : start + 8], atol=1e-12)
    whole = full(full(x[0], filter_[:, :, None, None] * np.eye(2)), kernel[::-1, ::-1])
    start = len(taps) // 2 + size // 2
    np.testing.assert_allclose(down, whole[start : start + 6 : 2, start : start + 4 : 2], atol=1e-12)


def test_the_convolution_keeps_the_size():
    x, kernel = drawn(1, 5, 4, 2), drawn(3, 3, 2, 3, seed=1)
    expected = full(x[0], kernel[::-1, ::-1])[1:-1, 1:-1]
    np.testing.assert_allclose(convolved(jnp.asarray(x), jnp.asarray(kernel))[0], expected, atol=1e-12)


@pytest.mark.parametrize("own", [convolved_up, convolved_down])
def test_joined_convolutions_have_the_gradients_of_a_dense_product(own):
    """To the second order: bilinear in pictures and kernel, so that a tensor of three axes says all."""
    x, kernel = jnp.asarray(drawn(2, 4, 4, 2)), jnp.asarray(drawn(3, 3, 2, 3, seed=1))
    shape = jax.eval_shape(own, x, kernel).shape
    pictures, kernels = jnp.eye(32).reshape(32, 1, 4, 4, 2), jnp.eye(54).reshape(54, 3, 3, 2, 3)
    tensor = jax.jit(jax.vmap(lambda k: jax.vmap(lambda x: own(x, k))(pictures)))(kernels).reshape(54, 32, -1)

    def dense(x, kernel):
        return jnp.einsum("nx,k,kxy->ny", x.reshape(2, -1), kernel.reshape(-1), tensor).reshape(shape)

    def gradients(function, x, kernel):
        def value(x, kernel):
            return jnp.sum(jnp.sin(function(x, kernel)))

        def curved(x, kernel):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(value, (0, 1))(x, kernel))

        return jax.grad(value, (0, 1))(x, kernel), jax.grad(curved, (0, 1))(x, kernel)

    found, expected = (jax.jit(lambda x, k, f=f: gradients(f, x, k))(x, kernel) for f in (own, dense))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
