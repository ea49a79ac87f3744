"""Whisper as a model, and transcribing with it. That it is what was published is tested with its folders."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.speech import Convolution, SpeechConfig, sinusoids, whisper

CONFIG = SpeechConfig(
    layers=1, heads=2, dim=16, mlp_dim=20, decoder_layers=2, decoder_heads=4, decoder_mlp_dim=24, bands=8
)
VOCAB, LENGTH, SOURCE = 17, 12, 10
MODEL = whisper(CONFIG, VOCAB, LENGTH, SOURCE)
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(2, 2 * SOURCE, 8)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (2, LENGTH)), jnp.int32)
forward = jax.jit(MODEL.apply)


@pytest.fixture(scope="module")
def variables() -> dict:
    """Drawn at random, so that none is without effect."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *MODEL.inputs())
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(("frames", "stride"), [(7, 1), (7, 2), (8, 2), (1, 2)])
def test_a_convolution_is_its_definition(frames, stride):
    module, x = Convolution(4, stride), jnp.asarray(RNG.normal(size=(2, frames, 3)), jnp.float32)
    kernel, bias = RNG.normal(size=(3, 3, 4)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
    expected = np.zeros((2, -(-frames // stride), 4)) + bias
    params = {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    for row in range(2):
        for t in range(expected.shape[1]):
            for k in range(3):
                if 0 <= stride * t + k - 1 < frames:
                    expected[row, t] += x[row, stride * t + k - 1] @ kernel[k]
    np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)


def test_positions_of_the_encoder_are_sinusoids_that_are_not_learned(variables):
    table = sinusoids(5, 6)
    for position in range(5):
        angles = [position, position / 100, position / 10_000]
        np.testing.assert_allclose(table[position], [*np.sin(angles), *np.cos(angles)], atol=1e-6)
    fresh = jax.jit(MODEL.bind(variables).encoder.clone(parent=None).init)(jax.random.key(0), FEATURES)
    np.testing.assert_array_equal(fresh["params"]["positions"], sinusoids(SOURCE, 16))
    gradient = jax.jit(jax.grad(lambda variables: jnp.square(MODEL.apply(variables, FEATURES, method="encode")).mean()))
    grads = gradient(variables)["params"]["encoder"]
    assert not grads.pop("positions").any()
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 0


def test_what_sees_what(variables):
    """The encoder sees all of the sound from everywhere, a token all of the sound and no later token."""
    encode = jax.jit(lambda features: MODEL.apply(variables, features, method="encode"))
    later = FEATURES.at[:, -1].add(1)
    changed = np.abs(encode(later) - encode(FEATURES)).max(axis=(0, 2))
    assert changed.shape == (SOURCE,) and changed.min() > 1e-4
    assert np.abs(forward(variables, later, TOKENS) - forward(variables, FEATURES, TOKENS)).max(axis=2).min() > 1e-5
    other = TOKENS.at[:, 7].set((TOKENS[:, 7] + 1) % VOCAB)
    changed = np.abs(forward(variables, FEATURES, other) - forward(variables, FEATURES, TOKENS)).max(axis=2)
    assert changed[:, :7].max() == 0 and changed[:, 7:].min() > 1e-5
    # Each row has its own sound.
    swapped = forward(variables, FEATURES[::-1], TOKENS[::-1])[::-1]
    np.testing.assert_allclose(swapped, forward(variables, FEATURES, TOKENS), atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_token_by_token_is_all_at_once(variables, scan):
    """Also with scanned layers; the sound's keys and values are made by the first call and kept."""
    model = whisper(dataclasses.replace(CONFIG, scan_layers=scan), VOCAB, LENGTH, SOURCE)
    params = variables["params"]
    params = {"params": {part: stack_layers(params[part]) for part in params} if scan else params}
    expected = forward(variables, FEATURES, TOKENS)

    @jax.jit
    def first(tokens):
        memory = model.apply(params, FEATURES, method="encode")
        cache = model.empty_cache(LENGTH, jnp.zeros(2, jnp.int32))
        return model.apply(params, tokens, memory, cache=cache, method="decode")

    @jax.jit
    def then(tokens, cache):
        return model.apply(params, tokens, cache=cache, method="decode")

    logits, cache = first(TOKENS[:, :4])
    found = [logits]
    memory = cache.memory
    for number in range(4, LENGTH):
        logits, cache = then(TOKENS[:, number : number + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, cache.memory, memory)
    silent = cache._replace(memory=jax.tree.map(jnp.zeros_like, memory), index=cache.index - 1)
    assert np.abs(then(TOKENS[:, -1:], silent)[0] - expected[:, -1:]).max() > 1e-3


def test_short_sounds_and_rows_that_begin_later(variables):
    """Fewer frames are positions from 0 on; a prompt may be padded on its left."""
    encode = jax.jit(lambda features: MODEL.apply(variables, features, method="encode"))
    assert encode(FEATURES[:, :7]).shape == (2, 4, 16)
    cache = MODEL.empty_cache(LENGTH, jnp.array([0, 3]))
    tokens = TOKENS.at[1].set(jnp.pad(TOKENS[1, :-3], (3, 0)))
    decode = jax.jit(lambda memory: MODEL.apply(variables, tokens, memory, cache=cache, method="decode")[0])
    logits = decode(encode(FEATURES))
    expected = forward(variables, FEATURES, TOKENS)
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(logits[1, 3:], expected[1, :-3], atol=1e-5)


def test_bfloat16(variables):
    half = whisper(CONFIG, VOCAB, LENGTH, SOURCE, jnp.bfloat16)
    logits, expected = jax.jit(half.apply)(variables, FEATURES, TOKENS), forward(variables, FEATURES, TOKENS)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_dropout_is_of_training_alone(variables):
    model = whisper(dataclasses.replace(CONFIG, dropout=0.5), VOCAB, LENGTH, SOURCE)
    apply = jax.jit(lambda key: model.apply(variables, FEATURES, TOKENS, False, rngs={"dropout": key}))
    one, same, other = (apply(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
    still, expected = (jax.jit(lambda m=m: m.apply(variables, FEATURES, method="encode"))() for m in (model, MODEL))
    np.testing.assert_allclose(still, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_heads": 5}, "--model.decoder-heads 5 does not divide --model.dim 16."),
        ({"heads": 3}, "--model.heads 3 does not divide --model.dim 16."),
        ({"bands": 0}, "--model.bands 0 is below 1."),
        ({"decoder_mlp_dim": -1}, "--model.decoder-mlp-dim -1 is below 0; 0 is the default."),
        (
            {"dim": 2, "heads": 1, "decoder_heads": 1},
            "--model.dim 2 has no pairs of a sine and a cosine; an even one from 4 up has.",
        ),
        ({"dropout": 1.0}, "--model.dropout 1 is not in [0, 1); 0.1 is usual."),
    ],
)
def test_numbers_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **fields)
    assert str(caught.value) == message


def test_inputs_that_do_not_fit(variables):
    with pytest.raises(ConfigError, match="21 frames do not fit the model; 20 would."):
        MODEL.apply(variables, jnp.zeros((2, 21, 8)), TOKENS)
    with pytest.raises(ConfigError, match="13 tokens do not fit the model's length; 12 would."):
        MODEL.apply(variables, FEATURES, np.zeros((2, 13), np.int32))
