"""The reference: attention with all its weights in memory, and every option."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxarch.attention.dropout import kept
from jaxarch.attention.layout import grouped, merged, products, split
from jaxarch.attention.mask import MASKED, visible
from jaxarch.attention.options import Options


def dense_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    options: Options,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `return_lse`."""
    out, lse = by_heads(split(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2), options)
    return merged(out), merged(lse)


def by_heads(
    q: Float[Array, "batch kv_heads group length dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys width"],
    options: Options,
) -> tuple[Float[Array, "batch kv_heads group length width"], Float[Array, "batch kv_heads group length"]]:
    mask, scale, bias, soft_cap, sinks, dropout, dropout_key, _ = options
    batch, kv_heads, group, length, _ = q.shape
    queries, keys = jnp.arange(length), jnp.arange(k.shape[2])
    wide = jnp.promote_types(q.dtype, jnp.float32)

    logits = products(q, k, wide) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + grouped(bias.astype(wide), kv_heads, group)
    seen = visible(mask, queries, keys)
    # Adding the small mask is several times faster on CPU than selecting in all the logits. Beside any
    # visible logit exp(MASKED) is exactly 0.
    logits = logits + jnp.where(seen, 0.0, MASKED).astype(wide)[:, None, None]
    top = logits.max(axis=-1)
    if sinks is not None:
        sinks = sinks.astype(wide).reshape(kv_heads, group, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    if dropout_key is not None:
        weights = weights * grouped(kept(dropout_key, dropout, batch, kv_heads * group, queries, keys), kv_heads, group)
    out = products(weights.astype(v.dtype), v.swapaxes(2, 3), wide)
    out = (out / total[..., None]).astype(v.dtype)
    lse = top + jnp.log(total)
    some = seen.any(axis=2)[:, None, None]
    return jnp.where(some[..., None], out, 0), lse if sinks is not None else jnp.where(some, lse, -jnp.inf)
