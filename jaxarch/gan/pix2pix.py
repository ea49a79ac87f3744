"""Pictures into pictures, learned from pairs: the networks of pix2pix (Isola et al. 2017).

The generator's condition is the picture that it translates, which the discriminator sees beside the other one. It is
trained by the common step (`jaxarch.gan.training`), with `l1` as the step's `extra`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxarch.data.images import scaled, unscaled
from jaxarch.gan.convolution import Convolution, TransposedConvolution
from jaxarch.gan.normalization import BatchNorm
from jaxarch.run import ConfigError, check_least

NormName = Literal["instance", "batch", "none"]
SLOPE = 0.2  # of the leaky units
NORM_EPS = 1e-5
DROPPED = 3  # layers of the decoder with dropout, the first ones


def instance_norm(x: Float[Array, "batch height width features"]) -> Float[Array, "batch height width features"]:
    """Each feature of each picture with mean 0 and variance 1 (Ulyanov et al. 2016, eq. 1), without parameters."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, (1, 2), keepdims=True)
    variance = jnp.mean(centred * centred, (1, 2), keepdims=True)
    return (centred * jax.lax.rsqrt(variance + NORM_EPS)).astype(x.dtype)


def normalized(
    norm: NormName, x: Float[Array, "batch height width features"], train: bool, name: str
) -> Float[Array, "batch height width features"]:
    """Called within a module, whose part of that name a norm with parameters becomes."""
    if norm == "batch":
        return BatchNorm(eps=NORM_EPS, name=name)(x, train=train)
    return instance_norm(x) if norm == "instance" else x


class UNet(nn.Module):
    """An encoder that halves the picture down to few pixels, a decoder that doubles them, and skips between layers of
    equal size (Isola et al. 2017, sec. 3.2.1 and app. 6.1.1).

    It has no latents: what is random is the dropout, in training.

    channels: of the picture that it makes.
    features: of the first layer; each next has twice as many, at most 8 times.
    depth: how often the picture is halved; 0: until a single pixel is left, which needs a side of a power of two.
    """

    channels: int
    features: int = 64
    depth: int = 0
    norm: NormName = "instance"
    dropout: float = 0.5
    latent_dim: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Any, condition: Any, *, train: bool = True) -> Float[Array, "batch h w channels"]:
        depth = unet_depth(condition.shape[1:3], self.depth)
        sizes = [self.features * min(2**i, 8) for i in range(depth)]
        x, skips = jnp.asarray(condition, self.dtype), []
        for i, features in enumerate(sizes):
            if i:
                x = nn.leaky_relu(x, SLOPE)
            # Without a norm at the first layer, nor at the last: a single pixel would become 0.
            plain = i in (0, depth - 1) or self.norm == "none"
            x = Convolution(features, 4, 2, use_bias=plain, name=f"down_{i}")(x)
            x = x if plain else normalized(self.norm, x, train, f"down_norm_{i}")
            skips.append(x)
        for i in reversed(range(depth)):
            x = nn.relu(x)
            features = sizes[i - 1] if i else self.channels
            plain = i == 0 or self.norm == "none"
            x = TransposedConvolution(features, use_bias=plain, name=f"up_{i}")(x)
            if not i:
                break
            x = x if plain else normalized(self.norm, x, train, f"up_norm_{i}")
            if i >= depth - DROPPED:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = jnp.concatenate([skips[i - 1], x], -1)
        return jnp.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


def unet_depth(size: tuple[int, int], depth: int = 0) -> int:
    """How often a U-Net halves a picture of that height and width; 0: until its shorter side is a single pixel.

    Raises ConfigError where it cannot.
    """
    chosen = depth or min(size).bit_length() - 1
    if chosen < 1 or any(side % 2**chosen for side in size):
        raise ConfigError(
            f"--model.depth {depth} (0: down to one pixel) does not fit pictures of {size[0]} x {size[1]}: both sides "
            f"must be a multiple of {2 ** max(chosen, 1)}; a --size that is a power of two always fits."
        )
    return chosen


