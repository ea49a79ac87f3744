"""Encoder-decoders: against the drawing in numpy, and the laws of what sees what."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.data.pairs import Specials
from jaxarch.run.operations import counted
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.beams import Beams
from jaxarch.transformer.blocks import attention_weights, stack_layers
from jaxarch.transformer.decoding import Prompts, left_pad
from jaxarch.transformer.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
    encoder_decoder,
    forward_flops,
    prefill,
    step,
    t5,
    t5_v1_1,
    transformer,
    translate,
)

VOCAB, SOURCE, LENGTH = 11, 6, 5
RNG = np.random.default_rng(0)
SOURCES = RNG.integers(0, VOCAB, (2, SOURCE)).astype(np.int32)
TOKENS = RNG.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
SEGMENTS = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
# The eps of the norms is large, so that a wrong one shows.
CONFIGS = {
    "t5": dataclasses.replace(t5(2, 2, 8, 3, 12), decoder_layers=1, buckets=6, max_distance=4, eps=0.1),
    "t5_v1_1": dataclasses.replace(t5_v1_1(1, 2, 8, 5, 12), buckets=4, max_distance=3, eps=0.1),
    "transformer": dataclasses.replace(transformer(2, 2, 8), eps=0.1, dropout=0.0),
    "learned": EncoderDecoderConfig(1, 2, 2, 8, activation="silu", gated=True, positions="learned", eps=0.1),
    "rotary": EncoderDecoderConfig(1, 1, 2, 8, positions="rotary", scaled_readout=True, eps=0.1),
}


@lru_cache
def drawn(name: str) -> tuple[EncoderDecoder, Any]:
    """A model and parameters all of which matter: norms and biases too."""
    model = encoder_decoder(CONFIGS[name], VOCAB, (SOURCE, LENGTH))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


@lru_cache
def compiled(name: str) -> Any:
    model, variables = drawn(name)
    return jax.jit(partial(model.apply, variables))


def applied(name, source, tokens, segments=SEGMENTS, target_segments=None, positions=None):
    """Always of the same shapes and with all arguments, so that each model is compiled once."""
    if target_segments is None:
        target_segments = np.ones_like(TOKENS)
    if positions is None:
        positions = np.arange(SOURCE)[None] + 0 * SOURCES, np.arange(LENGTH)[None] + 0 * TOKENS
    return compiled(name)(source, tokens, segments, target_segments, *positions)


# --- the drawing, in numpy ----------------------------------------------------------------------


def normed(x, p, config):
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * p["scale"]
    return x + p["bias"] if "bias" in p else x


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "gelu_tanh": gelu, "silu": lambda x: x / (1 + np.exp(-x))}


def attended(x, others, p, config, bias, seen):
    q, k, v = (
        dense(y, p[name]).reshape(*y.shape[:-1], config.heads, config.head_dim)
        for y, name in ((x, "query"), (others, "key"), (others, "value"))
    )
    logits = np.einsum("thd,shd->hts", q, k) * (config.head_dim**-0.5 if config.scaled_attention else 1)
    logits = np.where(seen, logits + bias, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return dense(np.einsum("hts,shd->thd", weights, v).reshape(len(x), -1), p["out"])


def t5_bucket(relative, bidirectional, buckets, most):
    """The table of Raffel et al. 2020's code, by real logarithms."""
    number = 0
    if bidirectional:
        buckets //= 2
        number += buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return number + distance
    grown = exact + int(np.log(distance / exact) / np.log(most / exact) * (buckets - exact) + 1e-9)
    return number + min(grown, buckets - 1)


def side(x, p, config, causal, memory=None, seen=None, memory_seen=None):
    length = len(x)
    bias = np.zeros((config.heads, 1, 1))
    if config.positions == "sinusoidal":
        wave = 10000.0 ** (-np.arange(0, config.dim, 2) / config.dim)
        angles = np.arange(length)[:, None] * wave
        x = x * np.sqrt(config.dim) + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(length, config.dim)
    elif config.positions == "learned":
        x = x + p["positions"]["embedding"][:length]
    elif config.positions == "relative":
        sizes = not causal, config.buckets, config.max_distance
        numbers = [[t5_bucket(key - query, *sizes) for key in range(length)] for query in range(length)]
        bias = p["relative_bias"]["embedding"][np.array(numbers)].transpose(2, 0, 1)
    seen = np.tril(np.ones((length, length), bool)) if causal else seen
    for number in range(sum(name.startswith("layers_") for name in p)):
        own = p[f"layers_{number}"]

        def forward(x, own=own):
            p = own["feed_forward"]
            y = ACTIVATIONS[config.activation](dense(x, p["gate" if config.gated else "up"]))
            return dense(y * dense(x, p["up"]) if config.gated else y, p["down"])

        parts = {"attention": lambda x, own=own: attended(x, x, own["attention"], config, bias, seen)}
        if causal:
            parts["cross"] = lambda x, own=own: attended(x, memory, own["cross"], config, 0, memory_seen)
        for name, function in (parts | {"feed_forward": forward}).items():
            norm = partial(normed, p=own[f"{name}_norm"], config=config)
            x = x + function(norm(x)) if config.placement == "pre" else norm(x + function(x))
    return normed(x, p["norm"], config) if config.placement == "pre" else x


