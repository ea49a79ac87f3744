"""What every Transformer is built of: dense layers, norms, feed-forward layers, embeddings.

Parameters are float32. Computation is in the type of the activations, which the embedding sets once;
norms work in float32 and cast back. `kernel` and `embedding` name matrices, `bias` and `scale` vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxarch.run import backend
from jaxarch.run.mesh import size_of
from jaxarch.transformer.positions import relative_buckets

DEFAULT_INIT = nn.initializers.normal(0.02)


def dense(
    x: Float[Array, "*batch features_in"],
    kernel: Float[Array, "features_in features"],
    bias: Float[Array, "features"] | None = None,
) -> Float[Array, "*batch features"]:
    """x kernel + bias, in the type of x."""
    # Over flattened rows the kernel's gradient is one plain product, twice as fast on XLA:CPU. Rows and positions that
    # are both cut over devices would be gathered for it.
    flat = x if size_of("context") > 1 else x.reshape(-1, x.shape[-1])
    rows = flat @ kernel.astype(x.dtype)
    if bias is not None:
        rows = rows + bias.astype(x.dtype)
    return rows.reshape(*x.shape[:-1], -1)


def by_transposed(
    row: Float[Array, "*ones features_in"], matrix: Float[Array, "features features_in"]
) -> Float[Array, "*ones features"]:
    """One row's product with a matrix that is read as it lies, in its own type, and multiplied in float32."""
    # Tied to the row: else a loop over tokens would have the matrix converted before it begins, and read twice the
    # bytes of bfloat16 at each of them.
    matrix, rows = jax.lax.optimization_barrier((matrix, row.reshape(1, -1)))
    product = rows.astype(jnp.float32) @ matrix.T.astype(jnp.float32)
    return product.astype(row.dtype).reshape(*row.shape[:-1], -1)


class Dense(nn.Module):
    """`dense` with parameters of its own.

    For decoding the kernel may be given transposed, under another name: see `transposed_kernels`.
    """

    features: int
    use_bias: bool = False
    kernel_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features_in"]) -> Float[Array, "*batch features"]:
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if self.has_variable("params", "transposed"):
            y = by_transposed(x, self.get_variable("params", "transposed"))
            return y if bias is None else y + bias.astype(x.dtype)
        return dense(x, self.param("kernel", self.kernel_init, (x.shape[-1], self.features)), bias)


def transposed_kernels(params: PyTree, dtype: DTypeLike) -> PyTree:
    """The parameters with the kernel of each dense layer as `transposed`, for one row at a time, in this type."""
    if not isinstance(params, Mapping):
        return params
    if getattr(params.get("kernel"), "ndim", None) == 2:
        rest = {name: leaf for name, leaf in params.items() if name != "kernel"}
        return rest | {"transposed": params["kernel"].T.astype(dtype)}
    return {name: transposed_kernels(leaf, dtype) for name, leaf in params.items()}


class LayerNorm(nn.Module):
    """Ba et al. 2016, eq. 4, over the last axis."""

    use_bias: bool = False
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        wide = wide * self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.use_bias:
            wide = wide + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return wide.astype(x.dtype)


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, eq. 4, over the last axis.

    zero_centered: the scale is 1 + the parameter, which begins at 0 and so is what weight decay draws it to (Gemma).
    """

    zero_centered: bool = False
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        if self.zero_centered:
            scale = 1 + scale.astype(wide.dtype)  # first made wide: 1 + a small number is 1 in bfloat16
        return (wide * scale).astype(x.dtype)


Activation = Callable[[Array], Array]


@jax.custom_vjp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Hendrycks & Gimpel 2016, sec. 2, in the tanh form of GPT-2."""
    return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    # The derivative is made where the tanh is at hand, so that the backward pass is one product.
    cubic, slope = (2 / jnp.pi) ** 0.5 * 0.044715, (2 / jnp.pi) ** 0.5
    tanh = jnp.tanh(x * (slope + cubic * x * x))
    half = 0.5 * (1 + tanh)
    return x * half, half + 0.5 * x * (1 - tanh * tanh) * (slope + 3 * cubic * x * x)


gelu.defvjp(_gelu_forward, lambda derivative, d_y: (derivative * d_y,))


