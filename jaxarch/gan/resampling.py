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

from jaxarch.convolution import convolve

Pictures = Float[Array, "batch height width channels"]
Resized = Float[Array, "batch new_height new_width channels"]
Inputs = Float[Array, "batch height width inputs"]
Outputs = Float[Array, "batch new_height new_width outputs"]
Kernel = Float[Array, "rows columns inputs outputs"]
Taps = tuple[float, ...]

BINOMIAL = (1.0, 3.0, 3.0, 1.0)  # doubles a picture by linear interpolation between the centres of its pixels


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


def convolved(pictures: Inputs, kernel: Kernel) -> Float[Array, "batch height width outputs"]:
    """At the same size, with zeros beyond the edge. The kernel has odd sides."""
    rows, columns = kernel.shape[:2]
    return convolve(pictures, kernel, padding=((rows // 2, rows // 2), (columns // 2, columns // 2)))


def convolved_up(pictures: Inputs, kernel: Kernel, taps: Sequence[float] = BINOMIAL) -> Outputs:
    """Twice as high and wide: zeros between the pixels, convolved with the kernel, then with the taps.

    As in Karras et al. 2019, sec. 2. A kernel larger than 1 x 1 stands for a convolution in the word's strict sense.
    """
    rows, columns = kernel.shape[:2]
    if (rows, columns) == (1, 1):
        return upsampled(convolved(pictures, kernel), taps)
    around = (rows - 1, rows - 1), (columns - 1, columns - 1)
    woven = convolve(pictures, kernel[::-1, ::-1], padding=around, dilation=(2, 2))
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
    return convolve(upfirdn(pictures, normalized(taps), padding=padding), kernel, strides=(2, 2))
