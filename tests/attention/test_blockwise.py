"""Blocks of queries and keys against the dense reference, in float64: output, log-sum-exp and all gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxarch.attention import attention, chosen
from jaxarch.attention.blockwise import blockwise_attention
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask

QUERIES, KEYS = 4, 6  # in a block
LENGTHS = st.sampled_from([1, 3, 4, 5, 7, 13])  # one, block - 1, block, block + 1, primes


@st.composite
def cases(draw):
    """Shapes, and which options are on."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shapes = (
        batch,
        draw(LENGTHS),
        draw(LENGTHS),
        kv_heads,
        group,
        draw(st.sampled_from([2, 3])),
        draw(st.integers(1, 3)),
    )
    names = ["segments", "kv_start", "kv_length", "sinks", "soft_cap", "dropout"]
    on = {name for name in names if draw(st.booleans())}
    bias = draw(st.none() | st.tuples(*[st.booleans()] * 4))  # which of its axes are shared
    return shapes, on, bias, draw(st.booleans()), draw(st.none() | st.integers(1, 9)), draw(st.integers(-3, 5))


def results(function, shapes, on, bias, causal, window, q_offset):
    batch, length, keys, kv_heads, group, dim, width = shapes
    heads = kv_heads * group
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=size))
        for size in ((batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, width))
    )
    sinks = jnp.asarray(rng.normal(size=heads)) if "sinks" in on else None
    if bias is not None:
        full = batch, heads, length, keys
        bias = jnp.asarray(rng.normal(size=[1 if shared else size for shared, size in zip(bias, full, strict=True)]))
    segments = [jnp.asarray(np.sort(rng.integers(0, 3, (batch, size)), axis=1)) for size in (length, keys)]
    mask = Mask(causal, window, q_offset, *(segments if "segments" in on else (None, None)))
    if "kv_start" in on:
        mask = mask._replace(kv_start=jnp.asarray(rng.integers(0, keys, batch)))
    if "kv_length" in on:
        mask = mask._replace(kv_length=jnp.asarray(rng.integers(0, keys + 1, batch)))
    dropout_key = jax.random.key(3) if "dropout" in on else None

    def energy(q, k, v, bias, sinks):
        cap = 2.0 if "soft_cap" in on else None
        out, lse = function(q, k, v, mask, bias, cap, sinks, 0.7, 0.3, dropout_key)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        total = (out * jnp.asarray(np.random.default_rng(1).normal(size=out.shape))).sum()
        return total + (finite * jnp.asarray(np.random.default_rng(2).normal(size=lse.shape))).sum(), (out, lse)

    return jax.jit(jax.value_and_grad(energy, argnums=(0, 1, 2, 3, 4), has_aux=True))(q, k, v, bias, sinks)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_blockwise_is_dense(case):
    with jax.enable_x64(True):
        function = partial(blockwise_attention, block_queries=QUERIES, block_keys=KEYS)
        own, expected = results(function, *case), results(dense_attention, *case)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), own, expected)


@pytest.mark.parametrize("window", [1, QUERIES - 1, QUERIES, QUERIES + 1, 13, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_the_window(window, causal):
    case = (1, 13, 13, 1, 1, 2, 2), set(), None, causal, window, 0
    with jax.enable_x64(True):
        function = partial(blockwise_attention, block_queries=QUERIES, block_keys=KEYS)
        own, expected = results(function, *case), results(dense_attention, *case)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), own, expected)


@pytest.mark.parametrize("q_offset", [-1, 3])
def test_edges_of_the_diagonal(q_offset):
    """The second block of keys begins where only the last query of a block sees it."""
    case = (1, 13, 13, 1, 1, 2, 2), set(), None, True, None, q_offset
    with jax.enable_x64(True):
        function = partial(blockwise_attention, block_queries=QUERIES, block_keys=KEYS)
        own, expected = results(function, *case), results(dense_attention, *case)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), own, expected)


def gradient(length):
    def loss(x):
        function = partial(blockwise_attention, block_queries=32, block_keys=64)
        return function(x, x, x, Mask(causal=True), None, None, None, 1.0, 0.0, None)[0].sum()

    return jax.jit(jax.grad(loss)).lower(jnp.ones((1, length, 2, 16))).compile()


def test_memory_is_linear_in_the_length():
    """No array of length x length, forward or backward, and temporaries that double with it."""
    one, two = gradient(1024), gradient(2048)
    assert "2048,2048" not in two.as_text()
    ratio = two.memory_analysis().temp_size_in_bytes / one.memory_analysis().temp_size_in_bytes
    assert ratio <= 2.1, ratio


def test_composes_with_vmap_and_remat():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, 5, 2, 4)), jnp.float32) for _ in range(3))
    lengths = jnp.array([[1, 5], [2, 3], [5, 4]])

    def energy(q, k, v, lengths, implementation):
        return jnp.square(attention(q, k, v, kv_length=lengths, implementation=implementation)).sum()

    def gradients(implementation):
        one = jax.checkpoint(partial(energy, implementation=implementation))
        return jax.jit(jax.vmap(jax.grad(one, argnums=(0, 1, 2))))(q, k, v, lengths)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradients("blockwise"), gradients("dense"))


def test_what_auto_takes():
    assert chosen(256, 256, plain=True) == "blocks"
    assert chosen(256, 256, plain=False) == chosen(1, 100_000, plain=False) == "dense"
    assert chosen(4096, 4096, plain=True) == chosen(4096, 4096, plain=False) == "blockwise"
    x = jnp.ones((1, 4096, 1, 2))
    assert "4096,4096" not in jax.jit(lambda x: attention(x, x, x, causal=True)).lower(x).compile().as_text()
