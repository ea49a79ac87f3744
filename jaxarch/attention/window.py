"""Sliding-window self-attention in O(length * window) time and memory.

Blocks of queries each meet the few blocks of keys that their windows reach: dense attention on the part of the
mask where something may be seen (Beltagy et al. 2020, sec. 3.1).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxarch.attention.dense import by_heads
from jaxarch.attention.layout import filled, merged, split
from jaxarch.attention.options import Options

SMALLEST, LARGEST = 64, 256  # blocks of queries, as measured on CPU; between them a block is as long as the window


class Sizes(NamedTuple):
    """block: queries in one; before, after: blocks of keys that their windows reach beside their own."""

    block: int
    before: int
    after: int


def sizes(window: int, length: int, causal: bool, block: int | None = None) -> Sizes:
    block = min(block or min(max(window, SMALLEST), LARGEST), length)
    before = min(-(-(window - 1) // block), -(-length // block) - 1)
    return Sizes(block, before, 0 if causal else before)


def window_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    options: Options,
    block: int | None = None,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `window` and `return_lse`; without `q_offset`, `bias` and `dropout`."""
    mask, length = options.mask, q.shape[1]
    assert mask.window is not None
    block, before, after = sizes(mask.window, length, mask.causal, block)
    count = -(-length // block)

    def cut(x: Array, axis: int) -> Array:
        """Filled up to whole blocks along this axis, which is cut into a leading one of blocks and one of a block."""
        x = filled(x, axis, block)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)

    def spread(x: Array, axis: int) -> Array:
        """As `cut`, with each block's neighbours that its window reaches before and after it."""
        x = jnp.pad(cut(x, axis), [(before, after)] + [(0, 0)] * x.ndim)
        return jnp.concatenate([x[i : i + count] for i in range(before + 1 + after)], axis=axis + 1)

    start = jnp.zeros(q.shape[0], jnp.int32) if mask.kv_start is None else mask.kv_start
    end = jnp.full(q.shape[0], length, jnp.int32) if mask.kv_length is None else jnp.minimum(mask.kv_length, length)
    segments = None
    if mask.q_segments is not None and mask.kv_segments is not None:
        segments = cut(mask.q_segments, 1), spread(mask.kv_segments, 1)

    @jax.checkpoint
    def one(part: tuple[Int[Array, ""], Array, Array, Array, tuple | None]) -> tuple[Array, Array]:
        number, q, k, v, segments = part
        first = (number - before) * block  # the position of the first key
        own = mask._replace(
            q_offset=before * block, kv_start=start - first, kv_length=end - first,
            **({} if segments is None else {"q_segments": segments[0], "kv_segments": segments[1]}),
        )  # fmt: skip
        return by_heads(q, k, v, options._replace(mask=own))

    numbers = jnp.arange(count, dtype=jnp.int32)
    q, k, v = split(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out, lse = jax.lax.map(one, (numbers, cut(q, 3), spread(k, 2), spread(v, 2), segments))

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], count * block, *x.shape[5:])[:, :, :, :length]

    return merged(joined(out)), merged(joined(lse))
