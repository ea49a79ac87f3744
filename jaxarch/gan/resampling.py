"""Pictures made larger and smaller with a low-pass filter, alone or joined to a convolution.

A filter is the taps of one axis; it serves both. Without it every second pixel of a smaller picture is dropped, and
what is too fine for the new grid comes back as what it is not (Zhang 2019, "Making convolutional networks
shift-invariant again").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Pictures = Float[Array, "batch height width channels"]
Resized = Float[Array, "batch new_height new_width channels"]
Inputs = Float[Array, "batch height width inputs"]
Outputs = Float[Array, "batch new_height new_width outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]
Taps = tuple[float, ...]

BINOMIAL = (1.0, 3.0, 3.0, 1.0)  # doubles a picture by linear interpolation between the centres of its pixels
NHWC = ("NHWC", "HWIO", "NHWC")


def normalized(taps: Sequence[float]) -> Taps:
    """Of sum 1, so that what is constant stays."""
    return tuple(float(tap) for tap in np.asarray(taps, np.float64) / np.sum(taps))


def upfirdn(
    pictures: Pictures,
    taps: Sequence[float],
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Resized:
    """Along both axes: `up - 1` zeros after each pixel, zeros around, convolved with the taps, every `down`-th kept.

    padding: zeros before and after, on the finer grid; where below 0, pixels are taken away.
    No product with an inserted zero is computed: the pixels of the result that see the same taps are made together.
    """
    for axis in (1, 2):
        pictures = _along(pictures, axis, tuple(taps), up, down, padding)
    return pictures


# Its transpose is the same with the taps turned, up and down exchanged. Left to differentiation it is a sum of padded
# arrays, several times as slow.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _along(x: Array, axis: int, taps: Taps, up: int, down: int, padding: tuple[int, int]) -> Array:
    length = (x.shape[axis] * up + sum(padding) - len(taps)) // down + 1
    if length < 1:
        raise ValueError(f"nothing is left of {x.shape[axis]} pixels under {len(taps)} taps and padding {padding}.")
    phases = up // math.gcd(up, down)
    count, stride = -(-length // phases), phases * down // up
    before = max(-(-padding[0] // up), 0)
    after = max((count * phases * down + len(taps) - padding[0]) // up + 1 - x.shape[axis], 0)
    x = jnp.pad(x, [(before, after) if a == axis else (0, 0) for a in range(x.ndim)])
    results = []
    for phase in range(phases):
        total = jnp.zeros((), x.dtype)
        for number, tap in enumerate(reversed(taps)):
            place = phase * down + number - padding[0]
            if place % up == 0:
                first = place // up + before
                own = lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis)
                total = total + own * jnp.asarray(tap, x.dtype)
        results.append(jnp.broadcast_to(total, (*x.shape[:axis], count, *x.shape[axis + 1 :])))
    if phases == 1:
        return results[0]
    woven = jnp.stack(results, axis + 1).reshape(*x.shape[:axis], count * phases, *x.shape[axis + 1 :])
    return lax.slice_in_dim(woven, 0, length, axis=axis)


def _transposed_along(
    axis: int, taps: Taps, up: int, down: int, padding: tuple[int, int], length: int, y: Array
) -> tuple[Array]:
    before = len(taps) - 1 - padding[0]
    after = (length - 1) * up + len(taps) - before - y.shape[axis] * down
    return (_along(y, axis, taps[::-1], down, up, (before, after)),)


_along.defvjp(lambda x, axis, *rest: (_along(x, axis, *rest), x.shape[axis]), _transposed_along)


def upsampled(pictures: Pictures, taps: Sequence[float] = BINOMIAL) -> Resized:
    """Twice as high and wide, at the same brightness."""
    size = len(taps)
    return upfirdn(pictures, [2 * tap for tap in normalized(taps)], up=2, padding=((size + 1) // 2, (size - 2) // 2))


def downsampled(pictures: Pictures, taps: Sequence[float] = BINOMIAL) -> Resized:
    """Half as high and wide."""
    size = len(taps)
    return upfirdn(pictures, normalized(taps), down=2, padding=((size - 1) // 2, (size - 2) // 2))


# --- with a convolution -------------------------------------------------------------------------


def convolved(
    pictures: Pictures, kernel: Float[Array, "rows columns of_group outputs"], groups: int = 1
) -> Float[Array, "batch height width outputs"]:
    """At the same size, with zeros beyond the edge."""
    return lax.conv_general_dilated(
        pictures, kernel, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups
    )


def convolved_up(pictures: Inputs, kernel: Kernel, taps: Sequence[float] = BINOMIAL) -> Outputs:
    """Twice as high and wide: zeros between the pixels, convolved with the kernel, then with the taps.

    As in Karras et al. 2019, sec. 2. A kernel larger than 1 x 1 stands for a convolution in the word's strict sense.
    """
    rows, columns = kernel.shape[:2]
    if (rows, columns) == (1, 1):
        return upsampled(convolved(pictures, kernel), taps)
    woven = transposed(pictures, kernel.swapaxes(2, 3))
    size = len(taps)
    before = (size + 1) // 2 + rows // 2 - (rows - 1)
    after = (size - 2) // 2 + rows // 2 - (rows - 2)
    return upfirdn(woven, [2 * tap for tap in normalized(taps)], padding=(before, after))


def convolved_down(pictures: Inputs, kernel: Kernel, taps: Sequence[float] = BINOMIAL) -> Outputs:
    """Half as high and wide: filtered by the taps, then by the kernel at every second pixel."""
    rows, columns = kernel.shape[:2]
    if (rows, columns) == (1, 1):
        return convolved(downsampled(pictures, taps), kernel)
    size = len(taps)
    padding = (size - 1) // 2 + rows // 2, (size - 2) // 2 + rows // 2
    return strided(upfirdn(pictures, normalized(taps), padding=padding), kernel)


# The gradients of <strided(x, kernel), y> with respect to y, x and kernel are strided, transposed and kernel_gradient,
# and those three are all that occur in one another's gradients. XLA:CPU's own for the kernel of a transposed
# convolution takes fifty times as long as the same numbers by way of the strided one.


@jax.custom_vjp
def strided(x: Inputs, kernel: Kernel) -> Outputs:
    """The kernel at every second pixel, within the picture."""
    return _strided(x, kernel)


def _strided(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=NHWC)


@jax.custom_vjp
def transposed(y: Outputs, kernel: Kernel) -> Inputs:
    """The transpose of `strided` with this kernel, to the smallest picture that has so large a result."""
    rows, columns = kernel.shape[:2]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    padding = (rows - 1, rows - 1), (columns - 1, columns - 1)
    return lax.conv_general_dilated(y, turned, (1, 1), padding, (2, 2), dimension_numbers=NHWC)


@jax.custom_vjp
def kernel_gradient(x: Inputs, y: Outputs) -> Kernel:
    """The gradient of `strided` at x with respect to its kernel, where that with respect to its result is y."""
    rows, columns = (big - 2 * (small - 1) for big, small in zip(x.shape[1:3], y.shape[1:3]))
    zeros = jnp.zeros((rows, columns, x.shape[3], y.shape[3]), x.dtype)
    return jax.vjp(lambda kernel: _strided(x, kernel), zeros)[1](y)[0]


strided.defvjp(
    lambda x, kernel: (strided(x, kernel), (x, kernel)),
    lambda given, y: (transposed(y, given[1]), kernel_gradient(given[0], y)),
)
transposed.defvjp(
    lambda y, kernel: (transposed(y, kernel), (y, kernel)),
    lambda given, x: (strided(x, given[1]), kernel_gradient(x, given[0])),
)
kernel_gradient.defvjp(
    lambda x, y: (kernel_gradient(x, y), (x, y)),
    lambda given, kernel: (transposed(given[1], kernel), strided(given[0], kernel)),
)
