"""DCGAN (Radford et al. 2016) for pictures of 8, 16, 32 ... pixels, and its conditional forms.

Both networks halve or double the picture between 4 x 4 and its size, by strided convolutions of 4 x 4 alone; the
width doubles with each halving. What follows a convolution is normalised, but not at the pictures' side. `deep` adds
the convolutions of 3 x 3 of Miyato et al. 2018, table 3; with spectral normalisation and the hinge loss these are its
networks.

How a label is told to the generator:

    embedding    as a vector joined to the latents (Mirza & Osindero 2014)
    batch_norm   by the scales and biases of batch normalisation (Dumoulin et al. 2017)

and to the discriminator:

    embedding    as one more plane of the picture, which is learned (Mirza & Osindero 2014)
    projection   by the product of the features with a vector of the class (Miyato & Koyama 2018, eq. 4)
    auxiliary    not at all: it has to tell the classes apart beside its judgement (Odena et al. 2017)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxarch.gan.convolution import Convolution, Dense, TransposedConvolution
from jaxarch.gan.minibatch import minibatch_deviation
from jaxarch.gan.normalization import BatchNorm, chosen
from jaxarch.gan.spectral import spectral_kernel
from jaxarch.run.protocol import ConfigError, check_least

GeneratorCondition = Literal["embedding", "batch_norm"]
DiscriminatorCondition = Literal["embedding", "projection", "auxiliary"]
NormName = Literal["batch", "spectral", "none"]
SMALLEST = 4  # pixels along a side of the picture between a dense layer and convolutions
WIDEST = 8  # times `features`: the width from 64 pixels on


def widths(size: int, features: int, deep: bool = False) -> list[int]:
    """Features at each halving, from the picture's side on: `features` at half its size, then twice as many each time.

    deep: at the picture's size already, and so once more.
    Raises ConfigError for a size that is no 4 x 2^k.
    """
    halvings = (size // SMALLEST).bit_length() - 1
    if halvings < 1 or size != SMALLEST << halvings:
        raise ConfigError(f"--size {size} is not 8, 16, 32, 64 or another power of two.")
    return [features * min(1 << step, WIDEST) for step in range(halvings + deep)]


def leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.2)  # Radford et al. 2016, sec. 4


@dataclass(frozen=True)
class DCGANConfig:
    latents: int = 100
    """numbers that a picture is made of"""
    features: int = 64
    """features at half the picture's size; twice as many at each further halving"""
    norm: NormName = "batch"
    """of the discriminator: batch normalisation, spectral normalisation, none"""
    deep: bool = False
    """convolutions of 3 x 3 as well: before each halving and after the last, and the generator's last"""
    minibatch_deviation: bool = False
    """tell the discriminator how much a batch's pictures differ"""

    def __post_init__(self) -> None:
        check_least(self, ("latents", "features"), 1, "model.")


class Embedding(nn.Module):
    """A vector of each class."""

    classes: int
    features: int
    spectral: bool = False

    @nn.compact
    def __call__(
        self, labels: Int[Array | np.ndarray, " batch"] | None, train: bool = True
    ) -> Float[Array, "batch features"]:
        table: Any = self.param("embedding", nn.initializers.normal(1.0), (self.classes, self.features))
        if self.spectral:
            table = spectral_kernel(self, table, train)
        return chosen(table, labels)


