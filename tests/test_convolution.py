"""Laws of convolution: the definition, gradients of gradients, the layout that stays fast inside loops."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.convolution import convolve

NONE = ((0, 0), (0, 0))
# kernel size, strides, padding, dilation of the pictures, of the kernel
CASES = [
    (3, (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    (4, (2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    (3, (2, 1), ((0, 2), (1, 0)), (1, 1), (2, 1)),
    (3, (2, 2), NONE, (1, 1), (1, 1)),  # a column is left over
    (4, (1, 1), ((2, 2), (2, 2)), (2, 2), (1, 1)),
    (3, (1, 1), ((2, 1), (0, 2)), (2, 3), (1, 2)),
]


def defined(x, w, strides, padding, dilation, kernel_dilation):
    """The sum, written out, of pictures with their zeros between and around."""
    batch, *sizes, _ = x.shape
    spread = np.zeros((batch, *[(size - 1) * d + 1 for size, d in zip(sizes, dilation, strict=True)], x.shape[-1]))
    spread[:, :: dilation[0], :: dilation[1]] = x
    spread = np.pad(spread, ((0, 0), *padding, (0, 0)))
    windows = [(size - 1) * d + 1 for size, d in zip(w.shape, kernel_dilation, strict=False)]
    out = [(spread.shape[1 + a] - windows[a]) // strides[a] + 1 for a in (0, 1)]
    y = np.zeros((batch, *out, w.shape[-1]))
    for i, j in np.ndindex(*out):
        rows = slice(i * strides[0], i * strides[0] + windows[0], kernel_dilation[0])
        columns = slice(j * strides[1], j * strides[1] + windows[1], kernel_dilation[1])
        y[:, i, j] = np.einsum("bklc,klcf->bf", spread[:, rows, columns], w)
    return y


def operands(size, rng=None):
    rng = rng or np.random.default_rng(0)
    return rng.normal(size=(2, 7, 8, 3)), rng.normal(size=(size, size, 3, 5))


@pytest.mark.parametrize("size, strides, padding, dilation, kernel_dilation", CASES)
def test_is_the_sum_and_its_gradients_are_those_of_autodiff(size, strides, padding, dilation, kernel_dilation):
    options = strides, padding, dilation, kernel_dilation

    def ours(x, w):
        return convolve(x, w, *options)

    def plain(x, w):
        return jax.lax.conv_general_dilated(x, w, *options, ("NHWC", "HWIO", "NHWC"))

    def twice(convolution):
        def loss(x, w):
            return jnp.sum(jnp.sin(convolution(x, w)))

        def penalty(w, x):
            of_x, of_w = jax.grad(loss, (0, 1))(x, w)
            return jnp.sum(jnp.cos(of_x)) + jnp.sum(of_w**3)

        return lambda x, w: (*jax.grad(loss, (0, 1))(x, w), *jax.grad(penalty, (0, 1))(w, x))

    with jax.enable_x64(True):
        x, w = operands(size)
        np.testing.assert_allclose(jax.jit(ours)(x, w), defined(x, w, *options), atol=1e-12)
        for actual, expected in zip(jax.jit(twice(ours))(x, w), jax.jit(twice(plain))(x, w), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_all_that_is_compiled_is_in_the_fast_layout():
    """Whatever differentiates it: batch first, channels last, kernel rows, columns, in, out."""

    def penalty(w, x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.tanh(convolve(x, w, (2, 2), ((1, 1), (1, 1))))))(x) ** 2)

    x, w = operands(4)
    text = jax.jit(jax.grad(penalty)).lower(w.astype("f4"), x.astype("f4")).as_text()
    layouts = re.findall(r"dim_numbers = (.*?), window", text)
    assert len(layouts) >= 4
    assert set(layouts) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def test_maps_over_replicas():
    x, w = operands(3)
    xs, ws = jnp.stack([x, 2 * x]).astype("f4"), jnp.stack([w, w + 1]).astype("f4")
    together = jax.vmap(jax.grad(lambda w, x: jnp.sum(convolve(x, w) ** 2)))(ws, xs)
    for n in range(2):
        alone = jax.grad(lambda w, x: jnp.sum(convolve(x, w) ** 2))(ws[n], xs[n])
        np.testing.assert_allclose(together[n], alone, rtol=2e-4)
