"""Each member of the family in both forms against its definition, step by step in NumPy; and its laws."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention import attention
from jaxarch.attention.linear import (
    LinearState,
    delta_rule,
    elu_features,
    favor_features,
    favor_projection,
    gated_linear_attention,
    linear_attention,
    retention,
)
from jaxarch.attention.recurrence import check

CHUNK = 4
PROJECTION = np.random.default_rng(7).normal(size=(5, 4))  # of FAVOR+, for a dim of 4


def favor(q, k, v, **options):
    projection = jnp.asarray(PROJECTION, jnp.promote_types(q.dtype, jnp.float32))
    return linear_attention(q, k, v, features=favor_features(projection), **options)


# Function, names of its inputs beside q, k, v, and gates a head (None: one a channel).
MEMBERS = {
    "linear": (linear_attention, [], 0),
    "favor": (favor, [], 0),
    "gate": (gated_linear_attention, ["log_decay"], 1),
    "gates": (gated_linear_attention, ["log_decay"], None),
    "retention": (retention, [], 0),
    "delta": (delta_rule, ["beta"], 0),
    "delta, gate": (delta_rule, ["beta", "log_decay"], 1),
    "delta, gates": (delta_rule, ["beta", "log_decay"], None),
}
EACH = pytest.mark.parametrize("name", MEMBERS)


@cache
def forward(name, form):
    """Compiled once for every shape: of inputs by name and a state."""
    function = MEMBERS[name][0]
    return jax.jit(lambda case, state=None: function(**case, state=state, form=form, chunk=CHUNK))


def inputs(name, length, batch=2, kv_heads=2, group=2, dim=4, width=3):
    """In float64, keys of length 1."""
    _, extra, gates = MEMBERS[name]
    rng = np.random.default_rng(length)
    q, k = (rng.normal(size=(batch, length, heads, dim)) for heads in (kv_heads * group, kv_heads))
    arrays = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True)}
    arrays["v"] = rng.normal(size=(batch, length, kv_heads, width))
    if "beta" in extra:
        arrays["beta"] = rng.uniform(0, 1.5, size=(batch, length, kv_heads))
    if "log_decay" in extra:
        arrays["log_decay"] = -rng.exponential(size=(batch, length, kv_heads, dim if gates is None else gates))
    return arrays


def mapped(name, x):
    """The features, in NumPy."""
    if name == "linear":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    x = x / x.shape[-1] ** 0.25
    return np.exp(x @ PROJECTION.T - (x * x).sum(-1, keepdims=True) / 2) / len(PROJECTION) ** 0.5


def definition(name, q, k, v, beta=None, log_decay=None):
    """Out, and the state after the last step; of the linear ones the sums and the sums of the weights."""
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    scale = dim**-0.5
    if name in ("linear", "favor"):
        q, k, scale = mapped(name, q), mapped(name, k), 1
    if name == "retention":
        log_decay = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(kv_heads)))[:, None], (*k.shape[:3], 1))
    out, states = np.zeros((batch, length, heads, v.shape[-1])), np.zeros((batch, kv_heads, k.shape[-1], v.shape[-1]))
    sums = np.zeros((batch, kv_heads, k.shape[-1]))
    for b, h in np.ndindex(batch, heads):
        own = h // (heads // kv_heads)
        state, total = np.zeros((k.shape[-1], v.shape[-1])), np.zeros(k.shape[-1])
        for t in range(length):
            key, value = k[b, t, own], v[b, t, own]
            if log_decay is not None:
                state = np.exp(log_decay[b, t, own])[:, None] * state
            if beta is not None:
                state = state - beta[b, t, own] * np.outer(key, key @ state)
                value = beta[b, t, own] * value
            state = state + np.outer(key, value)
            total = total + key
            out[b, t, h] = scale * q[b, t, h] @ state
            if name in ("linear", "favor"):
                out[b, t, h] /= q[b, t, h] @ total
        states[b, own], sums[b, own] = state, total
    return out, (states, sums)


def unscaled(state):
    """The sums of a state of linear attention; another state as it is."""
    if not isinstance(state, LinearState):
        return (state,)
    factor = 1 if state.top is None else jnp.exp(state.top)[..., None]
    return state.values * jnp.expand_dims(factor, -1), state.keys * factor


def close(actual, expected, tolerance):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


# Length and shape beside one prime length: the chunks are cut in one place, for all members.
OTHERS = {
    "linear": (3, {"kv_heads": 1, "group": 3}),
    "favor": (1, {"group": 1, "width": 5}),
    "gate": (4, {"batch": 1, "kv_heads": 3, "group": 1}),
    "gates": (5, {"dim": 3, "width": 1}),
    "retention": (1, {"dim": 1}),
    "delta": (5, {"kv_heads": 1, "width": 5}),
    "delta, gate": (1, {"dim": 5}),
    "delta, gates": (3, {"group": 1}),
}


@EACH
def test_equals_the_definition(name):
    length, shape = OTHERS[name]
    for form, case in (
        ("chunked", inputs(name, 13)),
        ("chunked", inputs(name, length, **shape)),
        ("recurrent", inputs(name, length, **shape)),
    ):
        expected, states = definition(name, **case)
        with jax.enable_x64(True):
            out, state = forward(name, form)(case)
            np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
            close(unscaled(state), states[: len(unscaled(state))], 1e-10)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ("retention", "delta")])
def test_gradients_equal_differences_of_the_definition(name):
    """Along a random direction of each input; the forms agree in all of them."""
    function, rng = MEMBERS[name][0], np.random.default_rng(0)
    case = inputs(name, 7)
    cotangent = rng.normal(size=(2, 7, 4, 3))

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradients(case, form):
        out, state = function(**case, form=form, chunk=CHUNK)
        return (out * cotangent).sum() + sum(jnp.square(x).sum() for x in unscaled(state))

    def energy(case):
        out, states = definition(name, **case)
        states = states if name in ("linear", "favor") else states[:1]
        return (out * cotangent).sum() + sum(np.square(x).sum() for x in states)

    with jax.enable_x64(True):
        chunked, recurrent = (jax.tree.map(np.asarray, gradients(case, form)) for form in ("chunked", "recurrent"))
    close(chunked, recurrent, 1e-9)
    for key, x in case.items():
        direction, step = rng.normal(size=x.shape), 1e-5
        difference = energy(case | {key: x + step * direction}) - energy(case | {key: x - step * direction})
        np.testing.assert_allclose((chunked[key] * direction).sum(), difference / (2 * step), rtol=1e-6, atol=1e-7)


@EACH
def test_the_future_is_not_seen(name):
    case = inputs(name, 13)
    changed = {key: np.concatenate([x[:, :6], x[:, :5:-1]], axis=1) for key, x in case.items()}
    with jax.enable_x64(True):
        out, other = forward(name, "chunked")(case)[0], forward(name, "chunked")(changed)[0]
    np.testing.assert_array_equal(out[:, :6], other[:, :6])
    assert (out[:, 6] != other[:, 6]).any()


SOME = pytest.mark.parametrize("name", ["linear", "favor", "gates", "delta, gate"])


@SOME
def test_the_state_goes_on(name):
    """Two parts, or a prompt and then token by token, are the whole."""
    case = inputs(name, 13)
    part = lambda start, end: {key: x[:, start:end] for key, x in case.items()}  # noqa: E731
    with jax.enable_x64(True):
        run = forward(name, "chunked")
        whole, (first, state) = run(case), run(part(0, 5))
        second, end = run(part(5, 13), state)
        close((np.concatenate([first, second], axis=1), end), whole, 1e-12)
        steps = [first]
        for t in range(5, 13):
            out, state = run(part(t, t + 1), state)
            steps.append(out)
        close((np.concatenate(steps, axis=1), state), whole, 1e-12)


@pytest.mark.parametrize("name", ["favor", "delta, gate"])
def test_bfloat16_has_its_state_in_float32(name):
    """As if its inputs were float32 of the same value, up to the rounding of the output."""
    case = {key: jnp.asarray(x, jnp.bfloat16) for key, x in inputs(name, 5).items()}
    out, state = forward(name, "chunked")(case)
    assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    wide_out, wide_state = forward(name, "chunked")({key: x.astype(jnp.float32) for key, x in case.items()})
    close(state, wide_state, 1e-6)
    np.testing.assert_allclose(out.astype(jnp.float32), wide_out, rtol=2**-8)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(forward(name, "chunked")(case, state)[1]))


# Decays in a step, of which great and small ones mix: the small ones must count exactly after a great one.
rng = np.random.default_rng(3)
DECAYS = {
    "-50": np.full((1, 19, 1, 4), -50.0),
    "-1e4": np.full((1, 19, 1, 4), -1e4),
    "some -1e4": np.where(rng.random((1, 19, 1, 4)) < 0.1, -1e4, -0.01 * rng.random((1, 19, 1, 4))),
    "some -inf": np.where(rng.random((1, 19, 1, 4)) < 0.1, -np.inf, -0.01 * rng.random((1, 19, 1, 4))),
    "some 0": np.where(rng.random((1, 19, 1, 4)) < 0.1, 0, -30 * rng.random((1, 19, 1, 4))),
}


@pytest.mark.parametrize("name", ["gate", "delta, gates"])
def test_strong_decay_is_exact(name):
    """In float32, over more than one chunk, against the recurrence in float64: outputs and gradients."""
    function, _, gates = MEMBERS[name]
    case = inputs(name, 19, batch=1, kv_heads=1, group=1)

    @partial(jax.jit, static_argnums=(1, 2))
    def results(case, form, dtype):
        def energy(case):
            out = function(**case, form=form, chunk=8)[0]
            return jnp.square(out).sum(), out

        return jax.grad(energy, has_aux=True)({key: jnp.asarray(x, dtype) for key, x in case.items()})

    for decays in DECAYS.values():
        case["log_decay"] = decays[..., :gates]
        own = results(case, "chunked", jnp.float32)
        with jax.enable_x64(True):
            expected = results(case, "recurrent", jnp.float64)
        for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("name", ["linear", "gates", "delta, gate"])
def test_ten_thousand_steps_in_float32(name):
    """Around the recurrence in float64, in parts of the greatest output: 3e-6 in chunks, 2e-5 or 2e-4 step by step.

    The float32 nearest to exp(-1e-4) is off by 1e-8, which 10,000 steps multiply, and chunks do not.
    """
    function, case = MEMBERS[name][0], inputs(name, 10_007, batch=1, kv_heads=1, group=1)
    if "log_decay" in case:
        case["log_decay"] = np.full_like(case["log_decay"], -1e-4)
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(partial(function, form="recurrent"))(**case)[0])
    case = {key: jnp.asarray(x, jnp.float32) for key, x in case.items()}
    for form, tolerance in (("chunked", 3e-6), ("recurrent", 2e-4 if "log_decay" in case else 2e-5)):
        out = jax.jit(partial(function, form=form, chunk=16))(**case)[0]
        np.testing.assert_allclose(out, exact, rtol=0, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("name", ["linear", "delta, gates"])
def test_memory_is_linear_in_the_length(name):
    """No array of length x length, forward or backward, and temporaries that double with it.

    They are a few times the inputs, since what a chunk needs is made again in the backward pass.
    """
    function = MEMBERS[name][0]

    def compiled(length):
        case = {key: jnp.asarray(x, jnp.float32) for key, x in inputs(name, length, dim=8, width=8).items()}
        return jax.jit(jax.grad(lambda case: function(**case, chunk=2)[0].sum())).lower(case).compile()

    one, two = compiled(512), compiled(1024)
    assert "1024,1024" not in two.as_text()
    one, two = one.memory_analysis(), two.memory_analysis()
    assert two.temp_size_in_bytes <= 2.1 * one.temp_size_in_bytes
    assert two.temp_size_in_bytes <= 5 * two.argument_size_in_bytes


def test_composes_with_vmap():
    """At sizes of use, of which XLA:CPU dies where a product has an axis for each halving of a chunk."""
    case = {key: jnp.asarray(x, jnp.float32) for key, x in inputs("delta, gates", 40, dim=64, group=1).items()}
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case)
    gradient = jax.grad(lambda case: jnp.square(delta_rule(**case)[0]).sum())
    gradients = jax.jit(jax.vmap(gradient))(stacked)
    first, last = (jax.tree.map(lambda x, at=at: x[at], gradients) for at in (0, 1))
    close(first, jax.tree.map(lambda x: x[::-1], last), 1e-4)


# Laws by hand


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_retention_by_hand(form):
    """Ones in, values 1, 2, 3, a decay of 1/2: 1, 1/2 + 2, 1/4 + 1 + 3."""
    ones, v = jnp.ones((1, 3, 1, 1)), jnp.array([1.0, 2, 3]).reshape(1, 3, 1, 1)
    out, state = retention(ones, ones, v, gamma=jnp.array([0.5]), form=form)
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 2.5, 4.25], rtol=1e-6)
    np.testing.assert_allclose(state, [[[[4.25]]]], rtol=1e-6)
    out, _ = retention(ones, ones, v, gamma=jnp.array([0.5]), scale=2.0, form=form)
    np.testing.assert_allclose(out[0, :, 0, 0], [2, 5, 8.5], rtol=1e-6)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_the_state_before_has_its_gradient_by_hand(form):
    """It decays by 1/2 a step, and queries (2, 3) and (4, 8) read it: (2, 3) / 2 + (4, 8) / 4."""
    q, k, v = jnp.array([[2.0, 3], [4, 8]])[None, :, None], jnp.ones((1, 2, 1, 2)), jnp.ones((1, 2, 1, 1))
    log_decay = jnp.full((1, 2, 1, 1), jnp.log(0.5))

    @jax.jit
    @jax.grad
    def gradient(state):
        return gated_linear_attention(q, k, v, log_decay, scale=1.0, state=state, form=form)[0].sum()

    np.testing.assert_allclose(gradient(jnp.ones((1, 1, 2, 1)))[0, 0], [[2.0], [3.5]], rtol=1e-6)


def test_the_delta_rule_replaces_what_it_wrote():
    """A unit key written twice with beta = 1 holds the second value, an orthogonal one its own; with 1/2 the mean."""
    k = jnp.array([[1.0, 0], [0, 1], [1, 0], [1, 0]])[None, :, None]
    v = jnp.array([[5.0], [7], [3], [1]])[None, :, None]
    beta = jnp.array([1.0, 1, 1, 0.5])[None, :, None]
    _, state = delta_rule(k, k, v, beta)
    np.testing.assert_allclose(state[0, 0], [[2.0], [7]], rtol=1e-6)
    out, _ = delta_rule(k, k, v, beta, scale=1.0)
    np.testing.assert_allclose(out[0, :, 0, 0], [5, 7, 3, 2], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [-1e4, -80.0])  # whose features are 0, or whose square would be
def test_a_query_without_weight_gives_zeros_and_finite_gradients(causal, size):
    q = jnp.ones((1, 3, 1, 2)).at[:, 1].set(size)
    k = v = jnp.ones((1, 3, 1, 2))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def grads(q, k, v):
        out, _ = linear_attention(q, k, v, causal=causal)
        return jnp.square(out).sum(), out

    (_, out), grads = grads(q, k, v)
    assert not out[:, 1].any() and out[:, ::2].all()
    assert all(jnp.isfinite(grad).all() for grad in grads) and not grads[0][:, 1].any()


@pytest.mark.parametrize("name", ["linear", "favor"])
def test_without_the_mask_every_key_counts(name):
    """Of another number of keys than of queries, and those of the state too."""
    q, case = inputs(name, 3)["q"], inputs(name, 5)
    weights = np.einsum("btkgf,bskf->bkgts", mapped(name, q).reshape(2, 3, 2, 2, -1), mapped(name, case["k"]))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bkgts,bskw->btkgw", weights, case["v"]).reshape(2, 3, 4, 3)
    with jax.enable_x64(True):
        run = jax.jit(partial(MEMBERS[name][0], causal=False))
        np.testing.assert_allclose(run(q, case["k"], case["v"])[0], expected, rtol=1e-10)
        _, state = run(q, case["k"][:, :2], case["v"][:, :2])
        np.testing.assert_allclose(run(q, case["k"][:, 2:], case["v"][:, 2:], state=state)[0], expected, rtol=1e-10)


def test_small_features_keep_their_digits():
    np.testing.assert_allclose(elu_features(jnp.array([-30.0, 0.0, 2.0]))[0], [np.exp(-30), 1, 3], rtol=1e-6)


# FAVOR+


def estimates(projection, q, k):
    """Of exp(q k^T / sqrt(dim)), in NumPy's place: the features with their log scales undone."""
    features = favor_features(projection)
    (q, q_scale), (k, k_scale) = features(q), features(k)
    return (q * jnp.exp(q_scale)[:, None]) @ (k * jnp.exp(k_scale)[:, None]).T


