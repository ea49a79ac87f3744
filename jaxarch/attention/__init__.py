"""Attention on arrays, `[batch, length, heads, dim]`. No Flax, no parameters."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxarch.attention.blocks import blocks_attention
from jaxarch.attention.blockwise import blockwise_attention
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask, counted

Implementation = Literal["auto", "dense", "blocks", "blockwise"]

BLOCKS_LENGTH = 1024  # up to which auto keeps the weights of causal self-attention, rather than make them twice
DENSE_WEIGHTS = 2**22  # a head's, up to which auto takes dense


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
    implementation: dense holds all [batch, heads, length, keys] weights and has every option, and so has blockwise in
        O(length) memory; blocks is for causal self-attention with none of the others, leaves out the products that
        the mask would drop, and keeps the weights; auto takes what is fastest (`chosen` says which).
    return_lse: `(out, lse)`, with the logarithm of the sum of the logits' exponentials, in float32, -inf where no
        key is seen: of two such over parts of the keys the whole can be made.

    Raises ValueError where the options do not fit each other, or the implementation lacks one.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} holds nothing; 1 is the query's own position.")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments go together.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1).")
    mask = Mask(causal, window, q_offset, q_segments, kv_segments, kv_start, kv_length)
    real = counted(mask, k.shape[1])
    if real is not None:
        # A weight of 0 does not keep a NaN out of a product.
        k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    dropout_key = dropout_key if dropout else None
    scale_ = q.shape[-1] ** -0.5 if scale is None else scale
    plain = causal and mask.plain and q.shape[1] == k.shape[1]
    plain = plain and bias is None and soft_cap is None and sinks is None and dropout_key is None and not return_lse
    name = chosen(q.shape[1], k.shape[1], plain) if implementation == "auto" else implementation
    if name == "blocks":
        if not plain:
            raise ValueError("blocks is causal self-attention with no other option than scale; blockwise has them all.")
        return blocks_attention(q, k, v, scale_)
    function = blockwise_attention if name == "blockwise" else dense_attention
    out, lse = function(q, k, v, mask, bias, soft_cap, sinks, scale_, dropout, dropout_key)
    return (out, lse) if return_lse else out


def chosen(length: int, keys: int, plain: bool) -> Implementation:
    """What auto takes for this many queries and keys. plain: causal self-attention without other options."""
    if plain and length <= BLOCKS_LENGTH:
        return "blocks"
    return "dense" if length * keys <= DENSE_WEIGHTS else "blockwise"
