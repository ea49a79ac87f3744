"""The encoder against its drawing in numpy, what it sees and does not see, and its heads."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run.operations import counted
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.encoder import Encoded, EncoderConfig, encoder, forward_flops

VOCAB, LENGTH, DIM, HEADS = 11, 8, 8, 2
CONFIG = EncoderConfig(2, HEADS, DIM, mlp_dim=12, types=3, eps=1e-3)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, (2, 6))
TYPES = RNG.integers(0, 3, (2, 6))
POST, PRE = CONFIG, dataclasses.replace(CONFIG, placement="pre", mlp="gelu_tanh")
ALL = {"post": POST, "pre": PRE} | {
    name: dataclasses.replace(CONFIG, layers=1, positions=name) for name in ("sinusoidal", "rotary", "alibi", "none")
}


def drawn(model):
    """Parameters all of which matter: norms and biases too. Drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.3, leaf.shape), jnp.float32), shapes)


def applied(model, params, *inputs, **options):
    return jax.jit(partial(model.apply, **options))({"params": params}, *inputs)


# --- the definition, in numpy -------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def normed(x, p, eps=1e-3):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attended(x, p):
    q, k, v = (dense(x, p[name]).reshape(*x.shape[:2], HEADS, -1) for name in ("query", "key", "value"))
    weights = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]))
    weights /= weights.sum(-1, keepdims=True)
    return dense(np.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape), p["out"])


def body(params, config, tokens, types):
    """With learned positions."""
    p = jax.tree.map(np.float64, params)
    x = p["embedding"]["embedding"][tokens] + p["types"]["embedding"][types]
    x = normed(x + p["positions"]["embedding"][: tokens.shape[1]], p["embedding_norm"])
    act = ACTIVATIONS[config.mlp]
    for i in range(config.layers):
        layer = p[f"layers_{i}"]
        parts = {
            "attention": lambda x, layer=layer: attended(x, layer["attention"]),
            "feed_forward": lambda x, layer=layer: dense(
                act(dense(x, layer["feed_forward"]["up"])), layer["feed_forward"]["down"]
            ),
        }
        for name, function in parts.items():
            if config.placement == "post":
                x = normed(x + function(x), layer[f"{name}_norm"])
            else:
                x = x + function(normed(x, layer[f"{name}_norm"]))
    return x if config.placement == "post" else normed(x, p["norm"])


@pytest.mark.parametrize("config", [POST, PRE, dataclasses.replace(POST, mlp="relu")], ids=["post", "pre", "relu"])
def test_the_body_is_its_drawing(config):
    model = encoder(config, VOCAB, LENGTH)
    params = drawn(model)
    actual = applied(model, params, TOKENS, TYPES)
    assert isinstance(actual, Encoded) and actual.pooled is None
    np.testing.assert_allclose(actual.hidden, body(params, config, TOKENS, TYPES), rtol=1e-4, atol=1e-5)


HEADS_OF = {
    "pooler": lambda x, p, act: np.tanh(dense(x[:, 0], p["pooler"])),
    "masked_lm": lambda x, p, act: (
        normed(act(dense(x, p["transform"])), p["transform_norm"]) @ p["embedding"]["embedding"].T + p["readout_bias"]
    ),
    "classes": lambda x, p, act: dense(np.tanh(dense(x[:, 0], p["pooler"])), p["classifier"]),
    "token_classes": lambda x, p, act: dense(x, p["classifier"]),
}


@pytest.mark.parametrize("head", HEADS_OF)
def test_heads(head):
    """Each on the same body; types are 0 where none are given."""
    model = encoder(POST, VOCAB, LENGTH, head=head, labels=("a", "b", "c") if head.endswith("classes") else ())
    params = drawn(model)
    actual = applied(model, params, TOKENS)
    hidden = body(params, POST, TOKENS, np.zeros_like(TOKENS))
    if head == "pooler":
        np.testing.assert_allclose(actual.hidden, hidden, rtol=1e-4, atol=1e-5)
        actual = actual.pooled
    expected = HEADS_OF[head](hidden, jax.tree.map(np.float64, params), ACTIVATIONS["gelu"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    bare = jax.eval_shape(encoder(POST, VOCAB, LENGTH).init, jax.random.key(0), TOKENS)["params"]
    assert bare.items() <= jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"].items()


# --- what it sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_token_sees_every_other(name):
    """The past and the future: a change anywhere is felt everywhere."""
    model = encoder(ALL[name], VOCAB, LENGTH)
    params = drawn(model)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).hidden)
    before = apply(TOKENS)
    for i in range(TOKENS.shape[1]):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % VOCAB
        assert np.all(np.abs(apply(changed) - before).max(-1) > 1e-4), i


