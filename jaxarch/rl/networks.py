"""What turns observations into features, and features into values, logits and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float, Shaped

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
        check_least(self, ("layers",), 0, "agent.model.")
        check_least(self, ("width", "channels"), 1, "agent.model.")


def orthogonal(scale: float = float(np.sqrt(2))) -> Initializer:
    return nn.initializers.orthogonal(scale)


class MLP(nn.Module):
    """Dense layers, each with its activation."""

    widths: Sequence[int]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch width"]:
        for width in self.widths:
            x = ACTIVATIONS[self.activation](nn.Dense(width, kernel_init=orthogonal())(x))
        return x


Layer = tuple[Float[Array, "_ _"], Float[Array, " _"]]  # a kernel, `[inputs, outputs]`, and a bias
FEW = 8  # inputs or outputs of a layer, and examples, whose product is faster as a sum


def product(x: Float[Array, "batch inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "batch outputs"]:
    """`x @ kernel`; of few inputs, or of few of all but inputs, as a sum that joins the arithmetic around it."""
    if len(kernel) <= FEW:
        return reduce(jnp.add, [x[:, i, None] * row for i, row in enumerate(kernel)])
    if max(len(x), kernel.shape[1]) <= FEW:
        return (x[:, :, None] * kernel).sum(1)
    return x @ kernel


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def perceptron(activation: str, layers: Sequence[Layer], x: Float[Array, "batch inputs"]) -> Float[Array, "batch _"]:
    """Dense layers, all but the last with their activation.

    With gradients of its own, for XLA:CPU: a weight gradient as autodiff writes it contracts the first axis of both
    its operands, which takes half as long again, and one of few outputs many times as long.
    """
    return _forward(activation, layers, x)[0]


def _forward(activation: str, layers: Sequence[Layer], x: Array) -> tuple[Array, Any]:
    inputs, pulls = [], []
    for number, (kernel, bias) in enumerate(layers):
        inputs.append(x)
        x = product(x, kernel) + bias
        if number < len(layers) - 1:
            x, pull = jax.vjp(ACTIVATIONS[activation], x)
            pulls.append(pull)
    return x, (layers, inputs, pulls)


def _backward(activation: str, kept: Any, gradient: Array) -> tuple[Any, Array]:
    layers, inputs, pulls = kept
    gradients = []
    for number, ((kernel, _), x) in reversed(list(enumerate(zip(layers, inputs)))):
        if kernel.shape[1] <= FEW:
            of_kernel = jnp.stack([column @ x for column in gradient.T], axis=1)
        else:
            # Behind the barrier the transpose is made; else the product would take its operand the slow way round.
            of_kernel = jax.lax.optimization_barrier(x.T) @ gradient
        gradients.append((of_kernel, gradient.sum(0)))
        of_input = product(gradient, kernel.T)
        gradient = pulls[number - 1](of_input)[0] if number else of_input
    return tuple(gradients[::-1]), gradient


perceptron.defvjp(_forward, _backward)


class Perceptron(nn.Module):
    """A whole network of dense layers: hidden ones with their activation, then heads, whose outputs are joined.

    heads: outputs of each and the scale at which it begins.
    """

    widths: Sequence[int]
    heads: Sequence[tuple[int, float]]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch outputs"]:
        def layer(name: str, inputs: int, outputs: int, scale: float) -> Layer:
            kernel = self.param(f"{name}_kernel", orthogonal(scale), (inputs, outputs))
            return kernel, self.param(f"{name}_bias", nn.initializers.zeros, (outputs,))

        inputs = (x.shape[-1], *self.widths)
        layers = [layer(f"hidden_{n}", inputs[n], width, float(np.sqrt(2))) for n, width in enumerate(self.widths)]
        heads = [layer(f"head_{n}", inputs[-1], outputs, scale) for n, (outputs, scale) in enumerate(self.heads)]
        layers.append(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *heads))
        rows = x.reshape(-1, x.shape[-1])
        found = cast(Array, perceptron(self.activation, tuple(layers), rows))
        return found.reshape(*x.shape[:-1], found.shape[-1])


class Convolutional(nn.Module):
    """A 3 x 3 convolution without padding and its activation, flattened: the network of MinAtar (Young & Tian 2019)."""

    features: int = 16
    activation: str = "relu"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch features"]:
        kernel = self.param("kernel", orthogonal(), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        found = convolve(x.astype(dtype), kernel.astype(dtype)) + bias
        return ACTIVATIONS[self.activation](found).reshape(len(x), -1)


def numbers(x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Bits and whole numbers as floating-point ones."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Flat(nn.Module):
    """Observations of this shape as numbers for dense layers: pictures through a convolution, of a discrete space the
    number as one of so many.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int = 0

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch features"]:
        if self.categories:
            return nn.one_hot(observations, self.categories)
        batch = observations.shape[: observations.ndim - len(self.shape)]
        if len(self.shape) == 3 and min(self.shape[:2]) >= 3:
            flat = observations.reshape(-1, *self.shape)
            found = Convolutional(self.config.channels, self.config.activation)(flat)
            return found.reshape(*batch, -1)
        return numbers(observations.reshape(*batch, -1))


class Torso(nn.Module):
    """Features of observations of this shape: numbers through dense layers, pictures through a convolution before
    them; of a discrete space the number as one of so many.

    categories: of a discrete observation space; 0: it is a box.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int = 0

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch features"]:
        config = self.config
        found = Flat(config, self.shape, self.categories)(observations)
        return MLP((config.width,) * config.layers, config.activation)(found)


class Network(nn.Module):
    """As `Torso`, and heads after it, `[*batch, outputs of all heads]`."""

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    heads: Sequence[tuple[int, float]]

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch outputs"]:
        found = Flat(self.config, self.shape, self.categories)(observations)
        return Perceptron((self.config.width,) * self.config.layers, self.heads, self.config.activation)(found)


class ActionValue(nn.Module):
    """The value of a continuous action at an observation: both joined, through dense layers."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, observations: Any, actions: Float[Array, "batch size"]) -> Float[Array, " batch"]:
        joined = jnp.concatenate([observations.reshape(len(actions), -1), actions], axis=-1)
        features = MLP((self.config.width,) * self.config.layers, self.config.activation)(joined)
        return nn.Dense(1, kernel_init=orthogonal(1.0))(features)[:, 0]
