"""Attention on arrays, `[batch, length, heads, dim]`. No Flax, no parameters."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxarch.attention.blocks import blocks_attention
from jaxarch.attention.blockwise import blockwise_attention
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask, counted
from jaxarch.attention.options import Options
from jaxarch.attention.ring import ring_attention
from jaxarch.attention.window import window_attention

Implementation = Literal["auto", "dense", "blocks", "blockwise", "window", "ring"]

EVERY = {
    "causal", "window", "q_offset", "q_segments", "kv_start", "kv_length", "bias", "soft_cap", "sinks", "dropout",
    "return_lse",
}  # fmt: skip
FUNCTIONS = {
    "dense": dense_attention, "blockwise": blockwise_attention, "window": window_attention, "ring": ring_attention
}  # fmt: skip
HAS = {
    "dense": EVERY,
    "blockwise": EVERY,
    "blocks": {"causal"},
    "window": EVERY - {"q_offset", "bias", "dropout"},
    "ring": {"causal", "window", "q_segments", "soft_cap", "sinks", "return_lse", "axis"},
}
NEEDS = {"blocks": {"causal"}, "window": {"window"}, "ring": {"axis"}}
SELF_ATTENTION = {"blocks", "window", "ring"}  # as many keys as queries

BLOCKS_LENGTH = 1024  # up to which auto keeps the weights of causal self-attention, rather than make them twice
DENSE_WEIGHTS = 2**22  # a head's, up to which auto takes dense
WINDOWS = 4  # in a sequence, from which on auto takes window

log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    *,
    causal: bool = False,
    window: int | None = None,
    q_offset: int | Int[Array, ""] = 0,
    q_segments: Int[Array, "batch length"] | None = None,
    kv_segments: Int[Array, "batch keys"] | None = None,
    kv_start: Int[Array, "batch"] | None = None,
    kv_length: Int[Array, "batch"] | None = None,
    bias: Float[Array, "#batch #heads #length #keys"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "heads"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    axis: str | None = None,
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> Float[Array, "batch length heads width"] | tuple[Array, Float[Array, "batch length heads"]]:
    """softmax(q k^T scale + bias) v (Vaswani et al. 2017, eq. 1), one meaning for every implementation.

    Fewer heads of k and v than of q are shared: query head h reads head h // (heads / kv_heads) (grouped
    queries, Ainslie et al. 2023). The softmax is in float32 (float64 for float64) whatever the inputs.
    A query that sees no key gives zeros.

    causal: query i, at position i + q_offset, sees key j where j <= i + q_offset.
    window: keys fewer than `window` positions from the query, which counts itself; on both sides unless causal
        (Beltagy et al. 2020, sec. 3.1).
    q_segments, kv_segments: numbers of packed sequences: a query sees keys of its own number.
    kv_start, kv_length: of each row, the first key that counts and the one past the last. What lies
        outside is never read: it may be NaN.
    bias: added to the logits; finite.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap), before bias and mask (Gemma 2, 2024, sec. 2).
    sinks: of each head, the logit of a key without a value, which takes weight away (gpt-oss, OpenAI 2025).
    scale: of the logits; dim ** -0.5 where None.
    dropout, dropout_key: the rate at which weights are dropped, where there is a key; the others grow to
        1 / (1 - rate) of themselves.
    axis: inside a `jax.shard_map`, the mesh axis over which the length is cut. q, k, v and the segments are then the
        device's own part, and so is the result.
    implementation: dense holds all [batch, heads, length, keys] weights and has every option, and so has blockwise in
        O(length) memory. The others are for self-attention with some of the options: blocks, causal, leaves out the
        products that the mask would drop and keeps the weights; window takes O(length * window); ring is for
        an axis. auto takes what is fastest and has all that is asked for (`chosen` says which).
    return_lse: `(out, lse)`, with the logarithm of the sum of the logits' exponentials, in float32, -inf where no
        key is seen: of two such over parts of the keys the whole can be made.

    Raises ValueError where the options do not fit each other, or the implementation lacks one.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give them one type.")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} holds nothing; 1 is the query's own position.")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments go together.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1).")
    mask = Mask(causal, window, q_offset, q_segments, kv_segments, kv_start, kv_length)
    options = Options(mask, q.shape[-1] ** -0.5 if scale is None else scale, bias, soft_cap, sinks, dropout)
    options = options._replace(dropout_key=dropout_key if dropout else None, axis=axis)
    on = options.on | ({"return_lse"} if return_lse else set())
    if implementation == "auto":
        name = chosen(q.shape[1], k.shape[1], on, window)
        _say(name, q.shape, k.shape, tuple(sorted(on)))
    else:
        name = implementation
    reason = unfit(name, q.shape[1], k.shape[1], on)
    if reason is not None:
        raise ValueError(f"{reason}; blockwise has all options but axis.")
    real = counted(mask, k.shape[1])
    if real is not None:
        # A weight of 0 does not keep a NaN out of a product.
        k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    if name == "blocks":
        return blocks_attention(q, k, v, options)
    out, lse = FUNCTIONS[name](q, k, v, options)
    return (out, lse) if return_lse else out


def unfit(name: str, length: int, keys: int, on: set[str]) -> str | None:
    """Why this implementation cannot do this; None where it can. on: the options in use, as `attention` names them."""
    if name not in HAS:
        return f"there is no implementation {name!r}: {', '.join(HAS)}"
    lacking = sorted(on - HAS[name])
    if lacking:
        return f"{name} lacks {', '.join(lacking)}"
    needed = sorted(NEEDS.get(name, set()) - on)
    if needed:
        return f"{name} needs {', '.join(needed)}"
    if name in SELF_ATTENTION and length != keys:
        return f"{name} is for as many keys as queries, not for {keys} and {length}"
    return None


def chosen(length: int, keys: int, on: set[str], window: int | None = None) -> str:
    """What auto takes for this many queries and keys with these options in use, as `attention` names them."""
    if "axis" in on:
        return "ring"
    order = ["dense", "blockwise"] if length * keys <= DENSE_WEIGHTS else ["blockwise"]
    if length <= BLOCKS_LENGTH:
        order.insert(0, "blocks")
    if window is not None and length >= WINDOWS * window:
        order.insert(0, "window")
    return next(name for name in order if unfit(name, length, keys, on) is None)


@functools.cache
def _say(name: str, q_shape: tuple[int, ...], k_shape: tuple[int, ...], on: tuple[str, ...]) -> None:
    """Once for each kind of call."""
    log.info("attention %s x %s with %s: %s", q_shape, k_shape, ", ".join(on) or "no option", name)
