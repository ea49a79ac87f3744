"""Dropout of attention weights, whose pattern does not depend on how they are cut into blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def kept(
    key: Key[Array, ""], rate: float, batch: int, heads: int, queries: Int[Array, "some"], keys: Int[Array, "others"]
) -> Float[Array, "batch heads some others"]:
    """1 / (1 - rate) where the weight of this query and key, by number, is kept, else 0 (Srivastava et al. 2014).

    Each number is drawn from the key, the row, the head, the query and the key alone.
    """
    each = jnp.vectorize(jax.random.fold_in)
    rows = each(key, jnp.arange(batch * heads).reshape(batch, heads))
    rows = each(rows[:, :, None], queries)
    bits = jax.random.key_data(each(rows[..., None], keys))[..., -1]
    return jnp.where(bits >= jnp.uint32(rate * 2**32), 1 / (1 - rate), 0.0)
