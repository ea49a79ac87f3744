"""Blocks of queries and keys against the dense reference, in float64: output, log-sum-exp and all gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxarch.attention import attention, chosen
from jaxarch.attention.blockwise import blockwise_attention
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options
from tests.attention.comparing import Case, assert_is_dense, cases

QUERIES, KEYS = 4, 6  # in a block
LENGTHS = [1, 3, 4, 5, 7, 13]  # one, block - 1, block, block + 1, primes

in_blocks = partial(blockwise_attention, block_queries=QUERIES, block_keys=KEYS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(LENGTHS))
def test_blockwise_is_dense(case):
    assert_is_dense(in_blocks, case)


@pytest.mark.parametrize("window", [1, QUERIES - 1, QUERIES, QUERIES + 1, 13, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_the_window(window, causal):
    assert_is_dense(in_blocks, Case(causal=causal, window=window))


@pytest.mark.parametrize("q_offset", [-1, 3])
def test_edges_of_the_diagonal(q_offset):
    """The second block of keys begins where only the last query of a block sees it."""
    assert_is_dense(in_blocks, Case(causal=True, q_offset=q_offset))


def test_blocks_of_which_nothing_is_seen_are_not_visited():
    """A NaN in a block that is visited reaches its rows, though its weight is 0. Half of 24 keys are NaN."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 24, 1, 2)), jnp.float32)
    early, late = x.at[:, :12].set(jnp.nan), x.at[:, 12:].set(jnp.nan)

    def clean(k, **mask):
        """How many rows have no NaN: of the output, of the gradient of the queries and of that of the keys."""
        out, pullback = jax.vjp(lambda q, k: in_blocks(q, k, x, Options(Mask(**mask), 1.0))[0], x, k)
        return [int((~jnp.isnan(rows).any(axis=(0, 2, 3))).sum()) for rows in (out, *pullback(jnp.ones_like(out)))]

    assert clean(late, causal=True) == [12, 12, 0]
    # Of the clean keys the last 2 are seen by a block of 4 queries that sees others, and so are their 6's gradients.
    assert clean(late, window=3) == clean(early, window=3) == [8, 8, 6]
    assert clean(late, kv_length=jnp.array([12])) == clean(early, kv_start=jnp.array([12])) == [24, 24, 24]


@pytest.mark.parametrize("blocks", [(1, 1), (3, 7), (13, 2), (32, 64)])
def test_the_size_of_blocks_changes_nothing(blocks):
    on = frozenset({"dropout", "sinks", "segments"})
    sized = partial(blockwise_attention, block_queries=blocks[0], block_keys=blocks[1])
    assert_is_dense(sized, Case(batch=2, group=2, on=on, causal=True))


def gradient(length):
    def loss(x):
        function = partial(blockwise_attention, block_queries=32, block_keys=64)
        return function(x, x, x, Options(Mask(causal=True), 1.0))[0].sum()

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
    assert chosen(256, 256, {"causal"}) == chosen(1024, 1024, {"causal"}) == "blocks"
    assert chosen(4096, 256, set()) == chosen(1024, 1024, set()) == "dense"
    assert chosen(1025, 1025, {"causal"}) == chosen(4096, 257, set()) == "blockwise"
    assert chosen(256, 256, {"causal", "bias"}) == chosen(1, 100_000, set()) == chosen(256, 300, {"causal"}) == "dense"
    assert chosen(4096, 4096, {"causal"}) == chosen(4096, 4096, {"bias"}) == "blockwise"
    assert (
        chosen(4096, 4096, {"window"}, window=256) == chosen(1024, 1024, {"window", "causal"}, window=256) == "window"
    )
    assert chosen(4096, 4096, {"window"}, window=4000) == chosen(4096, 4096, {"window", "bias"}, 256) == "blockwise"
    x = jnp.ones((1, 4096, 1, 2))
    assert "4096,4096" not in jax.jit(lambda x: attention(x, x, x, causal=True)).lower(x).compile().as_text()