def iid_projection(key, dim, features):
    return jax.random.normal(key, (features, dim))


def kernel_estimates(projection, seeds=4000, dim=8, features=8):
    q, k = (jnp.asarray(np.random.default_rng(seed).normal(size=(3, dim))) for seed in (0, 1))
    keys = jax.random.split(jax.random.key(0), seeds)
    drawn = jax.jit(jax.vmap(lambda key: estimates(projection(key, dim, features), q, k)))(keys)
    return np.asarray(drawn), np.exp(np.asarray(q, np.float64) @ np.asarray(k, np.float64).T / dim**0.5)


def test_favor_is_unbiased_and_orthogonal_directions_err_less():
    orthogonal, exact = kernel_estimates(favor_projection)
    iid, _ = kernel_estimates(iid_projection)
    for drawn in (orthogonal, iid):
        errors = (drawn.mean(axis=0) - exact) / (drawn.std(axis=0) / len(drawn) ** 0.5)
        assert np.abs(errors).max() < 4, errors
    ratio = np.square(orthogonal - exact).mean(axis=0) / np.square(iid - exact).mean(axis=0)
    assert ratio.mean() < 0.9, ratio


def test_projections_are_orthogonal_in_blocks_and_as_long_as_normal_ones():
    """Squared lengths are chi-squared: a mean of dim and a variance of 2 dim, at 4 standard errors."""
    w = np.asarray(favor_projection(jax.random.key(0), 8, 8 * 200 + 3), np.float64)
    assert w.shape == (1603, 8)
    blocks = w[:1600].reshape(200, 8, 8)
    products = blocks @ blocks.transpose(0, 2, 1)
    assert np.abs(products - products * np.eye(8)).max() < 1e-4
    squares = np.square(w).sum(axis=1)
    assert abs(squares.mean() - 8) < 4 * (16 / 1603) ** 0.5 and abs(squares.var() / 16 - 1) < 0.25


