from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer import decoding, speculation
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.decoding import distribution, forced, generate, left_pad, prefill, repetition_penalty, step
from jaxarch.transformer.positions import Rotary
from jaxarch.transformer.speculation import generate_speculatively, speculate

VOCAB, LENGTH, NEW = 17, 20, 12
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3]]


def drawn(config, seed, vocab=VOCAB, length=LENGTH, like=None, apart=1.0):
    """A model and random variables, so far apart from those of another."""
    model = decoder(config, vocab, length)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), leaf.dtype), shapes)
    if like is not None:
        variables = jax.tree.map(lambda one, other: other + apart * (one - 0.1), variables, like)
    return model, variables


@pytest.fixture(scope="module")
def large():
    return drawn(ModelConfig(2, 4, 32), 0)


@pytest.fixture(scope="module")
def draft(large):
    """The large model, disturbed: some of its guesses are right."""
    return drawn(ModelConfig(2, 4, 32), 1, like=large[1], apart=0.2)


@pytest.mark.parametrize("least", [64, 1])  # caches of full length at once, or that grow
def test_greedy_is_that_of_the_large_model(least, large, draft, monkeypatch):
    monkeypatch.setattr(decoding, "LEAST_STAGE", least)
    speculation._program.cache_clear()
    key = jax.random.key(0)
    for prompts in (left_pad(PROMPTS), left_pad(PROMPTS[:1])):
        expected = generate(*large, prompts, NEW, key)
        tokens, passes = generate_speculatively(*large, *draft, prompts, NEW, key, 3)
        np.testing.assert_array_equal(tokens, expected)
        assert (NEW - 1) / 4 < passes < NEW - 1, "some drafts are accepted, some are not"


def test_greedy_ends_at_the_stop_token_and_obeys_processors(large, draft):
    key, prompts = jax.random.key(0), left_pad(PROMPTS)
    processors = (forced((None, 8)), repetition_penalty(3.0))
    free = np.asarray(generate(*large, prompts, NEW, key, processors=processors))
    stop = int(free[0, 5])
    for options in ((None, processors), (stop, processors)):
        expected = generate(*large, prompts, NEW, key, stop_token=options[0], processors=options[1])
        tokens, _ = generate_speculatively(*large, *draft, prompts, NEW, key, 3, decoding.only_greatest, *options)
        np.testing.assert_array_equal(tokens, expected)
    assert (np.asarray(expected) != free).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_model_is_always_right(temperature, large):
    options = 3, distribution(temperature)
    _, passes = generate_speculatively(*large, *large, left_pad(PROMPTS), 13, jax.random.key(0), *options)
    assert passes == 3


# --- the distribution -----------------------------------------------------------------------------

SMALL, COUNT, DRAWS = 3, 4, 6_000


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 2}], ids=["plain", "filtered"])
def test_texts_are_distributed_as_the_large_model_has_it(rows, options):
    """Chi-squared of 6,000 texts of four tokens against their 81 exact probabilities, alone and in batches of two.

    The draft is far off; three tokens a pass, so that all of them, some and none are accepted.
    """
    config = ModelConfig(1, 2, 8)
    model, variables = drawn(config, 0, SMALL, 8)
    draft = drawn(config, 1, SMALL, 8)
    shape = distribution(**options)
    texts = np.array(list(itertools.product(range(SMALL), repeat=COUNT)), np.int32)
    prompt = [1, 0]
    logits = model.apply(variables, np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1).astype(np.int32))
    steps = jnp.stack([shape(logits[:, place]) for place in range(1, 1 + COUNT)], axis=1)
    exact = np.float64(jnp.take_along_axis(jax.nn.softmax(steps), texts[..., None], axis=2)[..., 0]).prod(axis=1)
    np.testing.assert_allclose(exact.sum(), 1, rtol=1e-5)

    prompts = left_pad([prompt] * rows)
    prefilled, cache = prefill(model, variables, prompts, 2)
    _, draft_cache = prefill(*draft, prompts, 2)

    def one(key):
        own = (lambda *inputs: step(model, variables, *inputs)), (lambda *inputs: step(*draft, *inputs))
        return speculate(*own, prefilled, cache, draft_cache, prompts, COUNT, key, 3, shape)

    drawn_texts, passes = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(5), DRAWS // rows))
    assert set(np.unique(passes)) == {1, 2, 3}
    numbers = np.asarray(drawn_texts).reshape(-1, COUNT) @ SMALL ** np.arange(COUNT)[::-1]
    counts = np.bincount(numbers, minlength=len(texts))
    assert not counts[exact == 0].any()
    expected = exact[exact > 0] / exact.sum() * DRAWS
    enough = expected >= 5
    pooled = [np.append(each[enough], each[~enough].sum()) for each in (counts[exact > 0], expected)]
    pooled = [each[: len(each) - (pooled[1][-1] == 0)] for each in pooled]
    assert chisquare(*pooled).pvalue > 1e-3


def test_what_cannot_be_speculated_with_is_refused(large):
    prompts, key = left_pad(PROMPTS), jax.random.key(0)
    other = drawn(ModelConfig(1, 2, 8), 0, vocab=16)
    with pytest.raises(ConfigError, match="a draft of 16 tokens cannot serve a model of 17"):
        generate_speculatively(*large, *other, prompts, 3, key)
    with pytest.raises(ConfigError, match="do not fit the model's length 7"):
        generate_speculatively(*large, *drawn(ModelConfig(1, 2, 8), 0, length=7), prompts, 3, key)
    with pytest.raises(ConfigError, match="--drafted 0"):
        generate_speculatively(*large, *large, prompts, 3, key, 0)
    scaling = {"positions": "rotary", "rotary": Rotary(scaling="dynamic", factor=2.0, length=4)}
    with pytest.raises(ConfigError, match="dynamic"):
        generate_speculatively(*drawn(ModelConfig(1, 2, 8, **scaling), 0), *large, prompts, 3, key)
