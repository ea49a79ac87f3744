"""Attention in O(length) memory, forward and backward, with every option.

Blocks of queries meet blocks of keys. The softmax is put together on the way (Milakov & Gimelshein 2018, alg. 3), and
the backward pass makes the weights again from the logarithm of their sum (Dao et al. 2022, alg. 4). Blocks of which
the mask shows nothing are not visited.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxarch.attention.dropout import kept
from jaxarch.attention.layout import filled, grouped, merged, products, split
from jaxarch.attention.mask import MASKED, Mask, visible
from jaxarch.attention.options import Options

QUERIES, KEYS = 512, 256  # in a block, as measured on CPU

Pair = tuple[Array, Array]  # output, log-sum-exp
Saved = tuple[Any, Array, Array, Array, Array | None, Array | None, Array, Array]  # arguments of attend, its results


class Static(NamedTuple):
    """What decides the program, beside the shapes. keys: their number before they were filled up to whole blocks."""

    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    dropout: float
    keys: int
    block_queries: int
    block_keys: int


class Fixed(NamedTuple):
    """Arrays that no gradient flows to."""

    mask: Mask  # without what is static
    dropout_key: Key[Array, ""] | None


def blockwise_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    options: Options,
    block_queries: int = QUERIES,
    block_keys: int = KEYS,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `return_lse`."""
    mask, scale, bias, soft_cap, sinks, dropout, dropout_key, _ = options
    length, keys = q.shape[1], k.shape[1]
    block_queries, block_keys = min(block_queries, length), min(block_keys, keys)
    static = Static(mask.causal, mask.window, soft_cap, scale, dropout, keys, block_queries, block_keys)
    fixed = Fixed(mask._replace(causal=False, window=None), dropout_key)
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q, k, v = filled(q, 1, block_queries), filled(k, 1, block_keys), filled(v, 1, block_keys)
    if bias is not None:
        bias = bias if bias.shape[2] == 1 else filled(bias, 2, block_queries)
        bias = bias if bias.shape[3] == 1 else filled(bias, 3, block_keys)
        bias = grouped(bias, kv_heads, group)
    out, lse = cast(Pair, attend(static, fixed, q, k, v, bias, sinks))
    return out[:, :length], lse[:, :length]


# From here on the lengths are whole blocks, and a bias is [batch, kv_heads, group, length, keys].


def _part(x: Array, axis: int, number: Int[Array, ""], block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, number * block, block, axis)


def _stacked(x: Array) -> Array:
    """Blocks in a leading axis put one after another, along the axis after the batch."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _like(x: Array, shape: tuple[int, ...], dtype: DTypeLike, value: float = 0.0) -> Array:
    """Filled with the value; inside a shard_map it varies over the same devices as x, as a loop's carry must."""
    return jax.lax.full_like(x, value, dtype, shape)


def _key_range(static: Static, mask: Mask, i: Int[Array, ""], blocks: int) -> tuple[Array, Array]:
    """The first and the end of the blocks of keys that block i of the queries may see."""
    first, last = i * static.block_queries + mask.q_offset, (i + 1) * static.block_queries - 1 + mask.q_offset
    low, high = jnp.int32(0), jnp.int32(static.keys - 1)  # keys
    if static.causal:
        high = jnp.minimum(high, last)
    if static.window is not None:
        low, high = jnp.maximum(low, first - static.window + 1), jnp.minimum(high, last + static.window - 1)
    return _blocks(static.block_keys, blocks, *_counted_range(mask, low, high))


def _query_range(static: Static, mask: Mask, j: Int[Array, ""], blocks: int) -> tuple[Array, Array]:
    """The first and the end of the blocks of queries that may see block j of the keys."""
    first, last = j * static.block_keys, (j + 1) * static.block_keys - 1
    low, high = jnp.int32(0), jnp.int32(blocks * static.block_queries - 1)  # queries
    if static.causal:
        low = jnp.maximum(low, first - mask.q_offset)
    if static.window is not None:
        low = jnp.maximum(low, first - static.window + 1 - mask.q_offset)
        high = jnp.minimum(high, last + static.window - 1 - mask.q_offset)
    start, end = _counted_range(mask, jnp.int32(0), jnp.int32(static.keys - 1))
    high = jnp.where((last < start) | (first > end), low - 1, high)
    return _blocks(static.block_queries, blocks, low, high)


def _counted_range(mask: Mask, low: Array, high: Array) -> tuple[Array, Array]:
    if mask.kv_start is not None:
        low = jnp.maximum(low, mask.kv_start.min())
    if mask.kv_length is not None:
        high = jnp.minimum(high, mask.kv_length.max() - 1)
    return low, high