@pytest.mark.parametrize("causal", [True, False])
def test_favor_converges_to_softmax_attention(causal):
    """The error falls with the root of the number of features, by 2 from one to the next."""
    q, k, v = (jnp.asarray(np.random.default_rng(seed).normal(size=(1, 8, 1, 4)), jnp.float32) for seed in range(3))
    exact = attention(q, k, v, causal=causal, scale=0.125, implementation="dense")
    projections = jax.vmap(lambda key: favor_projection(key, 4, 4096))(jax.random.split(jax.random.key(0), 40))

    @jax.jit
    @jax.vmap
    def errors(projection):
        features = favor_features(projection, scale=0.125)
        return jnp.square(
            linear_attention(q, k, v, features=features, causal=causal, form="recurrent")[0] - exact
        ).mean()

    means = np.array([errors(projections[:, :count]).mean() ** 0.5 for count in (256, 1024, 4096)])
    assert means[-1] < 0.02 and np.all(np.abs(np.log2(means[:-1] / means[1:]) - 1) < 0.3), means


@pytest.mark.parametrize("causal", [True, False])
def test_favor_neither_overflows_nor_vanishes(causal):
    """Wide heads, and keys whose features are exp(+-100) times one another's, against logarithms in float64."""
    dim, count, length = 192, 64, 12
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(length, size)) for size in (dim, dim, 2))
    w = np.asarray(favor_projection(jax.random.key(1), dim, count), np.float64)

    def logs(x):
        return x @ w.T / dim**0.25 - np.square(x).sum(axis=-1, keepdims=True) / dim**0.5 / 2

    @partial(jax.jit, static_argnums=3)
    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(q, k, v, form):
        options = {"causal": causal, "form": form, "chunk": CHUNK}
        features = favor_features(jnp.asarray(w, jnp.float32))
        out = linear_attention(*(x[None, :, None] for x in (q, k, v)), features=features, **options)[0][0, :, 0]
        return jnp.square(out).sum(), out

    for sizes in (np.ones(length), 4.0 ** np.linspace(1, -1, length), 4.0 ** np.linspace(-1, 1, length)):
        keys = k * sizes[:, None]
        logits = np.logaddexp.reduce(logs(q)[:, None] + logs(keys)[None], axis=-1)
        logits = np.where(np.tri(length, dtype=bool) | (not causal), logits, -np.inf)
        expected = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)) @ v
        for form in ("chunked", "recurrent"):
            grads, out = run(*(jnp.asarray(x, jnp.float32) for x in (q, keys, v)), form)
            np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
            assert all(jnp.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"kv_heads": 3, "group": 1}, {}, "3 heads of keys do not divide 4"),
        ({}, {"chunk": 0}, "chunk of 0 steps is not a power of two"),
        ({}, {"chunk": 48}, "chunk of 48 steps is not a power of two"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "retention", "delta"])
