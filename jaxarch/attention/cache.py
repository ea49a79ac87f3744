"""Keys and values kept while decoding: an explicit pytree of preallocated slots.

Prompts of unequal length are padded on the left, so that every row writes the same slot and one
`dynamic_update_slice` serves them all. A token's position is its slot less its row's first real slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxarch.attention.mask import MASKED


class KeyValues(NamedTuple):
    """Of one layer, or of all with a leading axis.

    Heads stand before slots, unlike everywhere else: so the products with a query read them as they lie.
    """

    keys: Float[Array, "*layers batch kv_heads slots dim"]
    values: Float[Array, "*layers batch kv_heads slots dim"]


class Cache(NamedTuple):
    """What decoding carries from token to token.

    layers: one entry a layer, or one stacked entry for layers that are scanned.
    index: slots filled, the same in every row.
    start: each row's first real slot; what lies before it is padding.
    memory, memory_segments: for layers with cross-attention, keys and values of the encoder's output, which the first
        call makes, and the numbers of its sequences.
    """

    layers: tuple[KeyValues, ...] | KeyValues
    index: Int[Array, ""]
    start: Int[Array, "batch"]
    memory: tuple[KeyValues, ...] | KeyValues | None = None
    memory_segments: Int[Array, "batch source"] | None = None


def empty_cache(
    layers: int,
    slots: int,
    kv_heads: int,
    dim: int,
    dtype: DTypeLike,
    start: Int[Array, "batch"],
    stacked: bool = False,
) -> Cache:
    """A cache with nothing in it, for rows whose first real token will stand in slot `start`.

    stacked: for layers that are scanned.
    """
    shape = (start.shape[0], kv_heads, slots, dim)

    def zeros(*leading: int) -> KeyValues:
        return KeyValues(jnp.zeros(leading + shape, dtype), jnp.zeros(leading + shape, dtype))

    entries = zeros(layers) if stacked else tuple(zeros() for _ in range(layers))
    return Cache(entries, jnp.zeros((), jnp.int32), start)


def append(
    past: KeyValues,
    keys: Float[Array, "batch length kv_heads dim"],
    values: Float[Array, "batch length kv_heads dim"],
    index: int | Int[Array, ""],
) -> KeyValues:
    """Writes the new tokens' keys and values from slot `index` on.

    The caller sees to it that they fit: `dynamic_update_slice` would move them back, over older ones.
    """

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2).astype(old.dtype), index, axis=2)

    return KeyValues(write(past.keys, keys), write(past.values, values))


def grown(cache: Cache, slots: int) -> Cache:
    """The same with room for `slots` tokens at least."""

    def grow(entry: Array) -> Array:
        more = max(0, slots - entry.shape[-2])
        return jnp.pad(entry, [(0, 0)] * (entry.ndim - 2) + [(0, more), (0, 0)])

    return cache._replace(layers=jax.tree.map(grow, cache.layers))


def take_rows(cache: PyTree, rows: Int[Array, "taken"]) -> PyTree:
    """The batch's `rows` of a cache or of anything that stands beside one, in this order and as often as they occur.

    The batch is the fourth axis from the last of `KeyValues`, which may have one of layers before it, and the first
    of every other array; scalars are of all rows alike.
    """

    def take(entry: PyTree) -> PyTree:
        if isinstance(entry, KeyValues):
            return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=-4, mode="clip"), entry)
        return entry if jnp.ndim(entry) == 0 else jnp.take(entry, rows, axis=0, mode="clip")

    return jax.tree.map(take, cache, is_leaf=lambda entry: isinstance(entry, KeyValues))


def padding_bias(slots: int, start: Int[Array, "batch"]) -> Float[Array, "batch 1 1 slots"]:
    """For the logits of attention over a cache: hides what lies before each row's first real slot.

    A `kv_start` would do the same, but also guard against NaN, which costs a copy of all keys and values
    for each token; a cache holds none.
    """
    return jnp.where(jnp.arange(slots) < start[:, None], MASKED, 0.0)[:, None, None]


def next_positions(cache: Cache, length: int) -> Int[Array, "batch length"]:
    """Positions of the next `length` tokens of each row; below 0 for padding."""
    return cache.index + jnp.arange(length) - cache.start[:, None]
