"""The TPU's kernel, interpreted on any platform, against the dense reference; and lowered for the TPU itself."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention import attention
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options
from jaxarch.attention.splash import splash_attention
from tests.attention.test_dense import arrays, definition

# Numbers of packed sequences, negative ones too. In the first row the queries of 7 see nothing.
SEGMENTS = jnp.array([[-1] * 5 + [7] * 4 + [2] * 4, [3] * 2 + [4] * 11]), jnp.array([[-1] * 6 + [2] * 7, [4] * 13])
SINKS = jnp.array([0.3, -1.0])
CASES = {
    "causal, several blocks": ({"batch": 1, "length": 257, "keys": 257}, Mask(causal=True), {}),
    "grouped, a window behind, more keys than a block": (
        {"batch": 1, "length": 13, "keys": 131, "kv_heads": 1, "width": 3},
        Mask(causal=True, window=4),
        {},
    ),
    "a window around, no key in that of the last block": (
        {"batch": 1, "length": 257, "keys": 101},
        Mask(window=7),
        {},
    ),
    "causal, fewer keys, wider values": ({"length": 13, "keys": 5, "width": 11}, Mask(causal=True), {}),
    "packed and capped, some see nothing": (
        {"length": 13, "keys": 13, "kv_heads": 1},
        Mask(False, None, 0, *SEGMENTS),
        {"soft_cap": 2.0},
    ),
    "ranges, a row without keys": (
        {"length": 7, "keys": 11},
        Mask(kv_start=jnp.array([3, 0]), kv_length=jnp.array([9, 0])),
        {"sinks": SINKS},
    ),
}


def results(function, inputs, options):
    """Output and all gradients."""

    def energy(q, k, v, sinks):
        out = function(q, k, v, options._replace(sinks=sinks))
        out = out[0] if isinstance(out, tuple) else out
        factors = np.random.default_rng(1).normal(size=out.shape)
        return (out * jnp.asarray(factors, out.dtype)).astype(jnp.float32).sum(), out

    return jax.jit(jax.grad(energy, argnums=(0, 1, 2, 3), has_aux=True))(*inputs, options.sinks)


@pytest.mark.parametrize("name", CASES)
def test_splash_is_dense(name):
    shapes, mask, others = CASES[name]
    inputs = arrays(**{"heads": 2, "kv_heads": 2, **shapes})
    options = Options(mask, 0.7, **others)
    own = results(partial(splash_attention, interpret=True), inputs, options)
    expected = results(dense_attention, inputs, options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), own, expected)


@pytest.mark.parametrize("scale", [0.25, 0.7])
def test_the_scale_costs_bfloat16_no_digits(scale):
    """Off by no more than the output's own rounding, where a scaled q in bfloat16 puts weights off by per cents."""
    q, k, v = arrays(batch=1, length=64, keys=64, heads=2, kv_heads=2, dim=64, dtype=jnp.bfloat16)
    q = q * 4
    out = jax.jit(partial(splash_attention, options=Options(Mask(), scale), interpret=True))(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), definition(q, k, v, scale=scale)[0], 2**-7.9, 1e-4)


@pytest.mark.parametrize("dtype, dims", [("float32", (128, 128)), ("bfloat16", (64, 64)), ("bfloat16", (40, 5))])
def test_it_lowers_for_the_tpu(dtype, dims):
    """Three kernels, forward and backward, also over replicas; whether they compile there is not seen here."""
    q, k, v = arrays(1, 300, 700, 4, 2, *dims, dtype=dtype)
    segments = jnp.zeros((1, 300), jnp.int32), jnp.zeros((1, 700), jnp.int32)
    options = Options(Mask(True, 200, 0, *segments), 0.125, soft_cap=5.0, sinks=jnp.zeros(4))

    def gradients(q, k, v):
        return jax.grad(lambda *x: splash_attention(*x, options).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    for function, inputs in ((gradients, (q, k, v)), (jax.vmap(gradients), [jnp.stack([x] * 3) for x in (q, k, v)])):
        text = jax.jit(function).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 3


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="here it runs")
def test_elsewhere_it_is_refused():
    x = jnp.ones((1, 128, 2, 8))
    with pytest.raises(ValueError, match="splash runs on TPUs; here is .*; blockwise has all options and runs every"):
        attention(x, x, x, causal=True, implementation="splash")
