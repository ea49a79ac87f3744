"""Causal attention over blocks of queries, each against no more keys than it may see.

The form for training at lengths whose weights fit in memory. Against the dense reference it leaves out nearly half of
the products and of the weights, and keeps the weights for the backward pass instead of undoing a softmax.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxarch.attention.mask import MASKED
from jaxarch.attention.options import Options

BLOCK = 64  # queries; the last block may be shorter


def blocks_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    options: Options,
) -> Float[Array, "batch length heads width"]:
    """As `jaxarch.attention.attention` with `causal` and `scale`, and nothing else, for as many keys as queries."""
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    out = cast(Array, _causal(options.scale, *(x.transpose(0, 2, 1, 3) for x in (q, k, v))))
    return out.transpose(0, 2, 1, 3)


# From here on arrays are [batch, heads, length, dim].


def _wide(x: Array) -> DTypeLike:
    return jnp.promote_types(x.dtype, jnp.float32)


def _weights(
    scale: float, q: Float[Array, "batch heads queries dim"], k: Float[Array, "batch heads keys dim"]
) -> tuple[Float[Array, "batch heads queries keys"], Float[Array, "batch heads queries 1"]]:
    """The exponentials of a block's queries, which are the last of the positions that k has, and their sums.

    Divided by after the product with the values: a weight of 1 then stays 1 in bfloat16.
    """
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=_wide(q)) * scale
    query, key = jnp.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], jnp.arange(k.shape[2])[None]
    logits = logits + jnp.where(key <= query, 0.0, MASKED).astype(logits.dtype)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights.astype(q.dtype)
    return weights, weights.astype(_wide(q)).sum(axis=-1, keepdims=True)


def _added(total: Array, more: Array) -> Array:
    """With more on the first keys. Not by `at[].add`: under `shard_map` XLA:CPU of jax 0.11 crashes on compiling it."""
    return jax.lax.dynamic_update_slice(total, total[:, :, : more.shape[2]] + more, (0, 0, 0, 0))


def starts(length: int) -> list[tuple[int, int]]:
    """Of the blocks of queries, the first and the end."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(scale: float, q: Array, k: Array, v: Array) -> Array:
    return _forward(scale, q, k, v)[0]


def _forward(scale: float, q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
    made = [_weights(scale, q[:, :, start:end], k[:, :, :end]) for start, end in starts(q.shape[2])]
    out = [
        jnp.einsum("bhts,bhsd->bhtd", own, v[:, :, :end], preferred_element_type=_wide(q)) / total
        for (own, total), (_, end) in zip(made, starts(q.shape[2]), strict=True)
    ]
    out = jnp.concatenate(out, axis=2).astype(v.dtype)
    return out, (q, k, v, out, made)


def _backward(scale: float, saved: tuple, d_out: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, made = saved
    wide = _wide(q)
    # The softmax's gradient is weights * (d_weights - delta) (Dao et al. 2022, eq. 4). The weights are to be divided
    # by their sum: so is, what costs less, all that they are multiplied with.
    d_out = d_out.astype(wide) / jnp.concatenate([total for _, total in made], axis=2)
    delta = jnp.sum(d_out * out.astype(wide), axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    d_q, d_k, d_v = [], jnp.zeros_like(k, wide), jnp.zeros_like(v, wide)
    for (own, _), (start, end) in zip(made, starts(q.shape[2]), strict=True):
        d_block = d_out[:, :, start:end]
        d_weights = jnp.einsum("bhtd,bhsd->bhts", d_block, v[:, :, :end])
        d_logits = (own * (d_weights - delta[:, :, start:end]) * scale).astype(q.dtype)
        d_q.append(jnp.einsum("bhts,bhsd->bhtd", d_logits, k[:, :, :end]))
        d_k = _added(d_k, jnp.einsum("bhts,bhtd->bhsd", d_logits, q[:, :, start:end]))
        d_v = _added(d_v, jnp.einsum("bhts,bhtd->bhsd", own, d_block))
    return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype)


_causal.defvjp(_forward, _backward)
