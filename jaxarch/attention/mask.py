"""Which key each query sees: said once, and asked by every implementation for the part that it is at."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASKED = -1e30  # finite, so that a row with nothing to see has a softmax and a gradient


class Mask(NamedTuple):
    """The rules that hide keys; a key is seen where all of them allow it.

    Query i stands at position i + q_offset, key j at position j.

    causal: no key after the query.
    window: only keys fewer than `window` positions from the query: its own counts, so that 1 leaves that alone.
        On both sides unless causal.
    q_segments, kv_segments: of packed sequences: only keys with the query's own number.
    kv_start, kv_length: of each row, the first key that counts and the one past the last.
    """

    causal: bool = False
    window: int | None = None
    q_offset: int | Int[Array, ""] = 0
    q_segments: Int[Array, "batch length"] | None = None
    kv_segments: Int[Array, "batch keys"] | None = None
    kv_start: Int[Array, "batch"] | None = None
    kv_length: Int[Array, "batch"] | None = None


def take(segments: Int[Array, "batch length"], numbers: Int[Array, "some"]) -> Int[Array, "batch some"]:
    """Those at these positions; past the end, whatever."""
    return jnp.take(segments, numbers, axis=1, mode="clip")


def visible(mask: Mask, queries: Int[Array, "some"], keys: Int[Array, "others"]) -> Bool[Array, "#batch some others"]:
    """Which of these keys each of these queries sees, both by number."""
    query, key = (queries + mask.q_offset)[:, None], keys[None, :]
    seen = jnp.ones((queries.shape[0], keys.shape[0]), bool)
    if mask.causal:
        seen = seen & (key <= query)
    if mask.window is not None:
        seen = seen & (key > query - mask.window) & (key < query + mask.window)
    seen = seen[None]
    if mask.q_segments is not None and mask.kv_segments is not None:
        seen = seen & (take(mask.q_segments, queries)[:, :, None] == take(mask.kv_segments, keys)[:, None, :])
    if mask.kv_start is not None:
        seen = seen & (keys >= mask.kv_start[:, None])[:, None]
    if mask.kv_length is not None:
        seen = seen & (keys < mask.kv_length[:, None])[:, None]
    return seen


def counted(mask: Mask, keys: int) -> Bool[Array, "#batch keys"] | None:
    """Which keys count for any query at all, by the options that may leave garbage in the others; None: all."""
    if mask.kv_start is None and mask.kv_length is None:
        return None
    numbers = jnp.arange(keys)
    return visible(Mask(kv_start=mask.kv_start, kv_length=mask.kv_length), jnp.zeros(1, jnp.int32), numbers)[:, 0]