def drawing(variables, config, source, tokens, real):
    """The logits of one pair whose source has `real` tokens; what stands after them is padding."""
    p = jax.tree.map(np.float64, variables["params"])
    table = p["embedding"]["embedding"]
    seen = (np.arange(len(source)) < real)[None]
    memory = side(table[source], p["encoder"], config, False, seen=seen)
    x = side(table[tokens], p["decoder"], config, True, memory, memory_seen=seen)
    x = x * config.dim**-0.5 if config.scaled_readout else x
    return x @ table.T if config.tied else dense(x, p["readout"])


@pytest.mark.parametrize("name", ["t5", "t5_v1_1", "transformer", "learned"])
def test_logits_are_those_of_the_drawing(name):
    logits = applied(name, SOURCES, TOKENS)
    for row, real in enumerate((6, 4)):
        expected = drawing(drawn(name)[1], CONFIGS[name], SOURCES[row], TOKENS[row], real)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_the_published_shapes():
    """The parameters of each, by the papers' tables: 65 million (with a shared vocabulary of 37,000), 60 and 77."""

    def millions(config, vocab):
        model = encoder_decoder(config, vocab, (512, 512))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())
        return sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6

    assert abs(millions(transformer(), 37000) - 65) < 2
    assert abs(millions(t5(), 32128) - 60.5) < 0.1
    assert abs(millions(t5_v1_1(), 32128) - 76.96) < 0.1


# --- who sees what ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_sees_all_and_the_decoder_no_later_token(name):
    logits = applied(name, SOURCES, TOKENS)
    # The last of the source changes what is said of the first token's successor.
    other = SOURCES.copy()
    other[0, -1] = (other[0, -1] + 1) % VOCAB
    changed = np.abs(applied(name, other, TOKENS) - logits).max(-1)
    assert np.all(changed[0] > 1e-4) and np.all(changed[1] == 0)
    tokens = TOKENS.copy()
    tokens[:, 3] = (tokens[:, 3] + 1) % VOCAB
    changed = np.abs(applied(name, SOURCES, tokens) - logits).max(-1)
    assert np.all(changed[:, :3] == 0) and np.all(changed[:, 3:] > 1e-4)


def test_the_memory_of_each_source_token_is_of_all():
    model, variables = drawn("rotary")
    memory = jax.jit(partial(model.apply, variables, method="encode"))
    for place in range(SOURCE):
        other = SOURCES.copy()
        other[0, place] = (other[0, place] + 1) % VOCAB
        changed = np.abs(memory(other) - memory(SOURCES)).max(-1)
        assert np.all(changed[0] > 1e-5) and np.all(changed[1] == 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_in_padding_changes_nothing(name):
    logits = applied(name, SOURCES, TOKENS)
    other = np.where(SEGMENTS == 0, (SOURCES + 3) % VOCAB, SOURCES)
    np.testing.assert_allclose(applied(name, other, TOKENS), logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "learned"])
def test_how_much_padding_there_is_changes_nothing(name):
    logits = applied(name, SOURCES, TOKENS)
    shorter = compiled(name)(SOURCES[1:, :4], TOKENS[1:, :3])
    np.testing.assert_allclose(shorter[0], logits[1, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_pairs_are_as_if_apart(name):
    """Two pairs in one row, each seeing itself alone, and padding after them."""
    packed = applied(
        name,
        np.array([[1, 2, 3, 4, 5, 0]] * 2),
        np.array([[6, 7, 8, 9, 0]] * 2),
        np.array([[1, 1, 1, 2, 2, 0]] * 2),
        np.array([[1, 1, 2, 2, 0]] * 2),
        (np.array([[0, 1, 2, 0, 1, 0]] * 2), np.array([[0, 1, 0, 1, 0]] * 2)),
    )
    apart = applied(
        name,
        np.array([[1, 2, 3, 0, 0, 0], [4, 5, 0, 0, 0, 0]]),
        np.array([[6, 7, 0, 0, 0], [8, 9, 0, 0, 0]]),
        np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
    )
    np.testing.assert_allclose(packed[0, :4], np.concatenate(apart[:, :2]), rtol=1e-4, atol=1e-4)


# --- decoding -----------------------------------------------------------------------------------


def prompts_of(tokens: np.ndarray) -> Prompts:
    return Prompts(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1]))


