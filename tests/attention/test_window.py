"""The window's own form against the dense reference, in float64: output, log-sum-exp and all gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxarch.attention import attention
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options
from jaxarch.attention.window import Sizes, sizes, window_attention
from tests.attention.comparing import Case, assert_is_dense, cases

BLOCK = 4
HAS = ("segments", "kv_start", "kv_length", "sinks", "soft_cap")

in_blocks = partial(window_attention, block=BLOCK)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases([1, 3, 4, 5, 7, 13], HAS, st.integers(1, 9), self_attention=True))
def test_window_is_dense(case):
    assert_is_dense(in_blocks, case)


@pytest.mark.parametrize("window", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 13, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_the_window(window, causal):
    assert_is_dense(in_blocks, Case(causal=causal, window=window))


def test_no_more_blocks_than_the_window_reaches():
    """A block's first query looks window - 1 positions back, and never past the ends."""
    for window, length, causal, expected in [
        (1, 1000, True, (64, 0, 0)), (65, 1000, True, (65, 1, 0)), (10, 1000, False, (64, 1, 1)),
        (257, 1000, True, (256, 1, 0)), (258, 1000, True, (256, 2, 0)), (300, 100, False, (100, 0, 0)),
    ]:  # fmt: skip
        assert sizes(window, length, causal) == Sizes(*expected)


def test_a_length_past_the_last_key_shows_no_more():
    x = jnp.arange(140.0).reshape(1, 70, 1, 2) / 140  # in two blocks, the second filled up
    run = partial(attention, x, x, x, window=3)
    np.testing.assert_allclose(
        run(kv_length=jnp.array([99]), implementation="window"), run(implementation="dense"), rtol=1e-5
    )


def test_memory_is_linear_in_the_length():
    def gradient(length):
        def loss(x):
            return window_attention(x, x, x, Options(Mask(True, 64), 1.0), block=64)[0].sum()

        return jax.jit(jax.grad(loss)).lower(jnp.ones((1, length, 2, 16))).compile()

    one, two = gradient(1024), gradient(2048)
    assert "2048,2048" not in two.as_text()
    ratio = two.memory_analysis().temp_size_in_bytes / one.memory_analysis().temp_size_in_bytes
    assert ratio <= 2.1, ratio


def test_what_it_lacks_is_refused():
    x = jnp.ones((1, 8, 2, 4))
    for options, message in [
        ({"bias": jnp.ones((1, 1, 8, 8)), "window": 2}, "window lacks bias; blockwise has"),
        ({"q_offset": 1, "window": 2}, "window lacks q_offset"),
        ({}, "window needs window"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(x, x, x, implementation="window", **options)
    with pytest.raises(ValueError, match="as many keys as queries, not for 7 and 8"):
        attention(x, x[:, :7], x[:, :7], window=2, implementation="window")
