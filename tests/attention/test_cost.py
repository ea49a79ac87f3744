from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxarch.attention.cost import crossover, flops, projection_flops, visible_pairs
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask, visible
from jaxarch.attention.options import Options


@given(
    st.integers(1, 9), st.integers(1, 9), st.booleans(), st.none() | st.integers(1, 12), st.integers(-4, 4),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_pairs_are_those_of_the_mask(length, keys, causal, window, q_offset, packed, seed):
    rng = np.random.default_rng(seed)
    segments = (rng.integers(0, 3, length), rng.integers(0, 3, keys)) if packed else (None, None)
    mask = Mask(causal, window, q_offset, *(None if s is None else jnp.asarray(s)[None] for s in segments))
    seen = visible(mask, jnp.arange(length), jnp.arange(keys))
    counted = visible_pairs(
        length, keys, causal=causal, window=window, q_offset=q_offset, q_segments=segments[0], kv_segments=segments[1]
    )
    assert counted == int(seen.sum())


def test_pairs_by_hand():
    assert visible_pairs(4, 4) == 16
    assert visible_pairs(4, 4, causal=True) == 10
    assert visible_pairs(100_000, 100_000, causal=True) == 100_000 * 100_001 // 2
    assert visible_pairs(5, 5, causal=True, window=2) == 9
    assert visible_pairs(1, 9, causal=True, q_offset=8) == 9


@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
def test_operations_are_those_that_the_compiler_counts(pass_):
    """Of dense attention, which has no loop: its products make all but a few per cent at widths of 64 and 48."""
    batch, length, keys, heads, dim, width = 2, 128, 192, 2, 64, 48
    shapes = [(batch, length, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, width)]
    arrays = [jnp.ones(shape) for shape in shapes]

    def out(q, k, v):
        return dense_attention(q, k, v, Options(Mask(), 1.0))[0]

    function = out if pass_ == "forward" else jax.value_and_grad(lambda *qkv: out(*qkv).sum(), argnums=(0, 1, 2))
    counted = jax.jit(function).lower(*arrays).cost_analysis()["flops"]
    expected = flops(length * keys, batch, heads, dim, width, pass_, weights_kept=True)
    assert 1 <= counted / expected < 1.12


def test_attention_passes_its_projections_at_the_crossover():
    heads, head_dim = 4, 32
    for causal in (False, True):
        n = crossover(heads * head_dim, causal)

        def ratio(length, causal=causal):
            own = flops(visible_pairs(length, length, causal=causal), 1, heads, head_dim, head_dim)
            return own / projection_flops(1, length, heads * head_dim, heads, heads, head_dim)

        assert ratio(n - 2) < 1 <= ratio(n)
