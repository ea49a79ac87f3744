"""The Vision Transformer (Dosovitskiy et al. 2021, fig. 1): a picture as a sequence of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float64, PyTree

from jaxarch.run.protocol import ConfigError, check_least
from jaxarch.transformer.attention import PROJECTIONS, SelfAttention
from jaxarch.transformer.blocks import Block, Context, Depth, MakeModule, attention_weights, stack
from jaxarch.transformer.layers import ACTIVATIONS, ActivationName, Dense, FeedForward, LayerNorm, dense

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class VisionConfig:
    """A Vision Transformer, in the words of the command line. Raises ConfigError where the numbers do not fit."""

    layers: int = 4
    heads: int = 4
    dim: int = 64
    """width of the residual stream"""
    patch: Size = (2, 2)
    """height and width of a patch in pixels"""
    mlp_dim: int = 0
    """hidden width of the feed-forward layers (0: 4 dim)"""
    activation: ActivationName = "gelu_tanh"
    """of the feed-forward layers"""
    pooling: Literal["class", "mean"] = "class"
    """what the head reads: a token of its own, or the mean of the patches"""
    qkv_bias: bool = True
    """biases of queries, keys and values; all else has one"""
    eps: float = 1e-6
    """of the norms"""
    dropout: float = 0.0
    """of the embedding and of what each attention and feed-forward layer adds"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """compile one layer and loop over it: compiles deep stacks sooner, runs slower on CPU"""

    def __post_init__(self) -> None:
        check_least(self, ("layers", "heads", "dim"), 1, "model.")
        if min(self.patch) < 1:
            raise ConfigError(f"--model.patch {self.patch[0]} {self.patch[1]} has a side below 1.")
        if self.dim % self.heads:
            wider = -(-self.dim // self.heads) * self.heads
            raise ConfigError(
                f"--model.heads {self.heads} does not divide --model.dim {self.dim}; --model.dim {wider} would do."
            )
        if self.mlp_dim < 0:
            raise ConfigError(f"--model.mlp-dim {self.mlp_dim} is below 0; 0 is the default.")
        if self.eps <= 0:
            raise ConfigError(f"--model.eps {self.eps:g} is not above 0; 1e-6 is usual.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1); 0.1 is usual.")


def patches(
    pictures: Float[Array, "batch height width channels"], patch: Size
) -> Float[Array, "batch patches features"]:
    """The numbers of each patch, as they lie in the picture: row by row, within one patch as well."""
    batch, height, width, channels = pictures.shape
    down, across = patch
    cut = pictures.reshape(batch, height // down, down, width // across, across, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, down * across * channels)


class PatchEmbedding(nn.Module):
    """A linear map of each patch (Dosovitskiy et al. 2021, eq. 1): a convolution whose stride is its kernel's size.

    As a product it is faster on XLA:CPU.
    """

    dim: int
    patch: Size

    @nn.compact
    def __call__(self, pictures: Float[Array, "batch height width channels"]) -> Float[Array, "batch patches dim"]:
        shape = (*self.patch, pictures.shape[-1], self.dim)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.dim,))
        return dense(patches(pictures, self.patch), kernel.reshape(-1, self.dim), bias)


class Pooler(nn.Module):
    """activation(x kernel + bias)."""

    features: int
    activation: ActivationName = "tanh"

    @nn.compact
    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch features"]:
        return ACTIVATIONS[self.activation](Dense(self.features, use_bias=True, name="dense")(x))


class VisionTransformer(nn.Module):
    """Embedded patches with learned positions, a stack of blocks, norm, head (Dosovitskiy et al. 2021, eq. 1 to 4).

    image: height, width and channels of a picture.
    labels: names of the classes that a linear head tells apart.
    pooler: width and activation of another head, where there are no labels; without either the model gives all tokens.
    """

    config: VisionConfig
    image: tuple[int, int, int]
    block: MakeModule
    norm: MakeModule
    labels: tuple[str, ...] = ()
    pooler: tuple[int, ActivationName] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pictures: Float[Array | np.ndarray, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch features"] | Float[Array, "batch tokens dim"]:
        """What the head gives, as logits, or else the last layer's tokens after their norm; in float32.

        deterministic: no dropout; otherwise `rngs={"dropout": key}` are needed.
        """
        config = self.config
        if pictures.shape[1:] != self.image:
            raise ValueError(
                f"pictures of {pictures.shape[1:]} are not of {self.image}; at_resolution gives a model for them."
            )
        x = PatchEmbedding(config.dim, config.patch, name="patches")(jnp.asarray(pictures, self.dtype))
        if config.pooling == "class":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, config.dim)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, config.dim)), x], axis=1)
        # Of about the size of the embedded patches: much smaller ones are learned late.
        init = nn.initializers.normal(config.dim**-0.5)
        x = x + self.param("positions", init, (1, *x.shape[1:])).astype(x.dtype)
        x = nn.Dropout(config.dropout)(x, deterministic)
        context = Context(jnp.arange(x.shape[1])[None])
        depth = Depth(config.layers, config.remat, config.scan_layers)
        x, _ = stack(self, (self.block,), depth, x, context, deterministic=deterministic)
        x = self.norm(name="norm")(x)
        pooled = x[:, 0] if config.pooling == "class" else x.mean(axis=1)
        if self.labels:
            x = Dense(len(self.labels), use_bias=True, kernel_init=nn.initializers.zeros, name="head")(pooled)
        elif self.pooler is not None:
            x = Pooler(*self.pooler, name="head")(pooled)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    @property
    def grid(self) -> Size:
        """Patches from top to bottom and from left to right."""
        return grid(self.image, self.config.patch)

    def inputs(self) -> tuple[Float[Array, "1 height width channels"]]:
        """The smallest with which `init` makes all parameters."""
        return (jnp.zeros((1, *self.image)),)


def vision(
    config: VisionConfig,
    image: tuple[int, int, int],
    labels: Sequence[str] = (),
    pooler: tuple[int, ActivationName] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> VisionTransformer:
    """The model that the configuration describes.

    image, labels, pooler: of `VisionTransformer`.
    dtype: of the computation, float32 or bfloat16; parameters are float32.
    Raises ConfigError where the patches do not fill the picture.
    """
    (height, width, _), (down, across) = image, config.patch
    if height % down or width % across:
        raise ConfigError(f"--model.patch {down} {across} does not divide pictures of {height} x {width} pixels.")
    norm = partial(LayerNorm, use_bias=True, eps=config.eps)
    attention = partial(
        SelfAttention,
        config.heads,
        config.heads,
        config.dim // config.heads,
        causal=False,
        biases=PROJECTIONS if config.qkv_bias else ("out",),
    )
    hidden, activation = config.mlp_dim or 4 * config.dim, ACTIVATIONS[config.activation]
    feed_forward = partial(FeedForward, hidden, activation, use_bias=True)
    block = partial(Block, norm, attention, feed_forward, dropout=config.dropout)
    return VisionTransformer(config, image, block, norm, tuple(labels), pooler, dtype)


def grid(image: tuple[int, ...], patch: Size) -> Size:
    return image[0] // patch[0], image[1] // patch[1]


# --- other resolutions --------------------------------------------------------------------------


def interpolated(positions: Float[Array, "1 old_tokens dim"], old: Size, new: Size) -> Float[Array, "1 tokens dim"]:
    """Learned positions of one grid of patches as those of another (Dosovitskiy et al. 2021, sec. 3.2).

    Bicubic, as `transformers` does it: between the centres of the patches, the outermost repeated beyond the edge,
    a = -0.75 in Keys 1981, eq. 15, and nothing smoothed where the new grid is coarser. Tokens that are no patches, the
    class token's at the front, stay, and so does everything where the grids are equal.
    """
    if old == new:
        return positions
    others = positions.shape[1] - old[0] * old[1]
    of_patches = positions[0, others:].reshape(*old, -1)
    rows, columns = (jnp.asarray(_bicubic(*sizes), positions.dtype) for sizes in zip(old, new, strict=True))
    resized = jnp.einsum("yi,xj,ijd->yxd", rows, columns, of_patches, precision="highest")
    return jnp.concatenate([positions[:, :others], resized.reshape(1, new[0] * new[1], -1)], axis=1)


def _bicubic(old: int, new: int) -> Float64[np.ndarray, "new old"]:
    """What each of the old points counts in each of the new ones, along one axis."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(centres - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


