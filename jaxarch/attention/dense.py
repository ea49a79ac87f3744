"""The reference: attention with all its weights in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with nothing to see has a softmax and a gradient


def dense_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    causal: bool,
    q_offset: int | Int[Array, ""],
    kv_start: Int[Array, "batch"] | None,
    kv_length: Int[Array, "batch"] | None,
    bias: Float[Array, "#batch #heads #length #keys"] | None,
    soft_cap: float | None,
    scale: float | None,
) -> Float[Array, "batch length heads width"]:
    """As `jaxarch.attention.attention`."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    seen = visible(length, k.shape[1], causal, q_offset, kv_start, kv_length)
    if kv_start is not None or kv_length is not None:
        # A weight of 0 does not keep a NaN out of a product.
        read = seen.any(axis=1)[:, :, None, None]
        k, v = jnp.where(read, k, 0), jnp.where(read, v, 0)

    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=wide)
    logits = logits.reshape(batch, heads, length, -1) * (dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(wide)
    # Adding the small mask is several times faster on CPU than selecting in all the logits. Beside any
    # visible logit exp(MASKED) is exactly 0.
    logits = logits + jnp.where(seen, 0.0, MASKED).astype(wide)[:, None]
    weights = jax.nn.softmax(logits, axis=-1)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    out = jnp.einsum("bkgts,bskw->btkgw", weights.astype(v.dtype), v).reshape(batch, length, heads, -1)
    return jnp.where(seen.any(axis=2)[:, :, None, None], out, 0)


def visible(
    length: int,
    keys: int,
    causal: bool,
    q_offset: int | Int[Array, ""],
    kv_start: Int[Array, "batch"] | None,
    kv_length: Int[Array, "batch"] | None,
) -> Bool[Array, "#batch length keys"]:
    """Which key each query sees; see `jaxarch.attention.attention`."""
    query, key = jnp.arange(length)[:, None], jnp.arange(keys)[None, :]
    seen = (key <= query + q_offset if causal else jnp.ones((length, keys), bool))[None]
    if kv_start is not None:
        seen = seen & (key >= kv_start[:, None, None])
    if kv_length is not None:
        seen = seen & (key < kv_length[:, None, None])
    return seen
