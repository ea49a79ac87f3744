"""The fused attention kernel for TPUs that comes with JAX (Pallas, "splash attention")."""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxarch.attention.layout import filled
from jaxarch.attention.mask import MASKED, counted
from jaxarch.attention.options import Options

LANES = 128  # blocks hold whole multiples of it
BLOCKS = 512, 256, 128  # the first that divides the filled length; not measured by us


def splash_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    options: Options,
    interpret: bool = False,
) -> Float[Array, "batch length heads width"]:
    """As `jaxarch.attention.attention`; without `q_offset`, `bias`, `dropout` and `return_lse`.

    The kernel gives no log-sum-exp that could be differentiated. On several devices it must stand in a `shard_map`.

    interpret: runs the kernel step by step on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # experimental, slow to import

    mask, length, keys = options.mask, q.shape[1], k.shape[1]
    dtype = v.dtype
    if abs(math.frexp(options.scale)[0]) != 0.5:  # no power of two: in bfloat16 the product would be rounded
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q * jnp.asarray(options.scale, q.dtype)
    q, k, v = (filled(x, 1, LANES).swapaxes(1, 2) for x in (q, k, v))

    shape = q.shape[2], k.shape[2]
    if mask.window is not None:
        rule = kernels.LocalMask(shape, (mask.window - 1, 0 if mask.causal else mask.window - 1), offset=0)
    else:
        rule = kernels.CausalMask(shape) if mask.causal else kernels.FullMask(shape)
    queries, others = (next(size for size in BLOCKS if filled % size == 0) for filled in shape)
    kernel = kernels.make_splash_mha_single_device(
        mask=kernels.MultiHeadMask([rule] * q.shape[1]),
        block_sizes=kernels.BlockSizes(
            block_q=queries, block_kv=others, block_q_dkv=queries, block_kv_dkv=others,
            block_q_dq=queries, block_kv_dq=others,
        ),
        attn_logits_soft_cap=options.soft_cap,
        interpret=interpret,
    )  # fmt: skip
    segments = _segments(options, q.shape[0], length, keys)
    if segments is not None:
        segments = kernels.SegmentIds(*segments)
    # A row that sees nothing would get the mean of what is hidden. Beside a sink, far above what is hidden and far
    # below any logit, its weights are 0, forward and backward.
    sinks = jnp.full(q.shape[1], MASKED, jnp.float32) if options.sinks is None else options.sinks.astype(jnp.float32)
    rows = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))
    out = cast(Array, rows(q, k, v, segments, sinks))
    return out.swapaxes(1, 2)[:, :length].astype(dtype)


def _segments(
    options: Options, batch: int, length: int, keys: int
) -> tuple[Int[Array, "batch filled_length"], Int[Array, "batch filled_keys"]] | None:
    """Numbers such that a query sees the keys of its own; None where all may see all.

    Keys that do not count, and those beyond the end, have a number that no query has.
    """
    mask = options.mask
    real = counted(mask, keys)
    shown = keys % LANES == 0 or (mask.causal and length <= keys)  # what lies beyond the end is hidden without numbers
    if mask.q_segments is None and real is None and shown:
        return None
    own = jnp.zeros((batch, length), jnp.int32) if mask.q_segments is None else mask.q_segments
    others = jnp.zeros((batch, keys), jnp.int32) if mask.kv_segments is None else mask.kv_segments
    nobody = own.min(axis=1, keepdims=True) - 1
    if real is not None:
        others = jnp.where(real, others, nobody)
    beyond = jnp.broadcast_to(nobody, (batch, -keys % LANES))
    return filled(own, 1, LANES), jnp.concatenate([others, beyond], axis=1)
