"""One recurrence for all attention of linear cost, in two forms that agree.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t u_t^T
    u_t = v_t, or beta_t (v_t - k_t^T diag(exp(log_decay_t)) S_{t-1}) where there is a beta
    out_t = scale S_t^T q_t

The recurrent form goes step by step and is the definition. The chunked form takes the pairs of steps within a chunk
as matrix products, and hands S from chunk to chunk (Yang et al. 2024a, sec. 4). Decays are multiplied piece by
piece: a difference of cumulative log decays would lose the small ones behind a great one, and their exponentials
either way would overflow.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Form = Literal["chunked", "recurrent"]

CHUNK = 64  # steps, as measured on CPU


def check(q: Array, k: Array, form: str, chunk: int) -> None:
    """Raises ValueError with what is wrong."""
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    if form not in ("chunked", "recurrent"):
        raise ValueError(f"form {form!r} is unknown; chunked and recurrent are.")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"a chunk of {chunk} steps is not a power of two.")


def recur(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch length kv_heads dim"],
    v: Float[Array, "batch length kv_heads width"],
    log_decay: Float[Array, "batch length kv_heads gates"] | None,
    beta: Float[Array, "batch length kv_heads"] | None,
    scale: float | None,
    state: Array | None,
    form: Form,
    chunk: int,
) -> tuple[Float[Array, "batch length heads width"], Float[Array, "batch kv_heads dim width"]]:
    """The recurrence above over all steps from a state on, and the state after them.

    Raises ValueError as `check` does, and for gates and a state of the wrong shape.
    """
    check(q, k, form, chunk)
    batch, length, heads, dim = q.shape
    kv_heads, width = v.shape[2:]
    if log_decay is not None and log_decay.shape[-1] not in (1, dim):
        raise ValueError(f"{log_decay.shape[-1]} gates a head: 1 or the keys' {dim} would do.")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((batch, kv_heads, dim, width), wide)
    if state.shape != (batch, kv_heads, dim, width):
        raise ValueError(f"the state is {state.shape}, not {(batch, kv_heads, dim, width)}.")
    scale = dim**-0.5 if scale is None else scale
    size = 1 if form == "recurrent" else min(chunk, 1 << (length - 1).bit_length())
    function = _step if form == "recurrent" else _chunk

    # Made again in the backward pass, a chunk leaves nothing behind but the state before it.
    @partial(jax.checkpoint, prevent_cse=False)
    def advance(state: Array, part: tuple) -> tuple[Array, Array]:
        q, k, v, log_decay, beta = jax.tree.map(lambda x: x.astype(wide), part)
        state, out = function(state, q * scale, k, v, log_decay, beta)
        return state, out.astype(part[2].dtype)

    inputs = (q, k, v, log_decay, None if beta is None else beta[..., None])
    parts = jax.tree.map(lambda x: _cut(x, kv_heads, size), inputs)
    state, out = jax.lax.scan(advance, state[:, :, None].astype(wide), parts)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length], state[:, :, 0]


def _cut(x: Array, kv_heads: int, size: int) -> Array:
    """[batch, length, heads, dim] as [chunks, batch, kv_heads, group, steps, dim].

    Filled up with zeros: such a step has no decay and writes nothing.
    """
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)])
    x = x.reshape(x.shape[0], -1, size, kv_heads, x.shape[2] // kv_heads, x.shape[3])
    return x.transpose(1, 0, 3, 4, 2, 5)


# From here on arrays are [batch, kv_heads, group, steps, dim], with a group of 1 for all but the queries, and the state
# is [batch, kv_heads, 1, dim, width].


def _step(
    state: Array, q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    if log_decay is not None:
        state = _transposed(jnp.exp(log_decay)) * state
    new = v if beta is None else beta * (v - k @ state)
    state = state + _transposed(k) * new
    return state, q @ state


def _chunk(
    state: Array, q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    if beta is None:
        weights, q, k = _pairs(q, k, log_decay)
        new = v
    else:
        # A step takes away what the state held and what the steps before it wrote: (1 + T) u = beta (v - k S), with S
        # from before the chunk and T_ts = beta_t k_t k_s^T, decayed, for s < t (Yang et al. 2024b, sec. 3).
        weights, rows, k = _pairs(jnp.concatenate([q, k], axis=2), k, log_decay)
        q, read = rows[:, :, :-1], rows[:, :, -1:]
        new = _inverse(beta * weights[:, :, -1:]) @ (beta * (v - read @ state))
        weights = weights[:, :, :-1]
    out = weights @ new + q @ state
    if log_decay is not None:
        # Of the sum, not the product of all the steps' decays: its rounding would add up over the chunks.
        state = _transposed(jnp.exp(log_decay.sum(axis=-2, keepdims=True))) * state
    return state + _transposed(k) @ new, out


def _pairs(q: Array, k: Array, log_decay: Array | None) -> tuple[Array, Array, Array]:
    """As `_joined` without its last, in cheaper forms for one gate a head and for none."""
    if log_decay is None:
        return jnp.where(np.tri(q.shape[-2], dtype=bool), q @ _transposed(k), 0), q, k
    decay = jnp.exp(log_decay)
    if decay.shape[-1] == 1:
        decays, since, until, _ = _joined(jnp.ones_like(decay), jnp.ones_like(decay), decay)
        return q @ _transposed(k) * decays, q * since, k * until
    return _joined(q, k, decay)[:3]


def _joined(q: Array, k: Array, decay: Array) -> tuple[Array, Array, Array, Array]:
    """Of a run of steps, put together from its halves:

    each query's products with the keys up to its own step, decayed in between, [..., steps, steps]
    the queries, decayed from the run's start on
    the keys, decayed up to the run's end
    the decay of all the steps, [..., 1, dim]

    Every decay is a product of numbers in [0, 1]: exact however strong, and it may be 0.
    """
    steps = decay.shape[-2]
    if steps == 1:
        return (q * k).sum(axis=-1, keepdims=True), q * decay, k, decay
    halves = (x.reshape(*x.shape[:-2], 2, steps // 2, x.shape[-1]) for x in (q, k, decay))
    (w0, w1), (q0, q1), (k0, k1), (d0, d1) = ((x[..., 0, :, :], x[..., 1, :, :]) for x in _joined(*halves))
    cross = q1 @ _transposed(k0)
    # For each row a copy of the decay, by a product, so that its gradient is one: XLA:CPU is slow at sums over rows.
    q1, k0 = (x * _exact(jnp.ones((steps // 2, 1), x.dtype), d) for x, d in ((q1, d0), (k0, d1)))
    return _lower(w0, cross, w1), jnp.concatenate([q0, q1], axis=-2), jnp.concatenate([k0, k1], axis=-2), d0 * d1


@jax.custom_jvp
def _inverse(below: Array) -> Array:
    """(1 + T)^-1 for the part T of a matrix below its diagonal, put together from its halves; the rest is not read.

    On CPU several times faster than LAPACK's triangular solve of each matrix.
    """
    steps = below.shape[-1]
    if steps == 1:
        return jnp.ones_like(below)
    half = steps // 2
    inverses = _inverse(jnp.stack([below[..., :half, :half], below[..., half:, half:]], axis=-3))
    first, second = inverses[..., 0, :, :], inverses[..., 1, :, :]
    return _lower(first, -_exact(_exact(second, below[..., half:, :half]), first), second)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -_exact(_exact(inverse, jnp.tril(tangents[0], -1)), inverse)


# Not in the shorter numbers that accelerators multiply by default: a decay's rounding counts at every later step, and
# an inverse's grows with the overlap of the keys.
_exact = partial(jnp.matmul, precision="highest")


def _lower(first: Array, below: Array, second: Array) -> Array:
    """[[first, 0], [below, second]]"""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)
