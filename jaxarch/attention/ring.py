"""Attention over a sequence that is cut over the devices of a mesh axis (Liu et al. 2023, Ring Attention).

Keys and values go round the ring while each device holds its queries; what two devices make of each other is blockwise
attention, and the parts are put together by their log-sum-exps. Under a causal mask the first device would have one
part to do and the last all of them, so each takes an early and a late half: device r of P holds halves r and
2 P - 1 - r of 2 P (the zigzag; Llama 3, 2024, sec. 3.3.2). The backward pass goes round once more, the gradients of
keys and values travelling with them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxarch.attention.blockwise import KEYS, QUERIES, Fixed, Pair, Static, attend, gradients
from jaxarch.attention.layout import filled
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options

# Halves are tuples of arrays: two of them under a causal mask, else the one whole.
Halves = tuple[Array, ...]


class Ring(NamedTuple):
    """What decides the program, beside the shapes. length: of a half, before it was filled up to whole blocks."""

    axis: str
    static: Static
    halves: int
    length: int


def ring_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    options: Options,
    block_queries: int = QUERIES,
    block_keys: int = KEYS,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `axis` and `return_lse`; without `q_offset`, `kv_start`, `kv_length`,
    `bias` and `dropout`. Inside a `jax.shard_map`: q, k, v and the segments are the device's own part of the length,
    in the sequence's order.

    Raises ValueError where a causal sequence cannot be halved on each device.
    """
    mask, axis = options.mask, cast(str, options.axis)
    halves = 2 if mask.causal and jax.lax.axis_size(axis) > 1 else 1
    if q.shape[1] % halves:
        raise ValueError(f"ring: each device needs an even part of a causal sequence, not {q.shape[1]}; pad it.")
    length = q.shape[1] // halves
    block_queries, block_keys = min(block_queries, length), min(block_keys, length)
    static = Static(mask.causal, mask.window, options.soft_cap, options.scale, 0.0, length, block_queries, block_keys)
    ring = Ring(axis, static, halves, length)

    def dealt(x: Array) -> Halves:
        return deal(x, axis) if halves == 2 else (x,)

    queries = tuple(filled(x, 1, block_queries) for x in dealt(q))
    keys, values = (tuple(filled(y, 1, block_keys) for y in dealt(x)) for x in (k, v))
    segments = None
    if mask.q_segments is not None and mask.kv_segments is not None:
        segments = dealt(mask.q_segments), dealt(mask.kv_segments)

    def whole(parts: Halves) -> Array:
        parts = tuple(x[:, :length] for x in parts)
        return collect(parts, axis) if halves == 2 else parts[0]

    out, lse = map(whole, cast(tuple[Halves, Halves], _ring(ring, segments, queries, keys, values)))
    if options.sinks is not None:
        total = jnp.logaddexp(lse, options.sinks.astype(lse.dtype))
        out, lse = (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total
    return out, lse


def _homes(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the first and the second half of each device's part go, as (from, to)."""

    def home(half: int) -> int:
        return half if half < size else 2 * size - 1 - half

    return [(r, home(2 * r)) for r in range(size)], [(r, home(2 * r + 1)) for r in range(size)]


def deal(x: Shaped[Array, "batch length *rest"], axis: str) -> Halves:
    """From parts in order to an early and a late half for each device."""
    first, second = _homes(jax.lax.axis_size(axis))
    even, odd = jnp.split(x, 2, axis=1)
    even, odd = jax.lax.ppermute(even, axis, first), jax.lax.ppermute(odd, axis, second)
    # On device r the early half has number r.
    is_even = jax.lax.axis_index(axis) % 2 == 0
    return jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)


def collect(parts: Halves, axis: str) -> Shaped[Array, "batch length *rest"]:
    """Back from `deal`."""
    first, second = ([(to, start) for start, to in pairs] for pairs in _homes(jax.lax.axis_size(axis)))
    early, late = parts
    is_even = jax.lax.axis_index(axis) % 2 == 0
    even, odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    return jnp.concatenate([jax.lax.ppermute(even, axis, first), jax.lax.ppermute(odd, axis, second)], axis=1)


def _position(ring: Ring, device: Int[Array, ""], half: int) -> Int[Array, ""]:
    """Of the half's first token in the whole sequence."""
    number = device if half == 0 else 2 * jax.lax.axis_size(ring.axis) - 1 - device
    return number * ring.length


def _rotated(ring: Ring, tree):
    """Each device's arrays go to the next one."""
    size = jax.lax.axis_size(ring.axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, [(r, (r + 1) % size) for r in range(size)]), tree)