@jax.custom_vjp
def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Hendrycks & Gimpel 2016, sec. 2: x times the probability that a standard normal number is below it.

    By erf, four times as fast on XLA:CPU as by the erfc of `jax.nn.gelu`, which is exact far below 0 too.
    """
    return x * _below(x).astype(x.dtype)


def _below(x: Array) -> Array:
    # As 0.5 * (1 + erf) XLA:CPU of jax 0.11 takes it for a GELU, which oneDNN joins to the product before it. What else
    # reads x is then given the GELU's output: gradients in bfloat16 are wrong by 40 %.
    return 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.promote_types(x.dtype, jnp.float32)) * 0.5**0.5)


def _exact_gelu_forward(x: Array) -> tuple[Array, Array]:
    below = _below(x)
    density = jnp.exp(-0.5 * jnp.square(x.astype(below.dtype))) / (2 * jnp.pi) ** 0.5
    return x * below.astype(x.dtype), (below + x * density).astype(x.dtype)


exact_gelu.defvjp(_exact_gelu_forward, lambda derivative, d_y: (derivative * d_y,))


def squared_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """max(x, 0) ** 2 (So et al. 2021, sec. 4)."""
    return jnp.square(jax.nn.relu(x))


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(1.702 x) (Hendrycks & Gimpel 2016, sec. 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


ActivationName = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh"]
ACTIVATIONS: dict[ActivationName, Activation] = {
    "gelu": exact_gelu,
    "gelu_tanh": gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class FeedForward(nn.Module):
    """down(activation(up(x))) (Vaswani et al. 2017, eq. 2)."""

    hidden: int
    activation: Activation = gelu
    use_bias: bool = False
    out_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        y = self.activation(Dense(self.hidden, self.use_bias, name="up")(x))
        return Dense(x.shape[-1], self.use_bias, self.out_init, name="down")(y)


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU with silu (Shazeer 2020, eq. 6)."""

    hidden: int
    activation: Activation = jax.nn.silu
    use_bias: bool = False
    out_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        gate = self.activation(Dense(self.hidden, self.use_bias, name="gate")(x))
        y = gate * Dense(self.hidden, self.use_bias, name="up")(x)
        return Dense(x.shape[-1], self.use_bias, self.out_init, name="down")(y)


class Embedding(nn.Module):
    """A table of vectors by number, which may also read out: `attend` gives the products with all of them."""

    count: int
    dim: int
    dtype: DTypeLike = jnp.float32
    embedding_init: Initializer = DEFAULT_INIT

    def setup(self) -> None:
        self.embedding = self.param("embedding", self.embedding_init, (self.count, self.dim))

    def __call__(self, numbers: Int[Array | np.ndarray, "*batch"]) -> Float[Array, "*batch dim"]:
        return self.embedding[numbers].astype(self.dtype)

    def attend(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch count"]:
        one_row = x.size == x.shape[-1]
        if one_row and x.dtype == jnp.bfloat16 and backend.converts_in_products():
            return by_transposed(x, self.embedding.astype(x.dtype))
        if one_row and x.dtype == jnp.float32 and backend.slow_transposed():
            return (self.embedding * x.reshape(-1)).sum(axis=-1).reshape(*x.shape[:-1], -1)
        return dense(x, self.embedding.T)


class RelativeBias(nn.Module):
    """A bias on the attention's logits by head and distance, learned (Raffel et al. 2020, sec. 2.1).

    T5 has one, called once and added in all layers of a stack.

    bidirectional, buckets, max_distance: of `relative_buckets`.
    """

    heads: int
    bidirectional: bool
    buckets: int = 32
    max_distance: int = 128
    embedding_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self, positions: Int[Array, "#batch length"], key_positions: Int[Array, "#batch keys"]
    ) -> Float[Array, "#batch heads length keys"]:
        table = self.param("embedding", self.embedding_init, (self.buckets, self.heads))
        relative = key_positions[:, None, :] - positions[:, :, None]
        numbers = relative_buckets(relative, self.bidirectional, self.buckets, self.max_distance)
        return jnp.moveaxis(table[numbers], 3, 1)
