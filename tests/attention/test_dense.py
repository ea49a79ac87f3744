from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxarch.attention import attention

unchecked = inspect.unwrap(attention)  # as in use, where annotations are not checked
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["dense", "blockwise", "auto"])


def definition(
    q, k, v, causal=False, q_offset=0, kv_start=None, kv_length=None, bias=None, soft_cap=None, scale=None,
    window=None, q_segments=None, kv_segments=None, sinks=None,
):  # fmt: skip
    """Query by query, over the list of keys that it sees, in float64; the log-sum-exp too."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (batch, length, heads, dim), keys, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = np.zeros((batch, length, heads, v.shape[-1])), np.full((batch, length, heads), -np.inf)
    for b, t, h in np.ndindex(batch, length, heads):
        first = 0 if kv_start is None else int(kv_start[b])
        end = keys if kv_length is None else int(kv_length[b])
        seen = [j for j in range(first, end) if not causal or j <= t + q_offset]
        seen = [j for j in seen if window is None or abs(j - t - q_offset) < window]
        seen = [j for j in seen if q_segments is None or q_segments[b, t] == kv_segments[b, j]]
        if sinks is not None:
            lse[b, t, h] = sinks[h]
        if seen:
            logits = k[b, seen, h // group] @ q[b, t, h] * (scale or dim**-0.5)
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            if bias is not None:
                logits = logits + np.broadcast_to(bias, (batch, heads, length, keys))[b, h, t, seen]
            lse[b, t, h] = np.logaddexp.reduce([*logits, lse[b, t, h]])
            out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, seen, h // group]
    return out, lse


def arrays(batch=2, length=5, keys=5, heads=4, kv_heads=4, dim=8, width=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


BIAS = np.random.default_rng(1).normal(size=(1, 4, 5, 7)).astype(np.float32)
SINKS = jnp.array([0.3, -1.0, 2.0, 0.0])
SEGMENTS = {
    "q_segments": jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]),
    "kv_segments": jnp.array([[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2, 2]]),
}
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
    "a window behind": ({}, {"causal": True, "window": 2}),
    "a window around": ({"keys": 7}, {"window": 2, "q_offset": 1}),
    "its own position alone": ({}, {"window": 1}),
    "packed": ({"keys": 7}, {"causal": True, "q_offset": 1, **SEGMENTS}),
    "sinks": ({"kv_heads": 2}, {"causal": True, "sinks": SINKS}),
    "sinks, and nothing else to see": ({}, {"causal": True, "q_offset": -2, "sinks": SINKS}),
    "everything": (
        {"keys": 7, "kv_heads": 2, "width": 3},
        {
            "causal": True,
            "q_offset": 1,
            "window": 4,
            "bias": jnp.asarray(BIAS),
            "soft_cap": 2.0,
            "scale": 0.5,
            "sinks": SINKS,
            **RANGES,
            **SEGMENTS,
        },
    ),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, implementation):
    shapes, options = CASES[name]
    q, k, v = arrays(**shapes)

    @jax.jit
    def both(*qkv):
        out = attention(*qkv, **options, implementation=implementation)
        return out, attention(*qkv, **options, implementation=implementation, return_lse=True)

    out, (again, lse) = both(q, k, v)
    expected = definition(q, k, v, **options)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
def test_gradients_equal_finite_differences(implementation):
    shapes, options = CASES["everything"]
    with jax.enable_x64(True):
        inputs = arrays(dtype=jnp.float64, **shapes)
        check_grads(
            jax.jit(lambda *qkv: attention(*qkv, **options, implementation=implementation)),
            inputs,
            order=1,
            modes=["rev"],
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_offset_may_be_traced():
    q, k, v = arrays(keys=7)
    traced = jax.jit(lambda offset: attention(q, k, v, causal=True, q_offset=offset))(2)
    np.testing.assert_allclose(traced, definition(q, k, v, causal=True, q_offset=2)[0], rtol=1e-5, atol=1e-5)


@IMPLEMENTATIONS
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(implementation):
    q, k, v = arrays()
    options = {"causal": True, "q_offset": -2, "kv_length": jnp.array([0, 5]), "implementation": implementation}

    @jax.jit
    def out_and_grads(qkv):
        out = attention(*qkv, **options)
        return out, jax.grad(lambda qkv: jnp.square(attention(*qkv, **options)).sum())(qkv)

    out, grads = out_and_grads((q, k, v))
    assert not out[0].any() and not out[1, :2].any() and out[1, 2:].all()
    assert all(jnp.isfinite(grad).all() for grad in grads)
    assert all(not grad[0].any() for grad in grads), "a row that sees nothing moves nothing"


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_what_lies_outside_the_range_does_not_leak(poison, implementation):
    q, k, v = arrays(keys=7)

    @jax.jit
    def out_and_grads(filling):
        outside = (jnp.arange(7) < RANGES["kv_start"][:, None]) | (jnp.arange(7) >= RANGES["kv_length"][:, None])
        filled = [jnp.where(outside[:, :, None, None], filling, a) for a in (k, v)]

        def energy(q, k, v):
            out = attention(q, k, v, **RANGES, implementation=implementation)
            return jnp.square(out).sum(), out

        return jax.grad(energy, argnums=(0, 1, 2), has_aux=True)(q, *filled)

    for poisoned, clean in zip(
        jax.tree.leaves(out_and_grads(poison)), jax.tree.leaves(out_and_grads(0.0)), strict=True
    ):
        np.testing.assert_array_equal(poisoned, clean)


@IMPLEMENTATIONS
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


@IMPLEMENTATIONS
def test_softmax_of_bfloat16_is_in_float32(implementation):
    """Logits near 10 have steps of 1/16 in bfloat16: weights from such logits are off by several per cent."""
    q, k, v = arrays(length=64, keys=64, dim=64, dtype=jnp.bfloat16)
    q = q * 10
    out = attention(q, k, v, causal=True, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), definition(q, k, v, causal=True)[0], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        ({"kv_heads": 3}, {}, "3 heads of keys do not divide 4"),
        ({}, {"window": 0}, "a window of 0 holds nothing"),
        ({}, {"q_segments": jnp.zeros((2, 5), jnp.int32)}, "go together"),
        ({}, {"dropout": 1.0}, r"not in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*arrays(**shapes), **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q, k.astype(jnp.bfloat16), v), "float32, bfloat16 and float32; give them one type"),
        (lambda q, k, v: (q.astype(jnp.int32), k, v), "q is int32; attention is for floating-point numbers"),
        (lambda q, k, v: (q, k[:1], v[:1]), "batches of 2, 1 and 1; give them one size"),
        (lambda q, k, v: (q, k, v[:, :4]), "5 keys in 4 heads, but 4 values in 4 heads; each key needs its value"),
        (lambda q, k, v: (q, k, v[:, :, :2]), "5 keys in 4 heads, but 5 values in 2 heads; each key needs its value"),
        (lambda q, k, v: (q, k[..., :6], v), "queries of 8 numbers do not meet keys of 6"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        unchecked(*change(*arrays()))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="no implementation 'flash': dense, .*; blockwise has all options and runs every"
    ):
        unchecked(*arrays(), implementation="flash")


@IMPLEMENTATIONS
def test_packed_is_separate(implementation):
    """Two sequences in one row against each in a row of its own."""
    q, k, v = arrays(batch=1, length=9, keys=9)
    segments = jnp.array([[0] * 4 + [1] * 5])
    options = {"causal": True, "implementation": implementation}
    packed = attention(q, k, v, q_segments=segments, kv_segments=segments, **options)
    apart = [attention(q[:, part], k[:, part], v[:, part], **options) for part in (slice(0, 4), slice(4, 9))]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), rtol=1e-5, atol=1e-6)


@IMPLEMENTATIONS
def test_dropout_has_its_rate_and_leaves_the_mean(implementation):
    """Of equal logits and values of 1 each output is the kept share of 4,096 weights over 0.7: 1 +- 0.0102."""
    x = jnp.zeros((2, 64, 4, 8))
    ones = jnp.ones((2, 64, 4, 8))
    outs = [
        attention(x, x, ones, dropout=0.3, dropout_key=jax.random.key(seed), implementation=implementation)
        for seed in range(2)
    ]
    weights = np.stack([out[..., 0] for out in outs]) * 0.7 * 64  # numbers of kept ones
    np.testing.assert_allclose(weights, np.round(weights), atol=1e-3)
    assert abs(weights.mean() / 64 - 0.7) < 5 * (0.7 * 0.3 / weights.size / 64) ** 0.5
    assert abs(weights.var() / (64 * 0.7 * 0.3) - 1) < 0.25, "each is drawn on its own"
    assert (weights[0] != weights[1]).any()
