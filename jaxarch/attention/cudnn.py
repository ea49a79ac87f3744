"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn`, for what it means as we do."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxarch.attention.options import Options

LARGEST_HEAD = 128  # on every GPU that has it; Hopper alone goes to 256

# Not here, though `jax.nn` takes them: a bias, which must have the type of q (a float32 one has given NaN gradients),
# and the log-sum-exp, which is rounded to the type of q and whose gradient is silently dropped.


def cudnn_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    options: Options,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch length heads dim"]:
    """As `jaxarch.attention.attention` with `causal`, `kv_length` and `scale`, and a `window` as far as `misfit` says.

    implementation: xla gives these options of `jax.nn` the same meaning on any platform, for tests.
    """
    mask = options.mask
    queries = keys = None
    if mask.kv_length is not None:
        # Before jax 0.11 vmap asks that the lengths have an axis where q has one: they get it by this 0.
        zero = jnp.isnan(q[:, 0, 0, 0]).astype(jnp.int32) * 0
        # Of a row without keys cuDNN says nothing sure: it is given one, and what comes of it is dropped.
        kept = jnp.clip(mask.kv_length, 1, k.shape[1]).astype(jnp.int32)
        queries, keys = zero + q.shape[1], zero + kept
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=float(options.scale),
        is_causal=mask.causal,
        query_seq_lengths=queries,
        key_value_seq_lengths=keys,
        # The keys on either side, beside the query's own.
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation=implementation,
    )
    if mask.kv_length is None:
        return out
    return jnp.where((mask.kv_length > 0)[:, None, None, None], out, 0)


def misfit(length: int, keys: int, on: Set[str], dims: tuple[int, int]) -> str | None:
    """Why cuDNN cannot do this, beyond the options that it lacks; None where it can.

    dims: of a head's keys and of its values.
    """
    dim, width = dims
    if dim != width or dim > LARGEST_HEAD or dim % 8:
        sizes = f"{dim}" if dim == width else f"{dim} and values of {width}"
        return f"cudnn takes heads of 8, 16, ... {LARGEST_HEAD}, not of {sizes}"
    # It knows only windows behind the query, and where these reach no key its answer is not sure.
    if "window" in on and ("causal" not in on or "kv_length" in on or length > keys):
        return "cudnn takes a window with causal, without kv_length, and for no more queries than keys"
    return None