def test_options_that_cannot_be_are_refused(name, change, options, message):
    case = inputs(name, 5) | {key: x for key, x in inputs(name, 5, **change).items() if key != "q"}
    with pytest.raises(ValueError, match=message):
        MEMBERS[name][0](**jax.tree.map(jnp.asarray, case), **options)


def shapes(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 3), log_decay=None, beta=None):
    return [None if shape is None else jnp.ones(shape) for shape in (q, k, v, log_decay, beta)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (1, 5, 4, 8)}, "q, k and v are batches of 1, 2 and 2; give them one size"),
        ({"v": (3, 5, 2, 3)}, "q, k and v are batches of 2, 2 and 3; give them one size"),
        ({"v": (2, 6, 2, 3)}, "5 keys in 2 heads, but 6 values in 2 heads; each key needs its value"),
        ({"v": (2, 5, 1, 3)}, "5 keys in 2 heads, but 5 values in 1 heads; each key needs its value"),
        ({"q": (2, 6, 4, 8)}, "6 queries and 5 keys: causal linear attention needs as many of both"),
        ({"q": (2, 5, 4, 1)}, "queries of 1 numbers do not meet keys of 8"),
        ({"q": (2, 5, 3, 8)}, "2 heads of keys do not divide 3 heads of queries"),
        ({"beta": (2, 5, 4)}, r"beta is of shape \(2, 5, 4\), not \(2, 5, 2\)"),
        ({"beta": (2, 5, 2, 1)}, r"beta is of shape \(2, 5, 2, 1\), not \(2, 5, 2\)"),
        ({"log_decay": (2, 5, 2, 3)}, r"log_decay is of shape \(2, 5, 2, 3\), not \(2, 5, 2, 1\) or \(2, 5, 2, 8\)"),
        ({"log_decay": (2, 6, 2, 1)}, r"log_decay is of shape \(2, 6, 2, 1\), not \(2, 5, 2, 1\) or \(2, 5, 2, 8\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    """Of the check itself, before which annotations of shapes would fail here, and in use are not looked at."""
    with pytest.raises(ValueError, match=message):
        check(*shapes(**change), True, "chunked", 64)


def test_arrays_that_fit_are_taken():
    for change in ({"log_decay": (2, 5, 2, 1)}, {"log_decay": (2, 5, 2, 8), "beta": (2, 5, 2)}):
        check(*shapes(**change), True, "chunked", 64)
    check(*shapes(q=(2, 3, 2, 8)), False, "chunked", 64)  # without the mask there may be fewer queries


def test_what_is_unknown_or_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="form 'parallel' is unknown; chunked and recurrent are"):
        check(*shapes(), True, "parallel", 64)
    case = jax.tree.map(jnp.asarray, inputs("delta, gates", 5))
    with pytest.raises(ValueError, match=r"log_decay is of shape \(2, 5, 2, 3\), not \(2, 5, 2, 1\)"):
        delta_rule(**case | {"log_decay": case["log_decay"][..., :3]})
    case = jax.tree.map(jnp.asarray, inputs("linear", 5))
    with pytest.raises(ValueError, match="3 queries and 5 keys: causal linear attention needs as many of both"):
        linear_attention(case["q"][:, :3], case["k"], case["v"])
    state = LinearState(jnp.zeros((2, 2, 5, 3)), jnp.zeros((2, 2, 5)), None)
    with pytest.raises(ValueError, match=r"the state is \(2, 2, 5, 4\), not \(2, 2, 4, 4\)"):
        linear_attention(**case, state=state)
