from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxarch.attention import attention
from jaxarch.attention.cost import (
    Shape,
    bytes_moved,
    crossover,
    flops,
    linear_flops,
    peak_bytes,
    projection_flops,
    visible_pairs,
)
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


def planned(implementation, shape, pass_, causal, window):
    """Bytes of arguments, results and temporaries, as the compiler plans them."""

    def forward(q, k, v):
        return attention(q, k, v, causal=causal, window=window, implementation=implementation)

    def both(*qkv):
        out, pullback = jax.vjp(forward, *qkv)
        return out, pullback(out)

    sizes = (shape.heads, shape.dim), (shape.kv_heads, shape.dim), (shape.kv_heads, shape.width)
    arrays = [jax.ShapeDtypeStruct((shape.batch, shape.length, *size), jnp.float32) for size in sizes]
    memory = jax.jit(forward if pass_ == "forward" else both).lower(*arrays).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    "implementation, length, causal, window",
    [
        ("dense", 1024, False, None), ("blocks", 512, True, None), ("blockwise", 2048, True, None),
        ("blockwise", 8192, False, None), ("window", 4096, True, 256), ("window", 4096, False, 100),
    ],
)  # fmt: skip
def test_memory_is_what_the_compiler_plans(implementation, length, causal, window, pass_):
    shape = Shape(1, length, 4, 4, 64, 64)
    expected = planned(implementation, shape, pass_, causal, window)
    assert 0.75 < peak_bytes(implementation, shape, pass_, causal, window) / expected < 1.25


def test_bytes_by_hand():
    """q and out have 8 x 2 x 4 numbers of 4 bytes, k and v half of that each: 768 bytes, with gradients 1,280."""
    shape = Shape(1, 8, 2, 1, 4, 4)
    assert bytes_moved("dense", shape, 64) == 768 + 4 * 2 * 64 * 4
    assert bytes_moved("dense", shape, 64, "forward_backward") == 1280 + 9 * 2 * 64 * 4
    assert peak_bytes("dense", shape) == 768 + 2 * 2 * 64 * 4
    long = Shape(1, 5120, 2, 1, 4, 4)  # 10 blocks of queries, each of which reads all keys and values
    assert bytes_moved("blockwise", long, 5120 * 5120) == 5120 * 96 + 10 * 5120 * 32
    # A window of 256 reaches its own block of 256 and one on either side: copied, and the copies read.
    assert bytes_moved("window", long, 5120 * 256, window=256) == 5120 * 96 + 3 * 3 * 5120 * 32
    with pytest.raises(ValueError, match="no formula for 'splash'"):
        bytes_moved("splash", long, 1)


def test_operations_of_linear_attention_by_hand():
    """Two query heads on one state of 3 x 4, 6 steps: by steps 3 products of 12 each; in chunks of 2 also 2 x 2 x 7."""
    assert linear_flops(1, 6, 2, 1, 3, 4, chunk=1) == 2 * 6 * 36
    assert linear_flops(1, 6, 2, 1, 3, 4, chunk=2) == 2 * 6 * (36 + 28)


def test_the_backward_pass_by_hand():
    """With the output and its gradient 1,536 bytes; 20 blocks of keys, each of which reads q, d_out and d_q."""
    assert flops(10, 1, 1, 4, 6, "backward") == 2 * 10 * (2 * 4 + 2 * 6 + 4)
    assert flops(10, 1, 1, 4, 6, "backward", weights_kept=True) == 2 * 10 * (2 * 4 + 2 * 6)
    assert bytes_moved("dense", Shape(1, 8, 2, 1, 4, 4), 64, "backward") == 1536 + 5 * 2 * 64 * 4
    for size in (4, 2):  # the gradient of the queries is in float32, written and read
        moved = bytes_moved("blockwise", Shape(1, 5120, 2, 1, 4, 4, size), 5120 * 5120, "backward")
        assert moved == 5120 * 48 * size + 20 * 5120 * 2 * (8 * size + 2 * 4 * 4)


def test_memory_by_hand_of_short_sequences_in_rows_and_in_bfloat16():
    """Weights are in float32, as many as the sequence is long; blockwise has a copy of k and v, 256 bytes."""
    shape = Shape(1, 8, 2, 1, 4, 4)
    assert peak_bytes("blockwise", shape) == 768 + 256 + 3 * 2 * 64 * 4
    assert peak_bytes("dense", shape._replace(itemsize=2)) == 384 + 2 * 2 * 64 * 4
    for name in ("dense", "blockwise"):
        assert peak_bytes(name, shape._replace(batch=3)) == 3 * peak_bytes(name, shape)


def test_bytes_moved_grow_as_the_memory_that_weights_take():
    """Dense attention's with the square of the length, the window's in proportion to it."""
    one, two = (Shape(1, n, 8, 8, 64, 64) for n in (16384, 32768))
    assert bytes_moved("dense", two, 32768**2) / bytes_moved("dense", one, 16384**2) == pytest.approx(4, rel=0.02)
    pairs = [visible_pairs(n, n, causal=True, window=256) for n in (16384, 32768)]
    ratio = bytes_moved("window", two, pairs[1], window=256) / bytes_moved("window", one, pairs[0], window=256)
    assert ratio == pytest.approx(2, rel=0.02)
