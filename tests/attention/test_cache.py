from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.attention import attention
from jaxarch.attention.cache import Cache, KeyValues, append, empty_cache, grown, next_positions, padding_bias


def test_positions_count_from_the_first_real_slot():
    """Prompts of 4 and 2 tokens in 4 slots: the second begins in slot 2."""
    cache = empty_cache(1, 6, 2, 3, jnp.float32, start=jnp.array([0, 2]))
    np.testing.assert_array_equal(next_positions(cache, 4), [[0, 1, 2, 3], [-2, -1, 0, 1]])
    np.testing.assert_array_equal(next_positions(cache._replace(index=jnp.int32(4)), 1), [[4], [2]])


def test_append_writes_the_next_slots_and_nothing_else():
    (past,) = empty_cache(1, 5, 1, 2, jnp.bfloat16, start=jnp.zeros(2, jnp.int32)).layers
    new = jnp.ones((2, 2, 1, 2))
    keys, values = jax.jit(append)(past, new, 2 * new, 1)
    assert keys.dtype == values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(keys[:, 0, :, 0], [[0, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(values[:, 0, :, 0], [[0, 2, 2, 0, 0]] * 2)


def test_stacked_layers_share_one_entry():
    cache = empty_cache(3, 5, 1, 2, jnp.float32, start=jnp.zeros(4, jnp.int32), stacked=True)
    assert isinstance(cache.layers, KeyValues) and cache.layers.keys.shape == (3, 4, 1, 5, 2)


def test_one_at_a_time_equals_all_at_once():
    """Two rows, the second with two slots of padding that hold arbitrary numbers."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    start = jnp.array([0, 2])
    whole = attention(q, k, v, causal=True, kv_start=start)

    @jax.jit
    def step(cache: Cache, t):
        query, *own = (jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1) for a in (q, k, v))
        (past,) = cache.layers
        past = append(past, *own, cache.index)
        keys, values = (entry.swapaxes(1, 2) for entry in past)
        bias = padding_bias(keys.shape[1], cache.start)
        out = attention(query, keys, values, causal=True, q_offset=cache.index, bias=bias)
        return Cache((past,), cache.index + 1, cache.start), out

    cache = empty_cache(1, 3, 2, 4, jnp.float32, start)
    for t in range(6):
        if t == 3:
            cache = grown(cache, 8)
        cache, out = step(cache, t)
        real = np.asarray(start) <= t  # what a query of the padding sees is of no use
        np.testing.assert_allclose(out[real, 0], whole[real, t], rtol=1e-5, atol=1e-6)
