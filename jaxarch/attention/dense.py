"""The reference: attention with all its weights in memory, and every option."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxarch.attention.dropout import kept
from jaxarch.attention.mask import MASKED, visible
from jaxarch.attention.options import Options


def dense_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    options: Options,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch length heads"]]:
    """As `jaxarch.attention.attention` with `return_lse`."""
    out, lse = by_heads(*split(q, k, v), options)
    return merged(out), merged(lse[..., None])[..., 0]


def split(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
) -> tuple[
    Float[Array, "batch kv_heads group length dim"],
    Float[Array, "batch kv_heads keys dim"],
    Float[Array, "batch kv_heads keys width"],
]:
    """Heads before positions, so that the products read the arrays as they lie."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    return q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)


def merged(out: Float[Array, "batch kv_heads group length width"]) -> Float[Array, "batch length heads width"]:
    """Back from `split`."""
    return out.transpose(0, 3, 1, 2, 4).reshape(out.shape[0], out.shape[3], -1, out.shape[4])


def grouped(
    x: Float[Array, "batch heads some others"], kv_heads: int, group: int
) -> Float[Array, "batch _ _ some others"]:
    """The axis of heads cut into those of the keys and their groups, where it is not 1."""
    return x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (kv_heads, group)), *x.shape[2:])


def products(
    x: Float[Array, "batch kv_heads group some inner"], y: Float[Array, "batch kv_heads others inner"], wide: DTypeLike
) -> Float[Array, "batch kv_heads group some others"]:
    """x y^T for each head. One axis of batch and heads, one of group and rows: more axes cost a fifth on CPU."""
    batch, kv_heads, group, some, inner = x.shape
    x, y = x.reshape(batch * kv_heads, group * some, inner), y.reshape(batch * kv_heads, -1, inner)
    out = jnp.einsum("hti,hsi->hts", x, y, preferred_element_type=wide)
    return out.reshape(batch, kv_heads, group, some, -1)


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