class Generator(nn.Module):
    """Latents to pictures in (-1, 1), through a dense layer and transposed convolutions (Radford et al. 2016, fig. 1).

    deep: the last of them does not make the picture yet, but one of 3 x 3 after it (Miyato et al. 2018, table 3).
    classes: of the labels; 0: there are none, and `told` is without effect.
    """

    size: int
    channels: int
    latent_dim: int = 100
    features: int = 64
    deep: bool = False
    classes: int = 0
    told: GeneratorCondition = "batch_norm"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch latent_dim"],
        condition: Int[Array | np.ndarray, " batch"] | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, "batch size size channels"]:
        x = latents.astype(self.dtype)
        by_norm = self.classes if self.told == "batch_norm" else 0
        if self.classes and not by_norm:
            vectors = Embedding(self.classes, self.latent_dim, name="embedding")(condition)
            x = jnp.concatenate([x, vectors.astype(x.dtype)], axis=-1)
        *rest, first = widths(self.size, self.features, self.deep)
        x = Dense(SMALLEST * SMALLEST * first, use_bias=False, name="dense")(x)
        x = x.reshape(-1, SMALLEST, SMALLEST, first)
        for number, width in enumerate(rest[::-1]):
            x = nn.relu(BatchNorm(by_norm, name=f"norm_{number}")(x, condition, train))
            x = TransposedConvolution(width, name=f"up_{number}")(x)
        x = nn.relu(BatchNorm(by_norm, name=f"norm_{len(rest)}")(x, condition, train))
        last = Convolution if self.deep else TransposedConvolution
        x = last(self.channels, use_bias=True, name="picture")(x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """Pictures to logits, through convolutions of stride 2 and a dense layer (Radford et al. 2016, sec. 3).

    deep: before each of them and after the last another one of 3 x 3 (Miyato et al. 2018, table 3).
    classes: of the labels; 0: there are none, and `told` is without effect. With an auxiliary classifier it gives the
        logits and those of the classes.
    """

    features: int = 64
    norm: NormName = "batch"
    deep: bool = False
    minibatch_deviation: bool = False
    classes: int = 0
    told: DiscriminatorCondition = "projection"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        samples: Float[Array | np.ndarray, "batch size size channels"],
        condition: Int[Array | np.ndarray, " batch"] | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, " batch"] | tuple[Float[Array, " batch"], Float[Array, "batch classes"]]:
        x = jnp.asarray(samples, self.dtype)
        size, told = x.shape[1], self.told if self.classes else None
        spectral = self.norm == "spectral"
        if told == "embedding":
            plane = Embedding(self.classes, size * size, spectral, name="embedding")(condition, train)
            x = jnp.concatenate([x, plane.astype(x.dtype).reshape(-1, size, size, 1)], axis=-1)
        layers = []
        for width in widths(size, self.features):
            layers += [(width, 3, 1)] if self.deep else []
            layers += [(width, 4, 2)]
        if self.deep:
            layers += [(widths(size, self.features, deep=True)[-1], 3, 1)]
        for number, layer in enumerate(layers):
            normalizes = self.norm == "batch" and number > 0
            x = Convolution(*layer, use_bias=not normalizes, spectral=spectral, name=f"layer_{number}")(x, train)
            if normalizes:
                x = BatchNorm(name=f"norm_{number}")(x, train=train)
            x = leaky_relu(x)
        features = x
        if self.minibatch_deviation:
            x = minibatch_deviation(x)
        x = x.reshape(len(x), -1)
        logits = Dense(1, spectral=spectral, name="logit")(x, train)[:, 0]
        if told == "projection":
            vectors = Embedding(self.classes, features.shape[-1], spectral, name="embedding")(condition, train)
            logits = logits + jnp.sum(features.sum((1, 2)) * vectors.astype(x.dtype), axis=-1)
        if told == "auxiliary":
            return logits, Dense(self.classes, spectral=spectral, name="classes")(x, train)
        return logits


def dcgan(
    config: DCGANConfig,
    image: Sequence[int],
    classes: int = 0,
    told: tuple[GeneratorCondition, DiscriminatorCondition] = ("batch_norm", "projection"),
    dtype: DTypeLike = jnp.float32,
) -> tuple[Generator, Discriminator]:
    """Both networks for pictures of this height, width and number of channels.

    classes, told: of a conditional pair: how the labels are told to the generator, and to the discriminator.
    Raises ConfigError where the size is no 4 x 2^k.
    """
    height, width, channels = image
    widths(height, config.features)
    if height != width:
        raise ConfigError(f"pictures of {height} x {width} pixels are not square; --size makes them so.")
    generator = Generator(height, channels, config.latents, config.features, config.deep, classes, told[0], dtype)
    discriminator = Discriminator(
        config.features, config.norm, config.deep, config.minibatch_deviation, classes, told[1], dtype
    )
    return generator, discriminator
