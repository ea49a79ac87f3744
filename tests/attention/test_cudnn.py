"""cuDNN's attention against the dense reference: the same call of `jax.nn` on XLA anywhere, on cuDNN where it is."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention import _say, attention, chosen, unfit
from jaxarch.attention.choice import platform
from jaxarch.attention.cudnn import cudnn_attention
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.mask import Mask
from jaxarch.attention.options import Options
from tests.attention.test_dense import arrays

CUDA = platform() == "cuda"
INNER = [
    ("xla", "float32"),
    ("xla", "bfloat16"),
    pytest.param("cudnn", "bfloat16", marks=pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")),
]
LENGTHS = jnp.array([9, 0, 4])
CASES = {
    "all see all": ({"keys": 8}, Mask()),
    "causal, aligned at the first, more keys": ({"keys": 24, "kv_heads": 2}, Mask(causal=True)),
    "causal, aligned at the first, fewer keys": ({"keys": 8}, Mask(causal=True)),
    "window": ({"kv_heads": 1}, Mask(causal=True, window=5)),
    "its own position alone": ({"keys": 24}, Mask(causal=True, window=1)),
    "lengths, a row without keys": ({}, Mask(kv_length=LENGTHS)),
    "causal, lengths": ({"kv_heads": 2}, Mask(causal=True, kv_length=LENGTHS)),
}


def results(function, inputs, mask):
    """Output and all gradients, in float32."""

    def energy(q, k, v):
        out = function(q, k, v, Options(mask, 0.3))
        out = out[0] if isinstance(out, tuple) else out
        factors = np.random.default_rng(1).normal(size=out.shape)
        return (out * jnp.asarray(factors, out.dtype)).astype(jnp.float32).sum(), out

    own = jax.jit(jax.grad(energy, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return jax.tree.map(lambda x: x.astype(jnp.float32), own)


@pytest.mark.parametrize("inner, dtype", INNER)
@pytest.mark.parametrize("name", CASES)
def test_the_options_mean_the_same(name, inner, dtype):
    shapes, mask = CASES[name]
    inputs = arrays(**{"batch": 3, "length": 16, "keys": 16, **shapes}, dtype=dtype)
    own = results(partial(cudnn_attention, implementation=inner), inputs, mask)
    expected = results(dense_attention, [x.astype(jnp.float32) for x in inputs], mask)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.05}
    jax.tree.map(partial(np.testing.assert_allclose, **near), own, expected)


def test_no_row_without_keys_comes_before_it(monkeypatch):
    """What cuDNN makes of such a row is its own affair."""
    given = []

    def spy(q, k, v, **options):
        given.append(np.asarray(options["key_value_seq_lengths"]))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    cudnn_attention(*arrays(batch=3), Options(Mask(kv_length=jnp.array([2, 0, 9])), 1.0))
    np.testing.assert_array_equal(given, [[2, 1, 5]])


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_it_lowers_for_cuda(lengths, monkeypatch):
    """Forward and backward, also over replicas that share the lengths; whether they run is not seen here."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v = arrays(3, 16, 24, 4, 2, 64, 64, dtype=jnp.bfloat16)
    mask = Mask(causal=True, kv_length=lengths) if lengths is not None else Mask(causal=True, window=5)

    def gradients(q, k, v):
        def energy(q, k, v):
            return jnp.square(cudnn_attention(q, k, v, Options(mask, 0.25))).sum()

        return jax.grad(energy, argnums=(0, 1, 2))(q, k, v)

    for function, inputs in ((gradients, (q, k, v)), (jax.vmap(gradients), [jnp.stack([x] * 2) for x in (q, k, v)])):
        text = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
        assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
        assert f"mask_type\\22: \\22{'CAUSAL' if lengths is None else 'PADDING_CAUSAL'}\\22" in text
        assert f"sliding_window_length\\22: {5 if lengths is None else 0}" in text
        assert "fmha_scale\\22: 0.25" in text


@pytest.mark.skipif(CUDA, reason="here it runs")
def test_elsewhere_it_is_refused():
    x = jnp.ones((1, 16, 2, 8), jnp.bfloat16)
    message = "cudnn runs on NVIDIA GPUs, Ampere and later; here is .*; blockwise has all options and runs everywhere"
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, causal=True, implementation="cudnn")