@pytest.mark.parametrize("name", ALL)
def test_padding_and_packing_change_nothing(name):
    """Padding of whatever tokens, to the left and to the right; a text is the same alone and beside another one."""
    model = encoder(ALL[name], VOCAB, LENGTH)
    params = drawn(model)
    apply = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs).hidden)
    a, b = TOKENS[:1, :3], TOKENS[1:, :2]
    type_a, type_b = TYPES[:1, :3], TYPES[1:, :2]
    alone = apply(a, type_a)

    def padded(left, filler):
        """Of length 5, so that all of them are one program."""
        pad = lambda x, value: np.pad(x, ((0, 0), (left, 2 - left)), constant_values=value)  # noqa: E731
        return apply(pad(a, filler), pad(type_a, 1), pad(np.ones_like(a), 0))[:, left : left + 3]

    for left in 0, 1, 2:
        np.testing.assert_array_equal(padded(left, 0), padded(left, 7))
        np.testing.assert_allclose(padded(left, 7), alone, rtol=1e-5, atol=2e-6)
    packed = apply(np.hstack([a, b]), np.hstack([type_a, type_b]), np.array([[1, 1, 1, 2, 2]]))
    np.testing.assert_allclose(packed[:, :3], alone, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(packed[:, 3:], apply(b, type_b), rtol=1e-5, atol=2e-6)


def test_padding_has_no_gradient():
    model = encoder(POST, VOCAB, LENGTH)
    params = drawn(model)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    only = np.where(mask, 1, 9)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.square(model.apply({"params": params}, only, None, mask).hidden * mask[..., None]).sum()

    grads = gradient(params)
    assert np.all(grads["embedding"]["embedding"][9] == 0) and np.any(grads["embedding"]["embedding"][1] != 0)


def test_positions_may_be_given():
    model = encoder(POST, VOCAB, LENGTH)
    params = drawn(model)
    straight = applied(model, params, TOKENS).hidden
    turned = applied(model, params, TOKENS[:, ::-1], positions=jnp.arange(6)[None, ::-1]).hidden
    np.testing.assert_allclose(turned[:, ::-1], straight, rtol=1e-5, atol=1e-5)


# --- forms --------------------------------------------------------------------------------------


def test_scanned_and_recomputed_layers_are_the_same():
    model = encoder(POST, VOCAB, LENGTH)
    params = drawn(model)
    expected = applied(model, params, TOKENS).hidden
    scanned = encoder(dataclasses.replace(POST, scan_layers=True, remat=True), VOCAB, LENGTH)
    actual = applied(scanned, stack_layers(params), TOKENS).hidden
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone():
    model = encoder(dataclasses.replace(POST, dropout=0.5), VOCAB, LENGTH)
    params = drawn(model)
    apply = jax.jit(
        lambda key: model.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": key}).hidden
    )
    assert np.any(apply(jax.random.key(0)) != apply(jax.random.key(1)))
    plain = applied(encoder(POST, VOCAB, LENGTH), params, TOKENS).hidden
    np.testing.assert_array_equal(applied(model, params, TOKENS).hidden, plain)


def test_bfloat16():
    """The computation; logits are float32."""
    half, whole = (encoder(POST, VOCAB, LENGTH, dtype, "masked_lm") for dtype in (jnp.bfloat16, jnp.float32))
    params = drawn(half)
    logits, exact = applied(half, params, TOKENS), applied(whole, params, TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).mean() < 0.01 * np.abs(exact).max()
    hidden = jax.eval_shape(encoder(POST, VOCAB, LENGTH, jnp.bfloat16).apply, {"params": params}, TOKENS).hidden
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("head", ["none", "masked_lm"])
def test_the_operations_are_those_of_the_program(head):
    model = encoder(POST, VOCAB, LENGTH, head=head)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())
    tokens = jax.ShapeDtypeStruct((3, 6), jnp.int32)
    program = counted(jax.make_jaxpr(model.apply)(shapes, tokens))
    assert sum(program.values()) == forward_flops(POST, VOCAB, 3, 6, head)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 0}, "--model.layers 0 is below 1."),
        ({"types": 0}, "--model.types 0 is below 1."),
        ({"heads": 3}, "--model.heads 3 does not divide --model.dim 8; 2 would."),
        ({"heads": 8, "positions": "rotary"}, "--model.positions rotary needs heads of even width, not"),
        ({"dim": 9, "heads": 3, "positions": "sinusoidal"}, "--model.dim 9 is odd, but --model.positions sinusoidal"),
        ({"mlp_dim": -1}, "--model.mlp-dim -1 is below 0; 0 is the default."),
        ({"eps": 0.0}, "--model.eps 0 is not above 0; 1e-12 is usual."),
        ({"dropout": 1.0}, "--model.dropout 1 is not in [0, 1); 0.1 is usual."),
    ],
)
def test_a_bad_configuration_is_one_clear_line(fields, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        dataclasses.replace(CONFIG, **fields)


def test_other_mistakes():
    with pytest.raises(ConfigError, match=r"9 tokens do not fit the model's length; 8 would\."):
        encoder(CONFIG, VOCAB, LENGTH).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"the head classes goes with labels\."):
        encoder(CONFIG, VOCAB, LENGTH, head="classes")
    with pytest.raises(ValueError, match=r"the head masked_lm goes without labels\."):
        encoder(CONFIG, VOCAB, LENGTH, head="masked_lm", labels=("a",))