def _blocks(size: int, count: int, low: Array, high: Array) -> tuple[Array, Array]:
    """The blocks that hold low ... high, as a first one and an end."""
    first, end = jnp.clip(low // size, 0, count), jnp.clip(high // size + 1, 0, count)
    return first.astype(jnp.int32), end.astype(jnp.int32)


class Block(NamedTuple):
    """What is made of one block of queries and one of keys, as [batch, kv_heads, group, queries, keys]."""

    logits: Array  # masked
    capped: Array | None  # before bias and mask, where there is a soft cap
    kept: Array | None  # the factors of dropout


def _block(static: Static, fixed: Fixed, q: Array, k: Array, bias: Array | None, i: Array, j: Array) -> Block:
    batch, kv_heads, group = q.shape[:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = products(q, k, wide) * static.scale
    capped = None
    if static.soft_cap is not None:
        logits = capped = static.soft_cap * jnp.tanh(logits / static.soft_cap)
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else _part(bias, 3, i, static.block_queries)
        bias = bias if bias.shape[4] == 1 else _part(bias, 4, j, static.block_keys)
        logits = logits + bias.astype(wide)
    queries = i * static.block_queries + jnp.arange(static.block_queries)
    keys = j * static.block_keys + jnp.arange(static.block_keys)
    mask = fixed.mask._replace(causal=static.causal, window=static.window)
    seen = visible(mask, queries, keys) & (keys < static.keys)
    logits = logits + jnp.where(seen, 0.0, MASKED).astype(wide)[:, None, None]
    dropped = None
    if fixed.dropout_key is not None:
        dropped = kept(fixed.dropout_key, static.dropout, batch, kv_heads * group, queries, keys)
        dropped = grouped(dropped, kv_heads, group)
    return Block(logits, capped, dropped)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    static: Static, fixed: Fixed, q: Array, k: Array, v: Array, bias: Array | None, sinks: Array | None
) -> tuple[Array, Array]:
    batch, length, heads, _ = q.shape
    kv_heads, key_blocks = k.shape[2], k.shape[1] // static.block_keys
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # What the inner loop reads again and again is laid out for it; all else is read as it lies, and costs no memory.
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def rows(i: Array) -> tuple[Array, Array]:
        queries = split(_part(q, 1, i, static.block_queries), kv_heads)

        def meet(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = carry
            block = _block(static, fixed, queries, _part(k, 2, j, static.block_keys), bias, i, j)
            new_top = jnp.maximum(top, block.logits.max(axis=-1))
            weights = jnp.exp(block.logits - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + weights.sum(axis=-1)
            if block.kept is not None:
                weights = weights * block.kept
            values = _part(v, 2, j, static.block_keys)
            more = products(weights.astype(v.dtype), values.swapaxes(2, 3), wide)
            return new_top, total, out * shrink[..., None] + more

        shape = batch, kv_heads, heads // kv_heads, static.block_queries
        # Half of MASKED: whatever is hidden lies so far below that its weight is exactly 0.
        top, total = _like(q, shape, wide, MASKED / 2), _like(q, shape, wide)
        if sinks is not None:
            top, total = top * 0 + sinks.astype(wide).reshape(kv_heads, -1)[..., None], total + 1
        low, high = _key_range(static, fixed.mask, i, key_blocks)
        top, total, out = jax.lax.fori_loop(low, high, meet, (top, total, _like(q, (*shape, v.shape[-1]), wide)))
        nothing = total == 0
        out = out / jnp.where(nothing, 1, total)[..., None]
        lse = jnp.where(nothing, -jnp.inf, top + jnp.log(jnp.where(nothing, 1, total)))
        return merged(out.astype(v.dtype)), merged(lse)

    out, lse = jax.lax.map(rows, jnp.arange(length // static.block_queries, dtype=jnp.int32))
    return _stacked(out), _stacked(lse)


def _forward(
    static: Static, fixed: Fixed, q: Array, k: Array, v: Array, bias: Array | None, sinks: Array | None
) -> tuple[Pair, Saved]:
    out, lse = cast(Pair, attend(static, fixed, q, k, v, bias, sinks))
    return (out, lse), (fixed, q, k, v, bias, sinks, out, lse)


def _backward(static: Static, saved: Saved, cotangents: Pair) -> tuple:
    def narrow(d: Array | None, x: Array | None) -> Array | None:
        return None if d is None or x is None else d.astype(x.dtype)

    return None, *map(narrow, gradients(static, saved, cotangents), saved[1:6])


def gradients(static: Static, saved: Saved, cotangents: Pair) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Of queries, keys, values, bias and sinks, in float32 at least.

    Where out and lse are those over more keys than these, the shares of these keys in the gradients.
    """
    fixed, q, k, v, bias, sinks, out, lse = saved
    d_out, d_lse = cotangents
    wide = jnp.promote_types(q.dtype, jnp.float32)
    kv_heads, query_blocks = k.shape[2], q.shape[1] // static.block_queries
    # The softmax's gradient is weights * (d_weights - delta) (Dao et al. 2022, eq. 4), the log-sum-exp's the weights.
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1) - d_lse
    finite_lse = jnp.where(jnp.isneginf(lse), 0, lse)  # of a row that sees nothing: its weights become 0
    by_q, by_d_out, by_lse, by_delta = (split(x, kv_heads) for x in (q, d_out, finite_lse, delta))

    def columns(carry: tuple, j: Array) -> tuple[tuple, tuple[Array, Array]]:
        keys, values = (_part(x, 1, j, static.block_keys).swapaxes(1, 2) for x in (k, v))

        def meet(i: Array, carry: tuple) -> tuple:
            d_q, d_bias, d_k, d_v = carry
            queries, d_rows = (_part(x, 3, i, static.block_queries) for x in (by_q, by_d_out))
            row_lse, row_delta = (_part(x, 3, i, static.block_queries)[..., None] for x in (by_lse, by_delta))
            block = _block(static, fixed, queries, keys, bias, i, j)
            weights = jnp.exp(block.logits - row_lse)
            d_weights = products(d_rows, values, wide)
            dropped = weights
            if block.kept is not None:
                dropped, d_weights = weights * block.kept, d_weights * block.kept
            d_v += _summed(dropped.astype(v.dtype), d_rows, wide)
            d_logits = weights * (d_weights - row_delta)
            if bias is not None:
                d_bias = _add_bias(static, d_bias, d_logits, i, j)
            if block.capped is not None and static.soft_cap is not None:
                d_logits *= 1 - jnp.square(block.capped / static.soft_cap)
            d_logits = (d_logits * static.scale).astype(q.dtype)
            d_k += _summed(d_logits, queries, wide)
            more = products(d_logits, keys.swapaxes(2, 3), wide)
            more = _part(d_q, 1, i, static.block_queries) + merged(more)
            d_q = jax.lax.dynamic_update_slice_in_dim(d_q, more, i * static.block_queries, 1)
            return d_q, d_bias, d_k, d_v

        zeros = _like(q, keys.shape, wide), _like(q, values.shape, wide)
        low, high = _query_range(static, fixed.mask, j, query_blocks)
        d_q, d_bias, d_k, d_v = jax.lax.fori_loop(low, high, meet, (*carry, *zeros))
        return (d_q, d_bias), (d_k.swapaxes(1, 2), d_v.swapaxes(1, 2))

    first = _like(q, q.shape, wide), None if bias is None else _like(q, bias.shape, wide)
    (d_q, d_bias), (d_k, d_v) = jax.lax.scan(
        columns, first, jnp.arange(k.shape[1] // static.block_keys, dtype=jnp.int32)
    )
    d_sinks = None if sinks is None else -(jnp.exp(sinks.astype(wide) - lse) * delta).sum(axis=(0, 1))
    return d_q, _stacked(d_k), _stacked(d_v), d_bias, d_sinks


def _summed(x: Array, y: Array, wide: DTypeLike) -> Array:
    """x^T y for each head, summed over the group's queries."""
    batch, kv_heads, group, queries, keys = x.shape
    x, y = x.reshape(batch * kv_heads, group * queries, keys), y.reshape(batch * kv_heads, group * queries, -1)
    return jnp.einsum("hts,htw->hsw", x, y, preferred_element_type=wide).reshape(batch, kv_heads, keys, -1)


def _add_bias(static: Static, d_bias: Array, d_logits: Array, i: Array, j: Array) -> Array:
    """Adds what a block gives to the gradient of the bias, summed where the bias is shared."""
    axes = [axis for axis in range(5) if d_bias.shape[axis] == 1]
    more = d_logits.sum(axis=axes, keepdims=True)
    places = [jnp.int32(0)] * 3
    places += [jnp.int32(0) if d_bias.shape[3] == 1 else i * static.block_queries]
    places += [jnp.int32(0) if d_bias.shape[4] == 1 else j * static.block_keys]
    own = jax.lax.dynamic_slice(d_bias, places, more.shape)
    return jax.lax.dynamic_update_slice(d_bias, own + more, places)


attend.defvjp(_forward, _backward)
