"""Where a token stands, as numbers to add or angles to turn by. Learned positions are the decoder's."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoidal(positions: Int[Array, "*batch"], dim: int, base: float = 10000.0) -> Float[Array, "*batch {dim}"]:
    """sin and cos of the position at `dim / 2` wavelengths, interleaved (Vaswani et al. 2017, sec. 3.5).

    dim: even.
    """
    angles = _angles(positions, dim, base)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, dim)


def rotary(
    x: Float[Array, "batch length heads dim"], positions: Int[Array, "#batch length"], base: float = 10000.0
) -> Float[Array, "batch length heads dim"]:
    """Turns pairs of features by position * base ** (-2 i / dim) (Su et al. 2021, eq. 34), in float32.

    Feature i is paired with i + dim / 2 (half-split, as in Llama's published weights; the paper pairs
    neighbours). dim: even.
    """
    # A rotation of both q and k by the same angle cancels in their product, so only the distance matters.
    angles = _angles(positions, x.shape[-1], base)[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _angles(positions: Int[Array, "*batch"], dim: int, base: float) -> Float[Array, "*batch pairs"]:
    return positions[..., None] * base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
