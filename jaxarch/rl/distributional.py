"""Distributions of returns, and what moves one towards another."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def projected(
    probabilities: Float[Array, "*batch atoms"],
    atoms: Float[Array, "*batch atoms"],
    support: Float[Array, " atoms"],
) -> Float[Array, "*batch atoms"]:
    """A distribution on `atoms` carried over to the evenly spaced `support` (Bellemare et al. 2017, eq. 7).

    The probability of each atom is shared between the two points of the support beside it, by nearness; beyond the
    support its end takes it all.
    """
    apart = support[1] - support[0]
    clipped = jnp.clip(atoms, support[0], support[-1])
    shares = jnp.clip(1 - jnp.abs(clipped[..., None, :] - support[:, None]) / apart, 0, 1)
    return jnp.sum(shares * probabilities[..., None, :], axis=-1)


def quantile_loss(
    quantiles: Float[Array, "*batch quantiles"],
    levels: Float[Array, "*#batch quantiles"],
    samples: Float[Array, "*batch samples"],
    kappa: float = 1.0,
) -> Float[Array, "*batch"]:
    """The quantile Huber loss (Dabney et al. 2018b, eq. 10): summed over `quantiles` of these `levels` in (0, 1), the
    mean over samples of the return. It is least where each quantile has its level of the samples below it, exactly
    for kappa 0.
    """
    errors = samples[..., None, :] - quantiles[..., :, None]
    size = jnp.abs(errors)
    huber = jnp.where(size <= kappa, jnp.square(errors) / (2 * kappa), size - kappa / 2) if kappa else size
    weights = jnp.abs(levels[..., None] - (errors < 0))
    return jnp.mean(weights * huber, axis=-1).sum(axis=-1)