@pytest.mark.parametrize(
    "length, keys, on, others, reason",
    [
        (64, 64, {"causal", "window"}, {}, None),
        (64, 96, {"causal", "kv_length"}, {"dims": (128, 128)}, None),
        (64, 64, {"bias", "q_offset"}, {}, "cudnn lacks bias, q_offset"),
        (64, 64, {"return_lse"}, {}, "cudnn lacks return_lse"),
        (64, 64, set(), {"dtype": jnp.float32}, "cudnn takes float16 and bfloat16, not float32"),
        (64, 64, set(), {"dims": (60, 60)}, "cudnn takes heads of 8, 16, ... 128, not of 60"),
        (64, 64, set(), {"dims": (256, 256)}, "cudnn takes heads of 8, 16, ... 128, not of 256"),
        (64, 64, set(), {"dims": (64, 32)}, "cudnn takes heads of 8, 16, ... 128, not of 64 and values of 32"),
        *[
            (
                length,
                64,
                on,
                {},
                "cudnn takes a window with causal, without kv_length, and for no more queries than keys",
            )
            for length, on in [
                (64, {"window"}),
                (64, {"window", "causal", "kv_length"}),
                (65, {"window", "causal"}),
            ]
        ],
        (64, 64, set(), {"here": "gpu"}, "cudnn runs on NVIDIA GPUs, Ampere and later; here is gpu"),
    ],
)
def test_what_it_cannot_do(length, keys, on, others, reason):
    assert unfit("cudnn", length, keys, on, **{"here": "cuda", "dtype": jnp.bfloat16, **others}) == reason


def test_auto_takes_the_fused_kernel_where_it_fits():
    half = {"dtype": jnp.bfloat16}
    assert chosen(256, 256, {"causal"}, here="cuda", **half) == "cudnn"
    assert chosen(256, 256, {"causal"}, here="cuda") == "blocks", "of float32"
    assert chosen(256, 256, {"causal"}, here="cuda", dims=(60, 60), **half) == "blocks"
    assert chosen(4096, 4096, {"causal", "bias"}, here="cuda", **half) == "blockwise"
    assert chosen(4096, 4096, {"window"}, 64, here="cuda", **half) == "window"
    assert chosen(256, 256, {"causal"}, here="tpu") == chosen(256, 256, {"window"}, 8, here="tpu", **half) == "splash"
    assert chosen(256, 256, set(), here="tpu", dtype=jnp.float16) == chosen(1, 256, set(), here="tpu") == "dense"
    assert chosen(256, 256, {"causal"}, here="gpu", **half) == "blocks", "another GPU"


@pytest.mark.parametrize(
    "capability, expected", [("9.0", "cuda"), ("8.0", "cuda"), ("12.0", "cuda"), ("7.5", "gpu"), ("gfx942", "gpu")]
)
def test_which_gpus_have_it(capability, expected, monkeypatch):
    class Device:
        platform, compute_capability = "gpu", capability

    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda name=None: [Device()] if name is None else cpu)
    assert platform() == expected
    for default in ("cpu", cpu[0]):
        with jax.default_device(default):
            assert platform() == "cpu"


@pytest.mark.skipif(CUDA, reason="a device that is not there is put before")
def test_auto_knows_the_heads_that_it_is_given(monkeypatch):
    monkeypatch.setattr("jaxarch.attention.choice.platform", lambda: "cuda")
    shape = jax.eval_shape(lambda x: attention(x, x, x), jnp.ones((1, 16, 2, 20), jnp.bfloat16))
    assert shape.shape == (1, 16, 2, 20), "not refused by cuDNN, which takes multiples of 8"


@pytest.mark.skipif(CUDA, reason="a device that is not there is put before")
def test_the_log_says_what_was_taken_and_why(caplog, monkeypatch):
    monkeypatch.setattr("jaxarch.attention.choice.platform", lambda: "cuda")
    _say.cache_clear()
    with caplog.at_level("INFO", "jaxarch.attention"):
        for dtype, options in [(jnp.float16, {"window": 3})] * 2 + [(jnp.float32, {"causal": True})]:
            jax.eval_shape(lambda x, options=options: attention(x, x, x, **options), jnp.ones((1, 16, 2, 24), dtype))
    reason = "cudnn takes a window with causal, without kv_length, and for no more queries than keys"
    assert caplog.messages == [
        f"attention with window: window ({reason})",
        "attention with causal: blocks (cudnn takes float16 and bfloat16, not float32)",
    ]