class PatchDiscriminator(nn.Module):
    """A logit for each patch of a picture (Isola et al. 2017, sec. 3.2.2 and app. 6.1.2); beside a condition, where it
    is a picture.

    strided: layers that halve the picture. A logit sees 16 x 16 pixels with 1 of them, 34 with 2, 70 with 3.
    """

    features: int = 64
    strided: int = 3
    norm: NormName = "instance"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, samples: Any, condition: Any = None, *, train: bool = True) -> Float[Array, "batch h w"]:
        sides, step = samples.shape[1:3], 2**self.strided
        if min(sides) < 3 * step or any(side % step for side in sides):
            raise ConfigError(
                f"--model.strided {self.strided} needs pictures whose sides are multiples of {step} and at least "
                f"{3 * step}, not of {sides[0]} x {sides[1]}; a lower one or a larger --size would do."
            )
        x = samples if condition is None else jnp.concatenate([condition, samples], -1)
        x = jnp.asarray(x, self.dtype)
        for i in range(self.strided + 1):
            stride = 2 if i < self.strided else 1
            plain = i == 0 or self.norm == "none"
            x = Convolution(self.features * min(2**i, 8), 4, stride, use_bias=plain, name=f"conv_{i}")(x)
            x = x if stride == 2 else _inner(x)
            x = x if plain else normalized(self.norm, x, train, f"norm_{i}")
            x = nn.leaky_relu(x, SLOPE)
        x = _inner(Convolution(1, 4, use_bias=True, name="logits")(x))
        return x[..., 0].astype(jnp.promote_types(x.dtype, jnp.float32))


def _inner(x: Float[Array, "batch h w features"]) -> Float[Array, "batch new_h new_w features"]:
    """With one row and column of zeros around the picture, as published: not the last ones, which saw two."""
    return x[:, :-1, :-1]


def l1(weight: float) -> Callable[[Any, Any, Any], Float[Array, ""]]:
    """The distance to the target, as the step's `extra` (Isola et al. 2017, eq. 3, with a weight of 100)."""

    def extra(made: Array, target: Array, condition: Any) -> Float[Array, ""]:
        return weight * jnp.mean(jnp.abs(made - target))

    return extra


@dataclass(frozen=True)
class Pix2PixConfig:
    features: int = 64
    """of the generator's first layer, which later ones have up to 8 times"""
    depth: int = 0
    """how often the generator halves the picture (0: down to a single pixel)"""
    dropout: float = 0.5
    """in the first three layers of the decoder"""
    d_features: int = 64
    """of the discriminator's first layer, which later ones have up to 8 times"""
    strided: int = 3
    """layers by which the discriminator halves the picture: a logit sees 16 pixels with 1, 34 with 2, 70 with 3"""
    norm: NormName = "instance"

    def __post_init__(self) -> None:
        check_least(self, ("features", "d_features"), 1, "model.")
        check_least(self, ("depth", "strided"), 0, "model.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1).")


def pix2pix(config: Pix2PixConfig, channels: int, dtype: Any = jnp.float32) -> tuple[UNet, PatchDiscriminator]:
    """The generator of pictures of so many channels, and the discriminator."""
    return (
        UNet(channels, config.features, config.depth, config.norm, config.dropout, dtype=dtype),
        PatchDiscriminator(config.d_features, config.strided, config.norm, dtype),
    )


# --- what translations are worth ----------------------------------------------------------------


def translated(
    translate: Callable[[Array], Array], pixels: UInt8[np.ndarray, "pictures height width _"], batch_size: int = 64
) -> UInt8[np.ndarray, "pictures height width channels"]:
    """On the host, a batch at a time; `translate` is a compiled function of pictures in [-1, 1]."""
    some = min(batch_size, len(pixels))
    out = []
    for start in range(0, len(pixels), some):
        rows = np.minimum(np.arange(start, start + some), len(pixels) - 1)  # all batches alike: one program
        out.append(unscaled(np.asarray(translate(scaled(pixels[rows])))))
    return np.concatenate(out)[: len(pixels)]


def mean_distance(one: UInt8[np.ndarray, "*shape"], other: UInt8[np.ndarray, "*shape"]) -> float:
    """The mean absolute difference, black to white being 1."""
    return float(np.mean(np.abs(one.astype(np.float32) - other)) / 255)


def peak_signal_to_noise(
    one: UInt8[np.ndarray, "pictures *shape"], other: UInt8[np.ndarray, "pictures *shape"]
) -> float:
    """10 log10(255^2 / mean squared difference) in decibels, the mean over pictures; at most 100 for each."""
    squares = np.square(one.astype(np.float32) - other).reshape(len(one), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(squares, 255**2 * 1e-10))))
