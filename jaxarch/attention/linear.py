"""Attention of linear cost: what was seen is summed up in one matrix a head, [dim, width], instead of kept.

The members differ in how the matrix forgets. Each has a recurrent form, step by step, which is the definition, and a
chunked one, which is fast; they agree (`jaxarch.attention.recurrence`). Each takes and returns its state, so that
decoding goes on where a prompt ended: the state is in float32 (float64 for float64) whatever the inputs.

In all of them fewer heads of k and v than of q are shared: query head h reads head h // (heads / kv_heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxarch.attention.recurrence import CHUNK, Form, check, recur

# Of x, values and a log scale of each row: values * exp(log scale) are the features; None is a log scale of 0.
Features = Callable[[Float[Array, "*rows dim"]], tuple[Float[Array, "*rows features"], Float[Array, "*rows"] | None]]


class LinearState(NamedTuple):
    """Sums over the keys seen so far, divided by exp(top) so that they neither overflow nor vanish.

    values: of features(k) v^T.
    keys: of features(k).
    top: the greatest log scale of a key so far; None for features without one.
    """

    values: Float[Array, "batch kv_heads features width"]
    keys: Float[Array, "batch kv_heads features"]
    top: Float[Array, "batch kv_heads"] | None


def elu_features(x: Float[Array, "*rows dim"]) -> tuple[Float[Array, "*rows dim"], None]:
    """elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""
    # Adding 1 to jax.nn.elu would leave nothing of exp(x) below some -17 in float32.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))), None


