"""Blocks of queries against the dense reference, forward and all gradients, in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention import attention
from jaxarch.attention.blocks import BLOCK


@pytest.mark.parametrize(
    "length, kv_heads, width",
    [(1, 4, 6), (BLOCK - 1, 2, 6), (BLOCK, 1, 3), (BLOCK + 1, 4, 6), (2 * BLOCK + 3, 2, 3)],
)
def test_blocks_are_dense(length, kv_heads, width):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(length), 4)
        q = jax.random.normal(keys[0], (2, length, 4, 6))
        k = jax.random.normal(keys[1], (2, length, kv_heads, 6))
        v = jax.random.normal(keys[2], (2, length, kv_heads, width))
        d_out = jax.random.normal(keys[3], (2, length, 4, width))

        def value_and_gradients(implementation):
            def run(*qkv):
                function = partial(attention, causal=True, scale=0.7, implementation=implementation)
                out, pullback = jax.vjp(function, *qkv)
                return out, *pullback(d_out)

            return jax.jit(run)(q, k, v)

        for own, expected in zip(value_and_gradients("blocks"), value_and_gradients("dense"), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-10, atol=1e-12)


def test_auto_takes_blocks_and_they_refuse_what_they_lack():
    x = jnp.ones((1, 8, 2, 4))
    compiled = str(jax.make_jaxpr(lambda x: attention(x, x, x, causal=True))(x))
    assert "custom_vjp" in compiled
    with pytest.raises(ValueError, match="blocks lacks soft_cap; blockwise has"):
        attention(x, x, x, causal=True, soft_cap=5.0, implementation="blocks")
    with pytest.raises(ValueError, match="blocks needs causal; blockwise has"):
        attention(x, x, x, implementation="blocks")


def test_blocks_hold_half_of_the_weights():
    """Long enough, no [length, length] array is in the compiled text, and the temporaries are well below dense's."""
    x = jnp.ones((1, 8 * BLOCK, 2, 16))

    def gradient(implementation):
        loss = lambda x: attention(x, x, x, causal=True, implementation=implementation).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(x).compile()

    blocks, dense = gradient("blocks"), gradient("dense")
    square = f"{8 * BLOCK},{8 * BLOCK}]"
    assert square in dense.as_text()
    assert blocks.memory_analysis().temp_size_in_bytes < 0.75 * dense.memory_analysis().temp_size_in_bytes
