"""Mixtures whose modes can be counted, and networks small enough to play a game in seconds.

The protocols are those of Srivastava et al. 2017 (VEEGAN, sec. 5.1) and Lin et al. 2018 (PacGAN, sec. 4): a ring of 8
and a grid of 25 Gaussians, and of thousands of samples how many lie near a mode, near how many of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

CEILING = 1 - np.exp(-4.5)  # share of a Gaussian in the plane within three standard deviations: 0.989


class Mixture(NamedTuple):
    """Equally likely Gaussians in the plane, of one standard deviation."""

    centres: Float[np.ndarray, "modes 2"]
    scale: float

    def samples(self, key: Key[Array, ""], count: int) -> Float[Array, "count 2"]:
        mode_key, key = jax.random.split(key)
        modes = jax.random.randint(mode_key, (count,), 0, len(self.centres))
        noise = jax.random.normal(key, (count, 2))
        return jnp.asarray(self.centres, noise.dtype)[modes] + self.scale * noise


def ring(modes: int = 8, radius: float = 1.0, scale: float = 0.01) -> Mixture:
    angles = 2 * np.pi * np.arange(modes) / modes
    return Mixture(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), scale)


def grid(side: int = 5, step: float = 0.5, scale: float = 0.0125) -> Mixture:
    """A square of `side` times `side` modes about the origin: the published one (step 2, deviation 0.05), a quarter as
    large, so that networks see numbers of the size that they are drawn for.
    """
    line = step * (np.arange(side) - (side - 1) / 2)
    return Mixture(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2), scale)


class Modes(NamedTuple):
    """What generated samples show of a mixture.

    found: modes near which at least one sample lies.
    high_quality: share of samples within three standard deviations of a mode; `CEILING` for the mixture itself.
    reverse_kl: KL(generated || mixture) in nats, of how such samples are spread over the modes.
    """

    found: Int[Array, ""]
    high_quality: Float[Array, ""]
    reverse_kl: Float[Array, ""]


def modes_of(samples: Float[Array, "count 2"], mixture: Mixture) -> Modes:
    """Modes and quality of samples (Srivastava et al. 2017, sec. 5.1)."""
    squares = jnp.sum((samples[:, None] - jnp.asarray(mixture.centres, samples.dtype)) ** 2, axis=-1)
    near = squares.min(axis=1) < (3 * mixture.scale) ** 2
    counts = jnp.zeros(len(mixture.centres)).at[squares.argmin(axis=1)].add(near)
    return Modes(jnp.sum(counts > 0), jnp.mean(near, dtype=counts.dtype), reverse_kl(counts))


def reverse_kl(counts: Float[Array, " modes"]) -> Float[Array, ""]:
    """KL(generated || uniform) in nats, from how many samples each mode has; log(modes) where none has any."""
    total = jnp.sum(counts)
    shares = counts / jnp.maximum(total, 1)
    divergence = jnp.sum(jax.scipy.special.xlogy(shares, shares * len(counts)))
    return jnp.where(total > 0, divergence, jnp.log(len(counts)))


class PointGenerator(nn.Module):
    """Latents to points, through hidden layers of leaky ReLU."""

    latent_dim: int = 2
    width: int = 128
    layers: int = 3
    dim: int = 2
    dtype: Any = None  # the computation's; by default that of the latents

    @nn.compact
    def __call__(
        self, latents: Float[Array, "batch latent"], condition: None = None, *, train: bool = True
    ) -> Float[Array, "batch dim"]:
        return _perceptron(self, latents, self.dim)


class PointDiscriminator(nn.Module):
    """Points to a logit each."""

    width: int = 128
    layers: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(
        self, samples: Float[Array, "batch dim"], condition: None = None, *, train: bool = True
    ) -> Float[Array, " batch"]:
        return _perceptron(self, samples, 1)[:, 0]


def _perceptron(
    module: PointGenerator | PointDiscriminator, x: Float[Array, "batch dim"], outputs: int
) -> Float[Array, "batch outputs"]:
    for _ in range(module.layers):
        x = nn.leaky_relu(nn.Dense(module.width, dtype=module.dtype, kernel_init=nn.initializers.he_normal())(x), 0.2)
    return nn.Dense(outputs, dtype=module.dtype)(x)