def _fixed(ring: Ring, owner: Int[Array, ""], q_segments: Halves | None, kv_segments: Halves | None, i: int, j: int):
    """The mask between half i of this device's queries and half j of the owner's keys."""
    offset = _position(ring, jax.lax.axis_index(ring.axis), i) - _position(ring, owner, j)
    if q_segments is None or kv_segments is None:
        return Fixed(Mask(q_offset=offset), None)
    return Fixed(Mask(q_offset=offset, q_segments=q_segments[i], kv_segments=kv_segments[j]), None)


def _owner(ring: Ring, step: Int[Array, ""]) -> Int[Array, ""]:
    """Whose keys are here after so many rotations."""
    return (jax.lax.axis_index(ring.axis) - step) % jax.lax.axis_size(ring.axis)


def _steps(ring: Ring) -> Int[Array, "devices"]:
    return jnp.arange(jax.lax.axis_size(ring.axis), dtype=jnp.int32)


def _joined(one: Pair, other: Pair) -> Pair:
    """Attention over the keys of both."""
    (out, lse), (more, more_lse) = one, other
    total = jnp.logaddexp(lse, more_lse)

    def share(lse: Array) -> Array:
        return jnp.where(jnp.isneginf(lse), 0, jnp.exp(lse - total))[..., None]

    return out * share(lse) + more * share(more_lse), total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, segments: tuple[Halves, Halves] | None, q: Halves, k: Halves, v: Halves) -> tuple[Halves, Halves]:
    q_segments, kv_segments = (None, None) if segments is None else segments
    wide = jnp.promote_types(q[0].dtype, jnp.float32)

    def meet(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, None]:
        moving, parts = carry
        k, v, kv_segments = moving
        parts = list(parts)
        for i in range(ring.halves):
            for j in range(ring.halves):
                fixed = _fixed(ring, _owner(ring, step), q_segments, kv_segments, i, j)
                parts[i] = _joined(parts[i], cast(Pair, attend(ring.static, fixed, q[i], k[j], v[j], None, None)))
        return (_rotated(ring, moving), tuple(parts)), None

    def nothing(q: Array, v: Array) -> Pair:
        lse = jax.lax.full_like(q[..., 0], -jnp.inf, wide)
        return jax.lax.full_like(q, 0, wide, (*q.shape[:-1], v.shape[-1])), lse

    first = (k, v, kv_segments), tuple(map(nothing, q, v))
    (_, parts), _ = jax.lax.scan(meet, first, _steps(ring))
    return tuple(out.astype(v[0].dtype) for out, _ in parts), tuple(lse for _, lse in parts)


def _forward(ring: Ring, segments: tuple[Halves, Halves] | None, q: Halves, k: Halves, v: Halves):
    out, lse = cast(tuple[Halves, Halves], _ring(ring, segments, q, k, v))
    return (out, lse), (segments, q, k, v, out, lse)


def _backward(ring: Ring, saved: tuple, cotangents: tuple[Halves, Halves]) -> tuple:
    segments, q, k, v, out, lse = saved
    d_out, d_lse = cotangents
    q_segments, kv_segments = (None, None) if segments is None else segments
    wide = jnp.promote_types(q[0].dtype, jnp.float32)

    def meet(carry: tuple, step: Int[Array, ""]) -> tuple[tuple, None]:
        (k, v, kv_segments, d_k, d_v), d_q = carry
        d_q, d_k, d_v = list(d_q), list(d_k), list(d_v)
        for i in range(ring.halves):
            for j in range(ring.halves):
                fixed = _fixed(ring, _owner(ring, step), q_segments, kv_segments, i, j)
                own = fixed, q[i], k[j], v[j], None, None, out[i], lse[i]
                more_q, more_k, more_v, *_ = gradients(ring.static, own, (d_out[i], d_lse[i]))
                d_q[i], d_k[j], d_v[j] = d_q[i] + more_q, d_k[j] + more_k, d_v[j] + more_v
        return (_rotated(ring, (k, v, kv_segments, tuple(d_k), tuple(d_v))), tuple(d_q)), None

    d_q, d_k, d_v = jax.tree.map(lambda x: jax.lax.full_like(x, 0, wide), (q, k, v))
    ((*_, d_k, d_v), d_q), _ = jax.lax.scan(meet, ((k, v, kv_segments, d_k, d_v), d_q), _steps(ring))
    return None, *jax.tree.map(lambda d, x: d.astype(x.dtype), (d_q, d_k, d_v), (q, k, v))


_ring.defvjp(_forward, _backward)
