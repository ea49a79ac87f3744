"""The reference: attention with all its weights in memory, and every option."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxarch.attention.dropout import kept
from jaxarch.attention.mask import MASKED, Mask, visible


def dense_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    mask: Mask,
    bias: Float[Array, "#batch #heads #length #keys"] | None,
    soft_cap: float | None,
    sinks: Float[Array, "heads"] | None,
    scale: float,
    dropout: float,
    dropout_key: Key[Array, ""] | None,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `return_lse`; what `kv_start` and `kv_length` leave out is finite."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=wide)
    logits = logits.reshape(batch, heads, length, keys) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(wide)
    seen = visible(mask, jnp.arange(length), jnp.arange(keys))
    # Adding the small mask is several times faster on CPU than selecting in all the logits. Beside any
    # visible logit exp(MASKED) is exactly 0.
    logits = logits + jnp.where(seen, 0.0, MASKED).astype(wide)[:, None]
    lse = jax.nn.logsumexp(logits, axis=-1)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.astype(wide)[:, None])
    weights = jnp.exp(logits - lse[..., None])
    if dropout_key is not None:
        weights = weights * kept(dropout_key, dropout, batch, heads, jnp.arange(length), jnp.arange(keys))
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, heads // kv_heads, length, keys)
    out = jnp.einsum("bkgts,bskw->btkgw", weights, v).reshape(batch, length, heads, -1)
    some = seen.any(axis=2)[:, :, None]
    if sinks is None:
        lse = jnp.where(some.swapaxes(1, 2), lse, -jnp.inf)
    return jnp.where(some[..., None], out, 0), lse.swapaxes(1, 2)