def at_resolution(
    model: VisionTransformer, params: PyTree, height: int, width: int
) -> tuple[VisionTransformer, PyTree]:
    """The same model for pictures of another size: its positions are interpolated, all else is as it was."""
    down, across = model.config.patch
    if height % down or width % across:
        raise ConfigError(f"patches of {down} x {across} do not divide pictures of {height} x {width} pixels.")
    other = model.clone(image=(height, width, model.image[2]))
    return other, params | {"positions": interpolated(params["positions"], model.grid, other.grid)}


# --- what it looks at ---------------------------------------------------------------------------


def rollout(weights: Sequence[Float[Array, "batch _ tokens tokens"]]) -> Float[Array, "batch tokens tokens"]:
    """How much of each token of the input is in each of the output, if a layer did nothing but mix them.

    weights: of each layer, the first one first. The mean of the heads and, for the residual stream, the identity count
    half each (Abnar & Zuidema 2020, eq. 1).
    """
    product = jnp.eye(weights[0].shape[-1])
    for layer in weights:
        product = (0.5 * layer.mean(axis=1) + 0.5 * jnp.eye(layer.shape[-1])) @ product
    return product


def looked_at(
    model: VisionTransformer, params: PyTree, pictures: Float[Array, "batch height width channels"]
) -> Float[Array, "batch rows columns"]:
    """The rollout's shares of the patches in what the head reads, divided by their sum."""
    found = attention_weights(model, {"params": params}, pictures)
    if model.config.scan_layers:
        layers = list(found["layers.attention"])
    else:
        layers = [found[f"layers_{number}.attention"] for number in range(model.config.layers)]
    shares = rollout([jnp.asarray(layer, jnp.float32) for layer in layers])
    shares = shares[:, 0, 1:] if model.config.pooling == "class" else shares.mean(axis=1)
    return cast(Array, shares / shares.sum(axis=1, keepdims=True)).reshape(-1, *model.grid)
