from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run import backend
from jaxarch.transformer.layers import (
    Dense,
    Embedding,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    RMSNorm,
    dense,
    exact_gelu,
    gelu,
    squared_relu,
    transposed_kernels,
)

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, size=(2, 3, 6))


def drawn(module, *inputs):
    """The module's output and parameters, each of which is random, so that none is lost in a 0 or a 1."""
    params = module.init(jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), params)
    return module.apply({"params": params}, *inputs), jax.tree.map(np.float64, params)


def test_dense():
    y, params = drawn(Dense(4, use_bias=True), jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, X @ params["kernel"] + params["bias"], rtol=1e-5, atol=1e-5)


def test_gradients_of_dense():
    """d sum(y * g): for x it is g W^T, for W the sum over all tokens of x^T g, for b the sum of g."""
    w, b, g = RNG.normal(size=(6, 4)), RNG.normal(size=4), RNG.normal(size=(2, 3, 4))
    args = [jnp.asarray(a, jnp.float32) for a in (X, w, b)]
    dx, dw, db = jax.grad(lambda *args: (dense(*args) * g).sum(), argnums=(0, 1, 2))(*args)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, sum(np.outer(x, e) for x, e in zip(X.reshape(6, 6), g.reshape(6, 4))), rtol=1e-4)
    np.testing.assert_allclose(db, g.sum((0, 1)), rtol=1e-5, atol=1e-5)


