"""Strided convolutions and their adjoints, the transposed convolutions.

A convolution y = c(x, k) is linear in the pictures x and in the kernel k, so one form of three arguments stands behind
all that is computed here:

    <c(x, k), y> = <x, t(y, k)> = <k, w(x, y)>

t, the transposed convolution, is the gradient of x, and w that of the kernel. The gradients of each of the three are
the two others, so that derivatives of any order (R1 has them of the second) are calls of these three again. What
autodiff makes of a transposed convolution instead, the kernel's gradient of a dilated convolution, takes XLA:CPU up to
a hundred times as long.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float

from jaxarch.convolution import Pair, convolve
from jaxarch.gan.spectral import spectral_kernel
from jaxarch.run import backend

Kernel = Float[Array, "rows columns features_in features"]
DEFAULT_INIT = nn.initializers.normal(0.02)  # Radford et al. 2016, sec. 4


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(
    x: Float[Array, "batch height width features_in"], kernel: Kernel, stride: int = 1
) -> Float[Array, "batch new_height new_width features"]:
    """c: sums of products with the kernel around each `stride`-th pixel, `stride` times as small a picture.

    Beyond the edge are zeros, kernel size - stride of them along each axis, half on either side; of an odd number the
    last side has one more (PyTorch's padding of 1 with 4 x 4 and stride 2, or with 3 x 3 and stride 1).

    Raises ValueError where the stride does not divide the picture's sides.
    """
    height, width = x.shape[1:3]
    if height % stride or width % stride:
        raise ValueError(f"a stride of {stride} does not divide pictures of {height} x {width} pixels.")
    return convolve(x, kernel, (stride, stride), padding(kernel.shape[:2], stride))


def padding(size: tuple[int, ...], stride: int) -> tuple[Pair, Pair]:
    """Zeros before and behind, of each axis. Raises ValueError where a kernel is smaller than the stride."""
    if min(size) < stride:
        raise ValueError(f"a kernel of {size[0]} x {size[1]} is smaller than the stride of {stride}.")
    rows, columns = ((number // 2, number - number // 2) for number in (size[0] - stride, size[1] - stride))
    return rows, columns


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def transposed_convolution(
    y: Float[Array, "batch height width features"], kernel: Kernel, stride: int = 1
) -> Float[Array, "batch new_height new_width features_in"]:
    """t: the adjoint of `convolution` with this kernel, `stride` times as large a picture.

    The kernel is the convolution's: its last axis are the features that come in here.
    """
    rows, columns = kernel.shape[:2]
    if stride > 1 and rows % stride == columns % stride == 0 and backend.platform() == "cpu":
        return _by_taps(y, kernel, stride)
    (top, _), (left, _) = padding((rows, columns), stride)
    around = (rows - 1 - top, stride - 1 + top), (columns - 1 - left, stride - 1 + left)
    mirrored = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return convolve(y, mirrored, padding=around, dilation=(stride, stride))


def _by_taps(
    y: Float[Array, "batch height width features"], kernel: Kernel, stride: int
) -> Float[Array, "batch new_height new_width features_in"]:
    """One product gives all that a pixel adds to the picture; what overlaps is summed.

    A fifth to a half faster on XLA:CPU than its convolution with a dilated input.
    """
    (rows, columns, features_in, features), (batch, height, width, _) = kernel.shape, y.shape
    down, across = rows // stride, columns // stride
    products = y.reshape(-1, features) @ kernel.reshape(-1, features).T
    products = products.reshape(batch, height, width, down, stride, across, stride, features_in)
    picture = jnp.zeros((), y.dtype)
    for i in range(down):
        for j in range(across):
            around = [(0, 0), (i, down - 1 - i), (j, across - 1 - j), (0, 0), (0, 0), (0, 0)]
            picture = picture + jnp.pad(products[:, :, :, i, :, j], around)
    picture = picture.transpose(0, 1, 3, 2, 4, 5)
    picture = picture.reshape(batch, (height + down - 1) * stride, (width + across - 1) * stride, features_in)
    (top, _), (left, _) = padding((rows, columns), stride)
    # Summed once: else each use of the picture would sum the products again.
    return jax.lax.optimization_barrier(picture[:, top : top + height * stride, left : left + width * stride])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def kernel_gradient(
    x: Float[Array, "batch height width features_in"],
    y: Float[Array, "batch new_height new_width features"],
    size: Pair,
    stride: int = 1,
) -> Kernel:
    """w: the gradient of a kernel of that size in <convolution(x, kernel), y>."""
    # Each feature is a picture's channel in turn, the batch what is summed over. The barrier: else the arithmetic that
    # made x and y would be done again while transposing, in an order that no cache likes.
    x, y = jax.lax.optimization_barrier((x, y))
    pictures, kernel = x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)
    gradient = convolve(pictures, kernel, padding=padding(size, stride), kernel_dilation=(stride, stride))
    return gradient.transpose(1, 2, 0, 3)


convolution.defvjp(
    lambda x, kernel, stride: (convolution(x, kernel, stride), (x, kernel)),
    lambda stride, kept, y: (
        transposed_convolution(y, kept[1], stride),
        kernel_gradient(kept[0], y, kept[1].shape[:2], stride),
    ),
)
transposed_convolution.defvjp(
    lambda y, kernel, stride: (transposed_convolution(y, kernel, stride), (y, kernel)),
    lambda stride, kept, x: (
        convolution(x, kept[1], stride),
        kernel_gradient(x, kept[0], kept[1].shape[:2], stride),
    ),
)
kernel_gradient.defvjp(
    lambda x, y, size, stride: (kernel_gradient(x, y, size, stride), (x, y)),
    lambda size, stride, kept, kernel: (
        transposed_convolution(kept[1], kernel, stride),
        convolution(kept[0], kernel, stride),
    ),
)


class Convolution(nn.Module):
    """`convolution` with parameters of its own; in the type of what comes in.

    spectral: the kernel is divided by its largest singular value.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False
    spectral: bool = False
    kernel_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width features_in"], train: bool = True
    ) -> Float[Array, "batch new_height new_width features"]:
        kernel: Any = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.features))
        if self.spectral:
            kernel = spectral_kernel(self, kernel, train)
        return _with_bias(self, convolution(x, kernel.astype(x.dtype), self.stride))


class TransposedConvolution(nn.Module):
    """`transposed_convolution` with parameters of its own; in the type of what comes in.

    The kernel is `[rows, columns, features, features_in]`: that of the convolution whose adjoint this is.
    """

    features: int
    size: int = 4
    stride: int = 2
    use_bias: bool = False
    kernel_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self, y: Float[Array, "batch height width features_in"]
    ) -> Float[Array, "batch new_height new_width features"]:
        kernel: Any = self.param("kernel", self.kernel_init, (self.size, self.size, self.features, y.shape[-1]))
        return _with_bias(self, transposed_convolution(y, kernel.astype(y.dtype), self.stride))


class Dense(nn.Module):
    """x kernel + bias, in the type of what comes in; `spectral` as in `Convolution`."""

    features: int
    use_bias: bool = True
    spectral: bool = False
    kernel_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "batch features_in"], train: bool = True) -> Float[Array, "batch features"]:
        kernel: Any = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        if self.spectral:
            kernel = spectral_kernel(self, kernel, train)
        return _with_bias(self, x @ kernel.astype(x.dtype))


def _with_bias(module: Convolution | TransposedConvolution | Dense, x: Any) -> Array:
    if not module.use_bias:
        return x
    return x + module.param("bias", nn.initializers.zeros, (module.features,)).astype(x.dtype)
