"""What turns observations into features, and features into values, logits and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxarch.convolution import convolve
from jaxarch.run import check_least

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu}


@dataclass(frozen=True)
class NetworkConfig:
    layers: int = 2
    """hidden layers"""
    width: int = 64
    """their units"""
    activation: Literal["tanh", "relu", "silu"] = "tanh"
    channels: int = 16
    """features of the convolution before them, where observations are pictures"""

    def __post_init__(self) -> None:
        check_least(self, ("layers",), 0, "model.")
        check_least(self, ("width", "channels"), 1, "model.")


def orthogonal(scale: float = float(np.sqrt(2))) -> Initializer:
    return nn.initializers.orthogonal(scale)


class MLP(nn.Module):
    """Dense layers, each with its activation."""

    widths: Sequence[int]
    activation: str = "tanh"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch width"]:
        for width in self.widths:
            x = ACTIVATIONS[self.activation](nn.Dense(width, kernel_init=orthogonal(), dtype=self.dtype)(x))
        return x


class Convolutional(nn.Module):
    """A 3 x 3 convolution without padding and its activation, flattened: the network of MinAtar (Young & Tian 2019)."""

    features: int = 16
    activation: str = "relu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        kernel = self.param("kernel", orthogonal(), (3, 3, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        found = convolve(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return ACTIVATIONS[self.activation](found).reshape(len(x), -1)


class Torso(nn.Module):
    """Features of observations of this shape: numbers through dense layers, pictures through a convolution before
    them; of a discrete space the number as one of so many.

    categories: of a discrete observation space; 0: it is a box.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch features"]:
        config = self.config
        dense = MLP((config.width,) * config.layers, config.activation, self.dtype)
        if self.categories:
            return dense(nn.one_hot(observations, self.categories, dtype=self.dtype))
        batch = observations.shape[: observations.ndim - len(self.shape)]
        if len(self.shape) == 3 and min(self.shape[:2]) >= 3:
            flat = observations.reshape(-1, *self.shape)
            found = Convolutional(config.channels, config.activation, self.dtype)(flat)
            return dense(found.reshape(*batch, -1))
        return dense(observations.reshape(*batch, -1).astype(self.dtype))


class ActionValue(nn.Module):
    """The value of a continuous action at an observation: both joined, through dense layers."""

    config: NetworkConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observations: Any, actions: Float[Array, "batch size"]) -> Float[Array, " batch"]:
        joined = jnp.concatenate([observations.reshape(len(actions), -1), actions], axis=-1).astype(self.dtype)
        features = MLP((self.config.width,) * self.config.layers, self.config.activation, self.dtype)(joined)
        return nn.Dense(1, kernel_init=orthogonal(1.0), dtype=self.dtype)(features)[:, 0]