def layer_norm(x, params, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * params["scale"] + params.get("bias", 0.0)


def rms_norm(x, params, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * params["scale"]


def zero_centered_rms_norm(x, params, eps):
    return rms_norm(x, {"scale": 1 + np.float64(params["scale"])}, eps)


NORMS = {
    "layer": (LayerNorm(), layer_norm, 1e-5),
    "layer with bias": (LayerNorm(use_bias=True, eps=0.3), layer_norm, 0.3),
    "rms": (RMSNorm(eps=0.3), rms_norm, 0.3),
    "zero-centered rms": (RMSNorm(zero_centered=True, eps=0.3), zero_centered_rms_norm, 0.3),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    module, definition, eps = NORMS[name]
    y, params = drawn(module, jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(y, definition(X, params, eps), rtol=1e-5, atol=1e-5)


def test_a_zero_centered_scale_begins_at_0_and_keeps_small_numbers_in_bfloat16():
    x = jnp.asarray(X, jnp.float32)
    start = RMSNorm(zero_centered=True).init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(start["scale"], np.zeros(6))
    np.testing.assert_array_equal(RMSNorm(zero_centered=True).apply({"params": start}, x), RMSNorm().apply(ONES, x))
    small = {"params": {"scale": jnp.full(6, 2.0**-10, jnp.bfloat16)}}  # with 1 it is 1 in bfloat16
    expected = (1 + 2.0**-10) * RMSNorm().apply(ONES, x)
    np.testing.assert_allclose(RMSNorm(zero_centered=True).apply(small, x), expected, rtol=1e-6)


ONES = {"params": {"scale": np.ones(6, np.float32)}}


@pytest.mark.parametrize("module", [LayerNorm(), RMSNorm(), RMSNorm(zero_centered=True)])
def test_norms_of_bfloat16_are_in_float32(module):
    """256 features of 100 +- 1: their mean, their variance and even their sum are lost in bfloat16."""
    x = jnp.asarray(RNG.normal(100, 1, size=(4, 256)), jnp.bfloat16)
    params = module.init(jax.random.key(0), x)
    assert jax.tree.leaves(params)[0].dtype == jnp.float32
    y, wide = module.apply(params, x), module.apply(params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    from scipy.special import erf

    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


PLAIN = {
    "gelu": (FeedForward(5, use_bias=True), gelu_tanh),
    "exact gelu": (FeedForward(5, exact_gelu, use_bias=True), gelu_exact),
    "relu2": (FeedForward(5, squared_relu, use_bias=True), lambda x: np.maximum(x, 0) ** 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_feed_forward(name):
    module, activation = PLAIN[name]
    y, params = drawn(module, jnp.asarray(X, jnp.float32))
    up, down = params["up"], params["down"]
    expected = activation(X @ up["kernel"] + up["bias"]) @ down["kernel"] + down["bias"]
    # float32 is good for 1e-6 of the largest, and the two forms of GELU differ by 1e-3.
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-5)


def test_swiglu():
    y, params = drawn(GatedFeedForward(5), jnp.asarray(X, jnp.float32))
    gate = X @ params["gate"]["kernel"]
    expected = (gate / (1 + np.exp(-gate)) * (X @ params["up"]["kernel"])) @ params["down"]["kernel"]
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-5)


def test_embedding_looks_up_and_reads_out():
    module = Embedding(7, 6, jnp.bfloat16)
    rows, params = drawn(module, jnp.array([[3, 0, 3]]))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, jnp.asarray(params["embedding"][[[3, 0, 3]]], jnp.bfloat16))
    table = jax.tree.map(jnp.float32, params)
    products = module.apply({"params": table}, jnp.asarray(X, jnp.float32), method="attend")
    np.testing.assert_allclose(products, X @ params["embedding"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slow", [False, True])
def test_one_row_is_read_out_as_many_are(slow, monkeypatch):
    """Where the product of one row is slow, it is a sum; where it converts, it is of another form."""
    monkeypatch.setattr(backend, "slow_transposed", lambda: slow)
    monkeypatch.setattr(backend, "converts_in_products", lambda: not slow)
    table, x = RNG.normal(size=(5, 6)), X[:1, :1]
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
        module, variables = Embedding(5, 6, dtype), {"params": {"embedding": jnp.asarray(table, jnp.float32)}}
        products = module.apply(variables, jnp.asarray(x, dtype), method="attend")
        assert products.dtype == dtype
        np.testing.assert_allclose(np.float64(products), x @ table.T, rtol=tolerance, atol=3 * tolerance)


def test_a_transposed_kernel_is_the_same_layer():
    """Also in a tree of layers, whose other parameters stay."""
    x = jnp.asarray(X[:1, :1], jnp.float32)
    y, params = drawn(FeedForward(5, gelu, use_bias=True), x)
    given = transposed_kernels(jax.tree.map(jnp.float32, params), jnp.float32)
    assert {name: sorted(own) for name, own in given.items()} == {key: ["bias", "transposed"] for key in ("up", "down")}
    np.testing.assert_allclose(FeedForward(5, gelu, use_bias=True).apply({"params": given}, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function, approximate", [(gelu, True), (exact_gelu, False)])
def test_gelu_has_its_derivatives(function, approximate):
    """Value, first and second derivative against autodiff of the formula, in float64."""
    plain = partial(jax.nn.gelu, approximate=approximate)
    with jax.enable_x64(True):
        x = jnp.linspace(-6, 6, 101)
        for own, expected in [(function, plain), (jax.grad(function), jax.grad(plain))]:
            np.testing.assert_allclose(jax.vmap(own)(x), jax.vmap(expected)(x), rtol=1e-12, atol=1e-12)
        second, expected = jax.grad(jax.grad(function)), jax.grad(jax.grad(plain))
        np.testing.assert_allclose(jax.vmap(second)(x), jax.vmap(expected)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [gelu, exact_gelu, squared_relu])
def test_gradients_in_bfloat16_are_those_in_float32(activation):
    """With the compiler's options of a run, which join products and what follows; rows enough for them to."""
    rng = np.random.default_rng(0)
    layer = FeedForward(512, activation, use_bias=True)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 768, 128)), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.1, jnp.float32), params)

    def gradients(dtype):
        def loss(params, x, cotangent):
            return jnp.sum(layer.apply({"params": params}, x.astype(dtype)).astype(jnp.float32) * cotangent)

        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x, cotangent)
        return traced.lower().compile(compiler_options=backend.compiler_options(str(traced.jaxpr)))(
            params, x, cotangent
        )

    def error(actual, expected):
        assert jnp.linalg.norm(actual - expected) < 0.02 * jnp.linalg.norm(expected)

    jax.tree.map(error, gradients(jnp.bfloat16), gradients(jnp.float32))
