"""Implementations beside each other, in float64: output, log-sum-exp and all gradients, over a grid of options."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options

EVERY = ("segments", "kv_start", "kv_length", "sinks", "soft_cap", "dropout", "bias")
WINDOWS = st.none() | st.integers(1, 9)


class Case(NamedTuple):
    """Shapes, and which options are on."""

    batch: int = 1
    length: int = 13
    keys: int = 13
    kv_heads: int = 1
    group: int = 1
    dim: int = 2
    width: int = 2
    on: frozenset[str] = frozenset()
    shared: tuple[bool, ...] = (False,) * 4  # which axes of the bias are
    causal: bool = False
    window: int | None = None
    q_offset: int = 0


@st.composite
def cases(draw, lengths, options=EVERY, windows=WINDOWS, self_attention=False):
    """lengths: say one, block - 1, block, block + 1, primes. self_attention: as many keys as queries, no offset."""
    length = draw(st.sampled_from(lengths))
    keys = length if self_attention else draw(st.sampled_from(lengths))
    sizes = draw(st.tuples(*[st.integers(1, 2)] * 3, st.integers(2, 3), st.integers(1, 3)))
    batch, kv_heads, group, dim, width = sizes
    on = frozenset(name for name in options if draw(st.booleans()))
    shared = draw(st.tuples(*[st.booleans()] * 4))
    q_offset = 0 if self_attention else draw(st.integers(-3, 5))
    return Case(
        batch, length, keys, kv_heads, group, dim, width, on, shared, draw(st.booleans()), draw(windows), q_offset
    )


def results(function, case: Case):
    """Of `(q, k, v, options) -> (out, lse)`: a number made of both, its gradients, and both."""
    batch, length, keys, heads = case.batch, case.length, case.keys, case.kv_heads * case.group
    rng = np.random.default_rng(0)
    shapes = (
        (batch, length, heads, case.dim),
        (batch, keys, case.kv_heads, case.dim),
        (batch, keys, case.kv_heads, case.width),
    )
    q, k, v = (jnp.asarray(rng.normal(size=size)) for size in shapes)
    sinks = jnp.asarray(rng.normal(size=heads)) if "sinks" in case.on else None
    bias = None
    if "bias" in case.on:
        full = batch, heads, length, keys
        bias = jnp.asarray(rng.normal(size=[1 if one else size for one, size in zip(case.shared, full, strict=True)]))
    numbers = np.sort(rng.integers(0, 3, (batch, max(length, keys))), axis=1)
    segments = [jnp.asarray(numbers[:, :size]) for size in (length, keys)] if "segments" in case.on else (None, None)
    mask = Mask(case.causal, case.window, case.q_offset, *segments)
    if "kv_start" in case.on:
        mask = mask._replace(kv_start=jnp.asarray(rng.integers(0, keys, batch)))
    if "kv_length" in case.on:
        mask = mask._replace(kv_length=jnp.asarray(rng.integers(0, keys + 1, batch)))
    dropout_key = jax.random.key(3) if "dropout" in case.on else None
    soft_cap = 2.0 if "soft_cap" in case.on else None

    def energy(q, k, v, bias, sinks):
        out, lse = function(q, k, v, Options(mask, 0.7, bias, soft_cap, sinks, 0.3, dropout_key))
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        total = (out * jnp.asarray(np.random.default_rng(1).normal(size=out.shape))).sum()
        return total + (finite * jnp.asarray(np.random.default_rng(2).normal(size=lse.shape))).sum(), (out, lse)

    return jax.jit(jax.value_and_grad(energy, argnums=(0, 1, 2, 3, 4), has_aux=True))(q, k, v, bias, sinks)


def assert_is_dense(function, case: Case):
    with jax.enable_x64(True):
        own, expected = results(function, case), results(dense_attention, case)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), own, expected)
