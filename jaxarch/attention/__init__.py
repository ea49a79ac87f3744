"""Attention on arrays, `[batch, length, heads, dim]`. No Flax, no parameters."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxarch.attention.choice import KINDS, chosen, passed_over, unfit
from jaxarch.attention.mask import Mask, counted
from jaxarch.attention.options import Options, alike

__all__ = ["KINDS", "Implementation", "attention", "attention_weights", "chosen", "unfit"]

Implementation = Literal["auto", "dense", "blocks", "blockwise", "window", "ring", "cudnn", "splash"]

FARTHEST = 2**30  # positions lie below it, so that their sum with a window does
# Nearer to 0 than what hides a key: a bias alone never makes a visible key weigh less than a hidden one.
LEAST_BIAS = -1e29

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
        outside is never read: it may be NaN. (NaN in what only causal or a window hides is not kept out.)
    bias: added to the logits; below -1e29 it counts as that. It weighs down, and does not hide: the softmax of a row
        whose keys it all weighs down alike is as without it.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap), before bias and mask (Gemma 2, 2024, sec. 2).
    sinks: of each head, the logit of a key without a value, which takes weight away (gpt-oss, OpenAI 2025).
    scale: of the logits; dim ** -0.5 where None.
    dropout, dropout_key: the rate at which weights are dropped, where there is a key; the others grow to
        1 / (1 - rate) of themselves. Inside a `jax.shard_map` over rows or heads give each device a key of its own.
    axis: inside a `jax.shard_map`, the mesh axis over which the length is cut. q, k, v and the segments are then the
        device's own part, and so is the result.
    implementation: dense holds all [batch, heads, length, keys] weights and has every option, and so has blockwise in
        O(length) memory. The others are for self-attention with some of the options: blocks, causal, leaves out the
        products that the mask would drop and keeps the weights; window takes O(length * window); ring is for an axis.
        cudnn and splash are the fused kernels of NVIDIA GPUs and TPUs, in O(length) memory. auto takes what should be
        fastest on the default device and has all that is asked for (`chosen` says which); the log of this module says
        what it took.
    return_lse: `(out, lse)`, with the logarithm of the sum of the logits' exponentials, in float32, -inf where no
        key is seen: of two such over parts of the keys the whole can be made.

    Raises ValueError where the arrays or the options do not fit each other, or the implementation lacks one or does
    not run here.
    """
    _check_arrays(q, k, v, q_segments, kv_segments, kv_start, kv_length, bias, sinks)
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} holds nothing; 1 is the query's own position.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is not in [0, 1).")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"a soft_cap of {soft_cap} is not above 0; None is none.")
    window = None if window is None else min(window, FARTHEST)
    q_offset = int(q_offset) if isinstance(q_offset, np.integer) else q_offset
    bias = None if bias is None else jnp.maximum(bias, LEAST_BIAS)
    mask = Mask(causal, window, q_offset, q_segments, kv_segments, kv_start, kv_length)
    dropout_key = dropout_key if dropout else None
    q, k, v, mask, bias, sinks, dropout_key = alike((q, k, v, mask, bias, sinks, dropout_key))
    options = Options(
        mask, q.shape[-1] ** -0.5 if scale is None else float(scale), bias, soft_cap, sinks, dropout, dropout_key, axis
    )
    on = options.on | ({"return_lse"} if return_lse else set())
    length, keys, dims = q.shape[1], k.shape[1], (q.shape[3], v.shape[3])
    if implementation == "auto":
        name = chosen(length, keys, on, window, dims=dims, dtype=q.dtype)
        _say(name, tuple(sorted(on)), passed_over(name, length, keys, on, dims=dims, dtype=q.dtype))
    else:
        name = implementation
    reason = unfit(name, length, keys, on, dims=dims, dtype=q.dtype)
    if reason is not None:
        raise ValueError(
            f"{reason}; {'ring is for an axis' if axis else 'blockwise has all options and runs everywhere'}."
        )
    real = counted(mask, k.shape[1])
    if real is not None:
        # A weight of 0 does not keep a NaN out of a product.
        k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    kind = KINDS[name]
    if "return_lse" not in kind.has:
        return kind.function(q, k, v, options)
    out, lse = kind.function(q, k, v, options)
    return (out, lse) if return_lse else out


def attention_weights(
    q: Float[Array, "batch length heads dim"], k: Float[Array, "batch keys kv_heads dim"], **options: Any
) -> Float[Array, "batch heads length keys"]:
    """The weights that `attention` gives the values: what it makes of unit vectors in their place. To look at.

    options: of `attention`.
    """
    batch, keys, kv_heads, _ = k.shape
    units = jnp.broadcast_to(jnp.eye(keys, dtype=k.dtype)[None, :, None], (batch, keys, kv_heads, keys))
    return cast(Array, attention(q, k, units, **options)).swapaxes(1, 2)


def _check_arrays(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    kv_start: Array | None,
    kv_length: Array | None,
    bias: Array | None,
    sinks: Array | None,
) -> None:
    """Raises ValueError where they do not fit each other: read in blocks, what is too short would be read again."""
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}; attention is for floating-point numbers.")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v are batches of {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; give them one size.")
    if k.shape[1:3] != v.shape[1:3]:
        each = [f"{x.shape[1]} {name} in {x.shape[2]} heads" for name, x in (("keys", k), ("values", v))]
        raise ValueError(f"{each[0]}, but {each[1]}; each key needs its value.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries of {q.shape[3]} numbers do not meet keys of {k.shape[3]}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give them one type.")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"queries of shape {q.shape} and values of shape {v.shape}: there is nothing to attend to.")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segments and kv_segments go together.")
    batch, length, heads, keys = *q.shape[:3], k.shape[1]
    wanted = {
        "q_segments": (q_segments, (batch, length)),
        "kv_segments": (kv_segments, (batch, keys)),
        "kv_start": (kv_start, (batch,)),
        "kv_length": (kv_length, (batch,)),
        "sinks": (sinks, (heads,)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} is of shape {array.shape}, not {shape}.")
    full = batch, heads, length, keys
    if bias is not None and (
        bias.ndim != 4 or any(size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True))
    ):
        raise ValueError(f"bias is of shape {bias.shape}, not {full} or 1 along an axis that shares it.")


@functools.cache
def _say(name: str, on: tuple[str, ...], passed_over: str | None) -> None:
    """Once for each choice; a model meets it at many shapes."""
    why = "" if passed_over is None else f" ({passed_over})"
    log.info("attention with %s: %s%s", ", ".join(on) or "no option", name, why)
