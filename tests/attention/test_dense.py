from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxarch.attention import attention


def definition(q, k, v, causal=False, q_offset=0, kv_start=None, kv_length=None, bias=None, soft_cap=None, scale=None):
    """Query by query, over the list of keys that it sees, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (batch, length, heads, dim), keys, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out = np.zeros((batch, length, heads, v.shape[-1]))
    for b, t, h in np.ndindex(batch, length, heads):
        first = 0 if kv_start is None else int(kv_start[b])
        end = keys if kv_length is None else int(kv_length[b])
        seen = [j for j in range(first, end) if not causal or j <= t + q_offset]
        if seen:
            logits = k[b, seen, h // group] @ q[b, t, h] * (scale or dim**-0.5)
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            if bias is not None:
                logits = logits + np.broadcast_to(bias, (batch, heads, length, keys))[b, h, t, seen]
            weights = np.exp(logits - logits.max())
            out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


def arrays(batch=2, length=5, keys=5, heads=4, kv_heads=4, dim=8, width=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


BIAS = np.random.default_rng(1).normal(size=(1, 4, 5, 7)).astype(np.float32)
RANGES = {"kv_start": jnp.array([0, 3]), "kv_length": jnp.array([2, 7])}
CASES = {
    "all see all": ({}, {}),
    "causal": ({}, {"causal": True}),
    "more keys, the last query sees all": ({"keys": 7}, {"causal": True, "q_offset": 2}),
    "more keys, aligned at the first": ({"keys": 7}, {"causal": True}),
    "first queries see nothing": ({}, {"causal": True, "q_offset": -2}),
    "grouped": ({"kv_heads": 2}, {"causal": True}),
    "one key head": ({"kv_heads": 1}, {}),
    "wider values": ({"width": 3, "kv_heads": 2}, {"causal": True}),
    "capped": ({}, {"causal": True, "soft_cap": 0.7}),
    "scaled": ({}, {"scale": 0.9}),
    "biased": ({"keys": 7}, {"bias": jnp.asarray(BIAS)}),
    "ranges": ({"keys": 7, "kv_heads": 2}, RANGES),
    "one query over a cache": (
        {"length": 1, "keys": 7, "kv_heads": 2, "width": 3},
        {"causal": True, "q_offset": 4, "soft_cap": 2.0, **RANGES},
    ),
    "everything": (
        {"keys": 7, "kv_heads": 2, "width": 3},
        {"causal": True, "q_offset": 1, "bias": jnp.asarray(BIAS), "soft_cap": 2.0, "scale": 0.5, **RANGES},
    ),
}


@pytest.mark.parametrize("implementation", ["dense", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation):
    shapes, options = CASES[name]
    q, k, v = arrays(**shapes)
    out = jax.jit(lambda *qkv: attention(*qkv, **options, implementation=implementation))(q, k, v)
    np.testing.assert_allclose(out, definition(q, k, v, **options), rtol=1e-5, atol=1e-5)


def test_gradients_equal_finite_differences():
    shapes, options = CASES["everything"]
    with jax.enable_x64(True):
        inputs = arrays(dtype=jnp.float64, **shapes)
        check_grads(
            jax.jit(lambda *qkv: attention(*qkv, **options)),
            inputs,
            order=1,
            modes=["rev"],
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_offset_may_be_traced():
    q, k, v = arrays(keys=7)
    traced = jax.jit(lambda offset: attention(q, k, v, causal=True, q_offset=offset))(2)
    np.testing.assert_allclose(traced, definition(q, k, v, causal=True, q_offset=2), rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = arrays()
    options = {"causal": True, "q_offset": -2, "kv_length": jnp.array([0, 5])}

    @jax.jit
    def out_and_grads(qkv):
        out = attention(*qkv, **options)
        return out, jax.grad(lambda qkv: jnp.square(attention(*qkv, **options)).sum())(qkv)

    out, grads = out_and_grads((q, k, v))
    assert not out[0].any() and not out[1, :2].any() and out[1, 2:].all()
    assert all(jnp.isfinite(grad).all() for grad in grads)
    assert all(not grad[0].any() for grad in grads), "a row that sees nothing moves nothing"


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_what_lies_outside_the_range_does_not_leak(poison):
    q, k, v = arrays(keys=7)

    @jax.jit
    def out_and_grads(filling):
        outside = (jnp.arange(7) < RANGES["kv_start"][:, None]) | (jnp.arange(7) >= RANGES["kv_length"][:, None])
        filled = [jnp.where(outside[:, :, None, None], filling, a) for a in (k, v)]

        def energy(q, k, v):
            out = attention(q, k, v, **RANGES)
            return jnp.square(out).sum(), out

        return jax.grad(energy, argnums=(0, 1, 2), has_aux=True)(q, *filled)

    for poisoned, clean in zip(
        jax.tree.leaves(out_and_grads(poison)), jax.tree.leaves(out_and_grads(0.0)), strict=True
    ):
        np.testing.assert_array_equal(poisoned, clean)


@pytest.mark.parametrize("implementation", ["dense", "auto"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_great_logits_stay_finite(size, implementation):
    q, k, v = arrays(length=3, keys=3)
    factors = jnp.array([1.0, 1.01, 1.02])[:, None, None]
    q, k = jnp.ones_like(q), jnp.full_like(k, size / 8**0.5) * factors

    @jax.jit
    @jax.grad
    def grads(qkv):
        return attention(*qkv, causal=True, implementation=implementation).sum()

    assert all(jnp.isfinite(grad).all() for grad in grads((q, k, v)))
    winner = 2 if size > 0 else 0  # the logits are 100 apart: all weight is on the greatest
    np.testing.assert_array_equal(attention(q, k, v, implementation=implementation)[:, 0], v[:, winner])


@pytest.mark.parametrize("implementation", ["dense", "auto"])
def test_softmax_of_bfloat16_is_in_float32(implementation):
    """Logits near 10 have steps of 1/16 in bfloat16: weights from such logits are off by several per cent."""
    q, k, v = arrays(length=64, keys=64, dim=64, dtype=jnp.bfloat16)
    q = q * 10
    out = attention(q, k, v, causal=True, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), definition(q, k, v, causal=True), rtol=0.01, atol=0.01)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 heads of keys do not divide 4"):
        attention(*arrays(kv_heads=3))
