"""Attention on arrays, `[batch, length, heads, dim]`. No Flax, no parameters."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from jaxarch.attention.blocks import blocks_attention
from jaxarch.attention.dense import dense_attention

Implementation = Literal["auto", "dense", "blocks"]


def attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    *,
    causal: bool = False,
    q_offset: int | Int[Array, ""] = 0,
    kv_start: Int[Array, "batch"] | None = None,
    kv_length: Int[Array, "batch"] | None = None,
    bias: Float[Array, "#batch #heads #length #keys"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads width"]:
    """softmax(q k^T scale + bias) v (Vaswani et al. 2017, eq. 1), one meaning for every implementation.

    Fewer heads of k and v than of q are shared: query head h reads head h // (heads / kv_heads) (grouped
    queries, Ainslie et al. 2023). The softmax is in float32 (float64 for float64) whatever the inputs.
    A query that sees no key gives zeros.

    causal: query i sees key j where j <= i + q_offset: q_offset is the position of the first query.
    kv_start, kv_length: of each row, the first key that counts and the one past the last. What lies
        outside is never read: it may be NaN.
    bias: added to the logits; finite.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap), before bias and mask (Gemma 2, 2024, sec. 2).
    scale: of the logits; dim ** -0.5 where None.
    implementation: dense holds all [batch, heads, length, keys] weights and has every option; blocks is for causal
        self-attention with none of the others, and leaves out the products that the mask would drop; auto takes
        blocks where it can.

    Raises ValueError where the key heads do not divide the query heads, or blocks lacks an option.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    plain = isinstance(q_offset, int) and q_offset == 0 and q.shape[1] == k.shape[1]
    plain = causal and plain and all(option is None for option in (kv_start, kv_length, bias, soft_cap))
    if implementation == "blocks" and not plain:
        raise ValueError("blocks is causal self-attention with no other option than scale; dense has all of them.")
    if plain and implementation != "dense":
        return blocks_attention(q, k, v, scale)
    return dense_attention(q, k, v, causal, q_offset, kv_start, kv_length, bias, soft_cap, scale)