def favor_projection(key: Key[Array, ""], dim: int, features: int) -> Float[Array, "features dim"]:
    """Random directions for `favor_features`: each is normal, and `dim` at a time are orthogonal.

    Choromanski et al. 2021, sec. 2.4 (their FAVOR+); they draw anew now and then while training.
    """
    directions, lengths = jax.random.split(key)
    blocks = -(-features // dim)
    orthogonal = jax.random.orthogonal(directions, dim, (blocks,)).reshape(blocks * dim, dim)[:features]
    return orthogonal * jnp.linalg.norm(jax.random.normal(lengths, (features, dim)), axis=-1, keepdims=True)


def favor_features(projection: Float[Array, "features dim"], scale: float | None = None) -> Features:
    """Positive random features whose products have the mean exp(q k^T scale) (Choromanski et al. 2021, lemma 1).

    scale: of the logits; dim ** -0.5 where None.
    """
    count, dim = projection.shape
    root = (dim**-0.5 if scale is None else scale) ** 0.5

    def features(x: Float[Array, "*rows dim"]) -> tuple[Float[Array, "*rows features"], Float[Array, "*rows"]]:
        x = x * root
        logs = jnp.matmul(x, projection.T.astype(x.dtype), precision="highest")  # they will be exponents
        logs = logs - (jnp.square(x).sum(axis=-1, keepdims=True) + np.log(count)) / 2
        top = jax.lax.stop_gradient(logs.max(axis=-1))
        return jnp.exp(logs - top[..., None]), top

    return features


def linear_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    *,
    features: Features = elu_features,
    causal: bool = True,
    state: LinearState | None = None,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch length heads width"], LinearState]:
    """Weights features(q) features(k)^T instead of exponentials, over their sum (Katharopoulos et al. 2020, eq. 5).

    Returns `(out, state)`. A query whose weights are all 0 gives zeros.

    features: `elu_features`, or `favor_features(projection)`, which stand for softmax attention (Performer).
    causal: query i sees key j where j <= i, of as many keys as queries; else all see all.
    state: of keys before these, which all queries see; None is none.
    form, chunk: as of `gated_linear_attention`; of no effect unless causal.

    Raises ValueError where shapes or options do not fit.
    """
    check(q, k, v, None, None, causal, form, chunk)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    (queries, _), (keys, log_scale) = features(q.astype(wide)), features(k.astype(wide))
    batch, _, kv_heads, count = keys.shape
    if state is None:
        top = None if log_scale is None else jnp.full((batch, kv_heads), -jnp.inf, wide)
        zeros = jnp.zeros((batch, kv_heads, count, v.shape[-1]), wide)
        state = LinearState(zeros, zeros[..., 0], top)
    top, log_decay = state.top, None
    if log_scale is not None and top is not None:
        # Keys are divided by the greatest so far, as in a softmax put together on the way: where a greater one comes,
        # what was summed decays. It cancels in the end, so it needs no gradient.
        tops = jax.lax.cummax(log_scale, axis=1) if causal else log_scale.max(axis=1, keepdims=True)
        tops = jax.lax.stop_gradient(jnp.maximum(tops, top[:, None]))
        log_decay = (jnp.concatenate([top[:, None], tops[:, :-1]], axis=1) - tops)[..., None]
        keys, top = keys * jnp.exp(log_scale - tops)[..., None], tops[:, -1]
    # Of one more channel of ones the sums are the sums of the weights.
    values = jnp.concatenate([v.astype(wide), jnp.ones((*v.shape[:-1], 1), wide)], axis=-1)
    sums = jnp.concatenate([state.values, state.keys[..., None]], axis=-1)
    if causal:
        out, sums = recur(queries, keys, values, log_decay, None, 1.0, sums, form, chunk)
    else:
        before = 1 if log_decay is None else jnp.exp(log_decay[:, 0, :, :, None])
        sums = before * sums + jnp.einsum("bskf,bskw->bkfw", keys, values)
        grouped = queries.reshape(*q.shape[:2], kv_heads, -1, count)
        out = jnp.einsum("btkgf,bkfw->btkgw", grouped, sums).reshape(*q.shape[:3], -1)
    weights = out[..., -1:]
    nothing = weights < jnp.finfo(wide).tiny * 1e8  # so that a gradient, divided by it, stays finite
    out = jnp.where(nothing, 0, out[..., :-1] / jnp.where(nothing, 1, weights))
    return out.astype(v.dtype), LinearState(sums[..., :-1], sums[..., -1], top)


def gated_linear_attention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    log_decay: Float[Array, "batch length kv_heads gates"],
    *,
    scale: float | None = None,
    state: Float[Array, "batch kv_heads dim width"] | None = None,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch kv_heads dim width"]]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, out_t = scale S_t^T q_t (GLA, Yang et al. 2024, sec. 4).

    Returns `(out, state)`, with S after the last step.

    log_decay: at most 0, and -inf forgets all; one for each of the keys' dim channels, or one a head, which is cheaper
        (gates = 1, as in Mamba-2, Dao & Gu 2024).
    scale: dim ** -0.5 where None.
    state: S before the first step; zeros where None.
    form: chunked, or recurrent.
    chunk: steps that are taken at once; a power of two.

    Raises ValueError where shapes or options do not fit.
    """
    return recur(q, k, v, log_decay, None, scale, state, form, chunk)


def retention(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    *,
    gamma: Float[Array, "kv_heads"] | None = None,
    scale: float | None = None,
    state: Float[Array, "batch kv_heads dim width"] | None = None,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch kv_heads dim width"]]:
    """Gated linear attention with one constant decay a head (Sun et al. 2023, eq. 6), without its rotation and norm.

    gamma: the decays, in (0, 1]; where None those of the paper, 1 - 2 ** (-5 - h) for head h (eq. 8).

    The others, and what it raises, as of `gated_linear_attention`.
    """
    batch, length, kv_heads = k.shape[:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    log_gamma = jnp.log1p(-(0.5 ** (5 + jnp.arange(kv_heads, dtype=wide)))) if gamma is None else jnp.log(gamma)
    log_decay = jnp.broadcast_to(log_gamma.astype(wide)[:, None], (batch, length, kv_heads, 1))
    return recur(q, k, v, log_decay, None, scale, state, form, chunk)


def delta_rule(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    beta: Float[Array, "batch length kv_heads"],
    log_decay: Float[Array, "batch length kv_heads gates"] | None = None,
    *,
    scale: float | None = None,
    state: Float[Array, "batch kv_heads dim width"] | None = None,
    form: Form = "chunked",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch kv_heads dim width"]]:
    """S_t = (1 - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T, out_t = scale S_t^T q_t.

    The value that the state holds for a key moves towards the new one by beta (DeltaNet, Yang et al. 2024, sec. 2);
    with one gate a head Gated DeltaNet (Yang et al. 2025, sec. 3). Keys should have length 1 and beta lie in [0, 1], or
    in [0, 2] (Grazzi et al. 2025): else the state may grow without bound.

    The others, and what it returns and raises, as of `gated_linear_attention`.
    """
    return recur(q, k, v, log_decay, beta, scale, state, form, chunk)