@pytest.mark.parametrize(("name", "scan"), [*((name, False) for name in CONFIGS), ("t5", True)])
def test_prefill_and_steps_are_the_full_pass(name, scan):
    model, variables = drawn(name)
    if scan:
        config = dataclasses.replace(CONFIGS[name], scan_layers=True)
        model = encoder_decoder(config, VOCAB, (SOURCE, LENGTH))
        sides = {side: stack_layers(variables["params"][side]) for side in ("encoder", "decoder")}
        variables = {"params": variables["params"] | sides}
    full = applied(name, SOURCES, TOKENS)
    start = jax.jit(lambda prompts: prefill(model, variables, SOURCES, SEGMENTS, prompts, LENGTH))
    forward = jax.jit(partial(step, model, variables))
    logits, cache = start(prompts_of(TOKENS[:, :2]))
    for t in range(2, LENGTH + 1):
        np.testing.assert_allclose(logits, full[:, t - 1], rtol=1e-4, atol=1e-4)
        if t < LENGTH:
            structure = jax.tree.structure(cache)
            after, cache = forward(TOKENS[:, t : t + 1], cache)
            logits = after[:, 0]
            assert jax.tree.structure(cache) == structure  # so that a loop may carry it


def test_targets_that_begin_at_unequal_lengths_are_padded_on_the_left():
    model, variables = drawn("t5")
    full = applied("t5", SOURCES, TOKENS)
    prompts = left_pad([TOKENS[0, :3].tolist(), TOKENS[1, :2].tolist()])
    logits, cache = jax.jit(lambda: prefill(model, variables, SOURCES, SEGMENTS, prompts, LENGTH))()
    after, _ = jax.jit(partial(step, model, variables))(np.stack([TOKENS[0, 3:4], TOKENS[1, 2:3]]), cache)
    for row, (seen, made) in enumerate(((2, 3), (1, 2))):
        np.testing.assert_allclose(logits[row], full[row, seen], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(after[row, 0], full[row, made], rtol=1e-4, atol=1e-4)


def test_a_step_makes_no_keys_of_the_source():
    """The source's length multiplies the read of the ready keys and values alone, no projection."""
    model, variables = drawn("transformer")

    def products(source):
        segments = np.ones((1, source), np.int32)
        sources = np.ones((1, source), np.int32)
        _, cache = jax.eval_shape(
            lambda: prefill(model, variables, sources, segments, prompts_of(TOKENS[:1, :1]), LENGTH)
        )
        found = counted(jax.make_jaxpr(partial(step, model, variables))(TOKENS[:1, :1], cache).jaxpr)
        assert found is not None
        return found["float32"]

    config = CONFIGS["transformer"]
    assert products(40) - products(20) == 20 * config.layers * 2 * 2 * config.dim


@pytest.mark.parametrize("width", [1, 3])
def test_translations_are_the_best_of_what_could_be_written(width):
    """By all targets of two tokens, of which one may be the end; a narrow search may miss the best, not a wide one."""
    model, variables = drawn("rotary")
    specials = Specials(pad=8, begin=9, end=10)
    source = np.where(SEGMENTS == 0, specials.pad, SOURCES % 8)
    beams = Beams(width * 4 if width > 1 else 1, length_penalty=0.0, early_stopping="never")
    found = translate(model, variables, source, specials, 2, beams)
    firsts = jax.nn.log_softmax(applied("rotary", source, np.full((2, LENGTH), 9)))[:, 0]
    seconds = []
    for first in range(VOCAB):
        tokens = np.tile(np.array([9, first, 0, 0, 0]), (2, 1))
        seconds.append(jax.nn.log_softmax(applied("rotary", source, tokens))[:, 1])
    scores = np.asarray(firsts)[:, :, None] + np.stack(seconds, axis=1)  # [pair, first, second]
    scores[:, specials.end] = -np.inf
    scores[:, specials.end, specials.end] = np.asarray(firsts)[:, specials.end]
    for row in range(2):
        best = np.unravel_index(scores[row].argmax(), (VOCAB, VOCAB))
        first = int(np.asarray(firsts)[row].argmax())
        greedy = first, specials.end if first == specials.end else int(scores[row, first].argmax())
        assert tuple(found[row].tolist()) == (greedy if width == 1 else tuple(map(int, best)))


def test_learned_positions_hold_no_more():
    model, variables = drawn("learned")
    with pytest.raises(ConfigError, match=r"targets of 6 tokens do not fit the model's length; 5 would\."):
        prefill(model, variables, SOURCES, None, prompts_of(TOKENS[:, :1]), LENGTH + 1)
    with pytest.raises(ConfigError, match=r"7 tokens do not fit the model's length; 6 would\."):
        jax.eval_shape(model.apply, variables, np.ones((1, 7), np.int32), TOKENS[:1])


# --- the rest -----------------------------------------------------------------------------------


def test_weights_of_attention_by_name():
    model, variables = drawn("t5")
    weights = jax.jit(lambda *inputs: attention_weights(model, variables, *inputs))(SOURCES, TOKENS, SEGMENTS)
    names = [f"encoder.layers_{i}.attention" for i in range(2)]
    assert sorted(weights) == ["decoder.layers_0.attention", "decoder.layers_0.cross", *names]
    cross = weights["decoder.layers_0.cross"]
    assert cross.shape == (2, 2, LENGTH, SOURCE)
    np.testing.assert_allclose(cross.sum(-1), 1, rtol=1e-5)
    assert np.all(cross[1, :, :, 4:] == 0) and np.all(cross[0] > 0)


@pytest.mark.parametrize("silent", ["parts", "embedding"])
def test_dropout_of_embeddings_and_of_parts_in_both_halves(silent):
    """What else could be dropped is 0: what the layers add, or the embeddings."""
    config = dataclasses.replace(CONFIGS["transformer"], layers=1, dropout=0.5, positions="none", tied=False)
    model = encoder_decoder(config, VOCAB, (SOURCE, LENGTH))
    names = ("embedding",) if silent == "embedding" else ("out", "down")

    def zeroed(path, leaf):
        return leaf * 0 if any(key.key in names for key in path) else leaf

    readout = {"readout": {"kernel": jnp.asarray(RNG.normal(size=(8, VOCAB)), jnp.float32)}}
    variables = jax.tree_util.tree_map_with_path(zeroed, {"params": drawn("transformer")[1]["params"] | readout})

    @jax.jit
    def both(variables, key, other):
        memory = model.apply(variables, SOURCES, deterministic=False, rngs={"dropout": key}, method="encode")
        options = {"deterministic": False, "rngs": {"dropout": other}, "method": "decode"}
        return memory, model.apply(variables, TOKENS, memory, **options)

    keys = jax.random.split(jax.random.key(0))
    memory, logits = both(variables, keys[0], keys[0])
    same, others = both(variables, keys[0], keys[1])
    assert np.all(same == memory) and not np.allclose(others, logits)
    assert not np.allclose(both(variables, keys[1], keys[0])[0], memory)


@pytest.mark.parametrize("name", ["t5", "transformer", "learned"])
def test_operations_by_formula_are_those_of_the_program(name):
    """But for the pairs that the causal mask hides, which dense attention counts."""
    model, variables = drawn(name)
    config = CONFIGS[name]
    jaxpr = jax.make_jaxpr(partial(model.apply, variables))(SOURCES, TOKENS).jaxpr
    hidden = 2 * 2 * 2 * config.heads * config.head_dim * (LENGTH * (LENGTH - 1) // 2) * config.both[1]
    assert counted(jaxpr) == {"float32": forward_flops(config, VOCAB, 2, SOURCE, LENGTH) + hidden}


def test_remat_and_bfloat16():
    _, variables = drawn("t5")
    wide = applied("t5", SOURCES, TOKENS)
    config = dataclasses.replace(CONFIGS["t5"], remat=True)
    narrow = encoder_decoder(config, VOCAB, (SOURCE, LENGTH), jnp.bfloat16)
    logits = jax.jit(narrow.apply)(variables, SOURCES, TOKENS, SEGMENTS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wide, atol=0.05 * np.abs(wide).max())
    model = encoder_decoder(config, VOCAB, (SOURCE, LENGTH))

    def loss(model, params):
        return jnp.sum(model.apply({"params": params}, SOURCES, TOKENS, SEGMENTS) ** 2)

    grads = [jax.jit(jax.grad(partial(loss, one)))(variables["params"]) for one in (model, drawn("t5")[0])]
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "--model.layers 0 is below 1."),
        ({"decoder_layers": -1}, "--model.decoder-layers -1 is below 0; 0 is the default."),
        ({"heads": 3, "dim": 8}, "--model.heads 3 does not divide --model.dim 8; --model.dim 9 would do."),
        ({"heads": 2, "dim": 6}, "--model.positions rotary needs heads of even width, not 3;"),
        ({"dim": 7, "heads": 1, "positions": "sinusoidal"}, "--model.dim 7 is odd"),
        ({"positions": "relative", "buckets": 3}, "--model.buckets 3 are too few; 4 would do"),
        ({"positions": "relative", "buckets": 32, "max_distance": 16}, "--model.max-distance 16 is not above half"),
        ({"eps": 0.0}, "--model.eps 0 is not above 0"),
        ({"dropout": 1.0}, "--model.dropout 1 is not in [0, 1)"),
    ],
)
def test_what_does_not_fit_is_said(fields, message):
    with pytest.raises(ConfigError) as error:
        EncoderDecoderConfig(**fields)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
