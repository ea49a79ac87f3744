"""One recurrence for all attention of linear cost, in two forms that agree.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t u_t^T
    u_t = v_t, or beta_t (v_t - k_t^T diag(exp(log_decay_t)) S_{t-1}) where there is a beta
    out_t = scale S_t^T q_t

The recurrent form goes step by step and is the definition. The chunked form takes the pairs of steps within a chunk
as matrix products, and hands S from chunk to chunk (GLA, Yang et al. 2024, sec. 4). Decays are multiplied piece by
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


def check(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, causal: bool, form: str, chunk: int
) -> None:
    """Raises ValueError with what is wrong: filled up to whole chunks, what is too short would not be noticed."""
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v are batches of {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; give them one size.")
    if k.shape[1:3] != v.shape[1:3]:
        each = [f"{x.shape[1]} {name} in {x.shape[2]} heads" for name, x in (("keys", k), ("values", v))]
        raise ValueError(f"{each[0]}, but {each[1]}; each key needs its value.")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys: causal linear attention needs as many of both.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries of {q.shape[3]} numbers do not meet keys of {k.shape[3]}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} heads of keys do not divide {q.shape[2]} heads of queries.")
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta is of shape {beta.shape}, not {k.shape[:3]}.")
    if log_decay is not None and log_decay.shape not in ((*k.shape[:3], 1), k.shape):
        raise ValueError(f"log_decay is of shape {log_decay.shape}, not {(*k.shape[:3], 1)} or {k.shape}.")
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

    Raises ValueError as `check` does, and for a state of the wrong shape.
    """
    check(q, k, v, log_decay, beta, True, form, chunk)
    batch, length, heads, dim = q.shape
    kv_heads, width = v.shape[2:]
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

    inputs = (
        q.reshape(batch, length, kv_heads, heads // kv_heads, dim),
        k,
        v,
        log_decay,
        None if beta is None else beta[..., None],
    )
    parts = jax.tree.map(lambda x: _cut(x, size), inputs)
    state, out = jax.lax.scan(advance, state.astype(wide), parts)
    out = jnp.moveaxis(out, (0, -2), (1, 2)).reshape(batch, -1, heads, width)
    return out[:, :length], state


def _cut(x: Array, size: int) -> Array:
    """[batch, length, some, dim] as [chunks, batch, some, steps, dim].

    Filled up with zeros: such a step has no decay and writes nothing.
    """
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


# From here on queries are [batch, kv_heads, group, steps, dim], the others [batch, kv_heads, steps, dim], and the state
# is [batch, kv_heads, dim, width]. Products have five axes at most: XLA:CPU dies of some eight, and vmap brings more.


def _step(
    state: Array, q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    if log_decay is not None:
        state = _transposed(jnp.exp(log_decay)) * state
    new = v if beta is None else beta * (v - k @ state)
    state = state + _transposed(k) * new
    return state, _times(q, state)


def _chunk(
    state: Array, q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None
) -> tuple[Array, Array]:
    if beta is None:
        weights, q, k = _pairs(q, k, log_decay)
        new = v
    else:
        # A step takes away what the state held and what the steps before it wrote: (1 + T) u = beta (v - k S), with S
        # from before the chunk and T_ts = beta_t k_t k_s^T, decayed, for s < t (DeltaNet, Yang et al. 2024, sec. 3).
        weights, rows, k = _pairs(jnp.concatenate([q, k[:, :, None]], axis=2), k, log_decay)
        new = _inverse(beta * weights[:, :, -1]) @ (beta * (v - rows[:, :, -1] @ state))
        weights, q = weights[:, :, :-1], rows[:, :, :-1]
    out = _times(weights, new) + _times(q, state)
    if log_decay is not None:
        # Of the sum, not the product of all the steps' decays: its rounding would add up over the chunks.
        state = jnp.exp(log_decay.sum(axis=-2))[..., None] * state
    return state + _transposed(k) @ new, out


def _pairs(q: Array, k: Array, log_decay: Array | None) -> tuple[Array, Array, Array]:
    """As `_joined`, in cheaper forms for one gate a head and for none."""
    if log_decay is None:
        return jnp.where(np.tri(q.shape[-2], dtype=bool), _times(q, _transposed(k)), 0), q, k
    decay = jnp.exp(log_decay)
    if decay.shape[-1] == 1:
        ones = jnp.ones_like(decay)
        decays, since, until = _joined(ones[:, :, None], ones, decay)
        return _times(q, _transposed(k)) * decays, q * since, k * until
    return _joined(q, k, decay)


def _joined(q: Array, k: Array, decay: Array) -> tuple[Array, Array, Array]:
    """Of a chunk:

    each query's products with the keys up to its own step, decayed in between, [batch, kv_heads, group, steps, steps]
    the queries, decayed from the chunk's start on
    the keys, decayed up to the chunk's end

    Runs of steps, at first of one each, are joined two by two. So every decay is a product of numbers in [0, 1]: exact
    however strong, and it may be 0.
    """
    batch, kv_heads, group, _, dim = q.shape
    # As [batch, runs of all heads, group, steps, dim], without the group but for queries.
    q = jnp.moveaxis(q, -2, 2).reshape(batch, -1, group, dim)
    k, decay = (x.reshape(batch, -1, 1, dim) for x in (k, decay))
    weights = (q * k).sum(axis=-1)[..., None, None]
    q = (q * decay)[..., None, :]
    while decay.shape[1] > kv_heads:
        (w0, w1), (q0, q1), (k0, k1), (d0, d1) = (_two(x) for x in (weights, q, k, decay))
        rows = q1.reshape(*q1.shape[:2], -1, dim)  # of the whole group
        weights = _lower(w0, (rows @ _transposed(k0)).reshape(w0.shape), w1)
        # A copy of the decay for each row, by a product, so that its gradient is one: XLA:CPU is slow at sums of rows.
        rows, k0 = (x * _exact(jnp.ones((x.shape[-2], 1), x.dtype), d) for x, d in ((rows, d0), (k0, d1)))
        q = jnp.concatenate([q0, rows.reshape(q1.shape)], axis=-2)
        k, decay = jnp.concatenate([k0, k1], axis=-2), d0 * d1
    return weights, q, k


@jax.custom_jvp
def _inverse(below: Array) -> Array:
    """(1 + T)^-1 for the parts T of matrices below the diagonal, [batch, runs, steps, steps]; the rest is not read.

    Put together from the halves: on CPU several times faster than LAPACK's triangular solve of each matrix.
    """
    batch, runs, steps, _ = below.shape
    if steps == 1:
        return jnp.ones_like(below)
    half = steps // 2
    halves = jnp.stack([below[..., :half, :half], below[..., half:, half:]], axis=2)
    first, second = _two(_inverse(halves.reshape(batch, 2 * runs, half, half)))
    return _lower(first, -_exact(_exact(second, below[..., half:, :half]), first), second)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    inverse = _inverse(*primals)
    return inverse, -_exact(_exact(inverse, jnp.tril(tangents[0], -1)), inverse)


# Not in the shorter numbers that accelerators multiply by default: a decay's rounding counts at every later step, and
# an inverse's grows with the overlap of the keys.
_exact = partial(jnp.matmul, precision="highest")


def _two(x: Array) -> tuple[Array, Array]:
    """The first and the second of each two runs, of [batch, runs, ...]."""
    x = x.reshape(x.shape[0], -1, 2, *x.shape[2:])
    return x[:, :, 0], x[:, :, 1]


def _lower(first: Array, below: Array, second: Array) -> Array:
    """[[first, 0], [below, second]]"""
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def _times(rows: Array, matrix: Array) -> Array:
    """Of each group the same product, [batch, heads, group, rows, a] by [batch, heads, a, c]."""
    return jnp.einsum("bhgra,bhac->bhgrc", rows, matrix)


def _transposed(x: Array) -> Array:
    return x.swapaxes(-1, -2)
