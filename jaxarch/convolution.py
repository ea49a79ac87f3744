"""Two-dimensional convolution whose gradients are as fast inside loops and conditionals as outside.

XLA:CPU brings a convolution into the one layout that its fast routine takes (`NHWC`, `HWIO`) only where it stands
at a program's top level. The gradients that autodiff writes are in others: inside a `lax.scan`, `lax.cond` or
`lax.map` they ran 40 to 100 times slower. Here they are written in that layout by transposing their operands.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")
Pair = tuple[int, int]


def convolve(
    pictures: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    kernel_dilation: Pair = (1, 1),
) -> Float[Array, "batch out_height out_width features"]:
    """The convolution of deep learning, a correlation, differentiable backwards any number of times.

    dilation: of the pictures: zeros between their pixels, as in a transposed convolution; then `strides` are 1.
    """
    return _convolve(pictures, kernel, strides, padding, dilation, kernel_dilation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _convolve(x: Array, w: Array, strides: Pair, padding: tuple, dilation: Pair, kernel_dilation: Pair) -> Any:
    return lax.conv_general_dilated(x, w, strides, padding, dilation, kernel_dilation, LAYOUT)


def _forward(x: Array, w: Array, *options: tuple) -> tuple[Any, tuple[Array, Array]]:
    return _convolve(x, w, *options), (x, w)


def _backward(
    strides: Pair, padding: tuple, dilation: Pair, kernel_dilation: Pair, residuals: tuple[Array, Array], g: Array
) -> tuple[Any, Any]:
    """Along an axis, with sizes that count the zeros of a dilation: y[i] = sum_k x[i * stride + k - before] w[k]."""
    x, w = residuals
    pads = []
    for axis in (0, 1):
        size = (x.shape[1 + axis] - 1) * dilation[axis] + 1
        window = (w.shape[axis] - 1) * kernel_dilation[axis] + 1
        out = (g.shape[1 + axis] - 1) * strides[axis] + 1
        before, mirrored = padding[axis][0], window - 1 - padding[axis][0]
        pads.append(
            (
                (mirrored, size + window - 1 - out - mirrored),  # of g, for x
                (before, out + window - 1 - size - before),  # of x, for w
                (mirrored, size + window - 1 - out - mirrored),  # of g, for w
            )
        )
    for_x, of_x, of_g = zip(*pads, strict=True)
    flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = _convolve(g, flipped, dilation, for_x, strides, kernel_dilation)
    if dilation == (1, 1):
        dw: Any = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), kernel_dilation, of_x, dilation, strides)
        return dx, dw.transpose(1, 2, 0, 3)
    # The same sum with the roles of x and g swapped: a convolution over the zeros of x is a hundred times slower.
    dw: Any = _convolve(g.transpose(3, 1, 2, 0), x.transpose(1, 2, 0, 3), kernel_dilation, of_g, strides, dilation)
    return dx, dw.transpose(1, 2, 3, 0)[::-1, ::-1]


_convolve.defvjp(_forward, _backward)
