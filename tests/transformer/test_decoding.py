from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxarch.run import backend
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer import decoding
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.decoding import (
    Text,
    distribution,
    forced,
    generate,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    left_pad,
    not_before,
    only_greatest,
    prefill,
    repetition_penalty,
    right_aligned,
    sampling,
    step,
)
from jaxarch.transformer.positions import Rotary

VOCAB, NEW = 17, 4
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3]]
LONGEST = max(map(len, PROMPTS))
LENGTH = LONGEST + NEW
BASE = ModelConfig(2, 4, 32, kv_heads=2, qk_norm=True)


def drawn(config, length=LENGTH):
    """A model and random variables, none of them 0 or 1."""
    model = decoder(config, VOCAB, length)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def learned():
    return drawn(BASE)


# --- the cache ----------------------------------------------------------------------------------


CACHED = {positions: {"positions": positions} for positions in ("learned", "sinusoidal", "rotary", "alibi", "none")}
CACHED |= {f"scanned {name}": options | {"scan_layers": True} for name, options in CACHED.items()}
# Windows shorter than the prompts, so that a step sees part of one, and as long as one and what follows of it.
CACHED |= {f"window of {n}": {"positions": "rotary", "window": (n,)} for n in (1, 3, LONGEST + 1)}
CACHED |= {
    "scanned window": {"window": (3,), "scan_layers": True},
    "gemma": {
        "positions": "rotary",
        "window": (3, 0),
        "norm": "zero_centered_rms",
        "placement": "both",
        "mlp": "geglu",
        "scale_embedding": True,
        "attention_scale": 0.2,
        "attention_soft_cap": 3.0,
        "soft_cap": 5.0,
        "attention_bias": "all",
    },
}


@pytest.mark.parametrize("name", CACHED)
def test_prefill_and_steps_equal_the_full_forward(name):
    """Prompts of 6, 1 and 3 tokens and four more tokens each, against each row on its own from position 0.

    The rows' full forward is one batch padded on the right, which a causal model does not see.
    """
    model, variables = drawn(dataclasses.replace(BASE, **CACHED[name]))
    more = np.random.default_rng(1).integers(0, VOCAB, size=(3, NEW), dtype=np.int32)
    rows = np.zeros((3, LENGTH), np.int32)
    for row, prompt, own in zip(rows, PROMPTS, more, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *own]
    full = jax.jit(model.apply)(variables, rows)

    one = jax.jit(lambda tokens, cache: step(model, variables, tokens, cache))
    logits, cache = jax.jit(lambda prompts: prefill(model, variables, prompts, LENGTH))(left_pad(PROMPTS, pad=7))
    for t in range(NEW + 1):
        expected = [full[b, len(prompt) - 1 + t] for b, prompt in enumerate(PROMPTS)]
        np.testing.assert_allclose(logits, jnp.stack(expected), rtol=1e-4, atol=1e-4)
        if t < NEW:
            logits, cache = one(more[:, t : t + 1], cache)
            logits = logits[:, -1]
    assert cache.index == LENGTH


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_scaled_steps_equal_the_full_forward_of_each_prefix(kind):
    """Dynamic frequencies follow the length, so each prefix, and each row, has its own: here below 4 and above.

    Of one layer: what a second one keeps of earlier tokens came of the frequencies at their time.
    """
    layers = 1 if kind == "dynamic" else 2
    scaled = Rotary(100.0, kind, factor=2.0, length=4)
    model, variables = drawn(dataclasses.replace(BASE, layers=layers, positions="rotary", rotary=scaled))
    more = np.random.default_rng(1).integers(0, VOCAB, size=(3, NEW), dtype=np.int32)
    rows = np.zeros((3, LENGTH), np.int32)
    for row, prompt, own in zip(rows, PROMPTS, more, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *own]

    @jax.jit
    @jax.vmap  # each row on its own
    def full(row, length):
        # What follows the prefix is not seen; at position 0 it does not lengthen the text either.
        positions = jnp.where(jnp.arange(LENGTH) < length, jnp.arange(LENGTH), 0)
        return model.apply(variables, row[None], positions[None])[0, length - 1]

    one = jax.jit(lambda tokens, cache: step(model, variables, tokens, cache))
    logits, cache = prefill(model, variables, left_pad(PROMPTS, pad=7), LENGTH)
    for t in range(NEW + 1):
        lengths = np.array([len(prompt) + t for prompt in PROMPTS])
        np.testing.assert_allclose(logits, full(rows, lengths), rtol=1e-4, atol=1e-4)
        if t < NEW:
            logits, cache = one(more[:, t : t + 1], cache)
            logits = logits[:, -1]


def test_a_prompt_padded_on_the_left_goes_on_as_alone():
    """Exactly, with all of a Gemma 2's options, among them a window that is shorter than the padding."""
    model, variables = drawn(dataclasses.replace(BASE, **CACHED["gemma"]))
    together = generate(model, variables, left_pad(PROMPTS, pad=7), NEW, jax.random.key(0))
    alone = generate(model, variables, left_pad(PROMPTS[1:2]), NEW, jax.random.key(0))
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize("least", [64, 1])  # a loop of one stage, or of four with a cache that grows by a slot
def test_generate_is_the_loop_of_full_forwards(least, learned, monkeypatch):
    model, variables = learned
    monkeypatch.setattr(decoding, "LEAST_STAGE", least)
    decoding._program.cache_clear()
    forward = jax.jit(model.apply)
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        padded = np.zeros((3, LENGTH), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        logits = forward(variables, padded)
        for i, row in enumerate(rows):
            row.append(int(logits[i, len(row) - 1].argmax()))
    tokens = generate(model, variables, left_pad(PROMPTS), NEW, jax.random.key(0))
    np.testing.assert_array_equal(tokens, [row[-NEW:] for row in rows])


def test_one_row_in_bfloat16_from_transposed_kernels(learned, monkeypatch):
    """The same text, whether the compiler would gain by it or not."""
    _, variables = learned
    model = decoder(BASE, VOCAB, LENGTH, jnp.bfloat16)
    monkeypatch.setattr(decoding, "LEAST_STAGE", NEW)
    texts = []
    for converts in (False, True):
        monkeypatch.setattr(backend, "converts_in_products", lambda converts=converts: converts)
        decoding._program.cache_clear()
        texts.append(generate(model, variables, left_pad(PROMPTS[:1]), NEW, jax.random.key(0)))
    np.testing.assert_array_equal(*texts)


def test_the_same_key_gives_the_same_text(learned):
    model, variables = learned
    texts = [generate(model, variables, left_pad(PROMPTS), NEW, jax.random.key(seed), sampling()) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    assert sampling(0.8, top_k=3) is sampling(0.8, top_k=3), "or each call would compile anew"


def test_after_the_stop_token_a_row_is_done(learned):
    model, variables = learned
    key = jax.random.key(1)
    free = np.asarray(generate(model, variables, left_pad(PROMPTS), NEW, key, sampling()))
    stop = int(free[0, 1])
    assert stop != free[0, 2] and stop not in free[0, :1], "or the test shows nothing"
    stopped = generate(model, variables, left_pad(PROMPTS), NEW, key, sampling(), stop)
    for row, unstopped in zip(np.asarray(stopped), free, strict=True):
        end = list(unstopped).index(stop) if stop in unstopped else NEW
        np.testing.assert_array_equal(row[:end], unstopped[:end])
        assert (row[end:] == stop).all()


def test_decoding_ends_when_all_rows_are_done(learned):
    model, variables = learned
    calls = []

    def scripted(key, logits):
        """Rows 0, 1, 2 stop at their first, second and second token."""
        jax.debug.callback(lambda: calls.append(1))
        first = (logits * 0).sum().astype(jnp.int32) + jnp.array([9, 1, 2])
        return jnp.where(jnp.all(key == jax.random.fold_in(jax.random.key(0), 0)), first, 9)

    tokens = generate(model, variables, left_pad(PROMPTS), NEW, jax.random.key(0), scripted, stop_token=9)
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens, [[9, 9, 9, 9], [1, 9, 9, 9], [2, 9, 9, 9]])
    assert len(calls) == 2


def test_left_pad():
    tokens, lengths = left_pad(PROMPTS, pad=8)
    np.testing.assert_array_equal(tokens, [[3, 1, 4, 1, 5, 9], [8, 8, 8, 8, 8, 2], [8, 8, 8, 6, 5, 3]])
    np.testing.assert_array_equal(lengths, [6, 1, 3])
    for empty in ([], [[1], []]):
        with pytest.raises(ConfigError, match="a prompt is empty"):
            left_pad(empty)


def test_padding_on_either_side_is_the_same_prompts(learned):
    """On the left, on the right, and on both; what stands in it does not matter."""
    model, variables = learned
    expected = generate(model, variables, left_pad(PROMPTS), NEW, jax.random.key(0))
    for right in (0, 1, 4):
        for pad in (0, 7):
            tokens, mask = np.full((3, 7), pad), np.zeros((3, 7), bool)
            for row, own, prompt in zip(tokens, mask, PROMPTS, strict=True):
                end = 7 - min(right, 7 - len(prompt))
                row[end - len(prompt) : end], own[end - len(prompt) : end] = prompt, True
            prompts = right_aligned(tokens, mask)
            np.testing.assert_array_equal(prompts.lengths, [6, 1, 3])
            np.testing.assert_array_equal(generate(model, variables, prompts, NEW, jax.random.key(0)), expected)
    for row in ([True, False, True], [False] * 3):
        with pytest.raises(ConfigError, match="a prompt"):
            right_aligned(np.zeros((2, 3), int), np.array([[True] * 3, row]))


def test_what_does_not_fit_is_refused(learned):
    model, variables = learned
    prompts, key = left_pad(PROMPTS), jax.random.key(0)
    with pytest.raises(ConfigError, match="6 tokens and 5 more do not fit the model's length 10; 4 more would"):
        generate(model, variables, prompts, 6, key)
    assert generate(model, variables, prompts, 5, key).shape == (3, 5), "the last one is chosen, but not read"
    with pytest.raises(ConfigError, match="only a shorter prompt would"):
        generate(model, variables, left_pad([list(range(11))]), 1, key)
    with pytest.raises(ConfigError, match="0 new tokens are too few"):
        generate(model, variables, prompts, 0, key)
    model, variables = drawn(dataclasses.replace(BASE, positions="rotary"), length=LENGTH - 1)
    assert generate(model, variables, prompts, NEW, key).shape == (3, NEW), "rotary positions know no end"


# --- processors ---------------------------------------------------------------------------------

# Slots 1 and 0 begin the rows, the prompt takes three, one more is written; 4 and 3 in later slots are no text.
TEXT = Text(jnp.array([[9, 1, 2, 1, 4, 4], [0, 2, 0, 5, 3, 3]]), jnp.array([1, 0]), 3, 4)


def test_repetition_penalty():
    """Divides positive logits of what the text holds, multiplies negative ones; no padding, nothing that is to come."""
    logits = np.random.default_rng(5).normal(size=(2, 10)).astype(np.float32)
    expected = np.float64(logits)
    for row, held in zip(expected, ({1, 2}, {0, 2, 5}), strict=True):
        for token in held:
            row[token] = row[token] / 1.5 if row[token] > 0 else row[token] * 1.5
    np.testing.assert_allclose(repetition_penalty(1.5)(TEXT, jnp.asarray(logits)), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="--repetition-penalty 0 is not above 0"):
        repetition_penalty(0.0)


def test_a_prefix_is_forced(learned):
    """The first and third new token; the model goes on as if they were its prompt's."""
    model, variables = learned
    prompts, key = left_pad(PROMPTS), jax.random.key(0)
    tokens = generate(model, variables, prompts, NEW, key, processors=(forced((16, None, 8)),))
    assert (tokens[:, 0] == 16).all() and (tokens[:, 2] == 8).all()
    rows = [[*prompt, *map(int, row[:3])] for prompt, row in zip(PROMPTS, tokens, strict=True)]
    np.testing.assert_array_equal(tokens[:, 3:], generate(model, variables, left_pad(rows), 1, key))
    rows = [[*prompt, 16] for prompt in PROMPTS]
    np.testing.assert_array_equal(tokens[:, 1:2], generate(model, variables, left_pad(rows), 1, key))


def test_the_stop_token_not_before_its_time():
    logits = jnp.ones((2, 6))
    for written, early in ((0, True), (1, True), (2, False)):
        processed = not_before(2, 5)(TEXT._replace(length=TEXT.prompt + written), logits)
        np.testing.assert_array_equal(processed, np.where((np.arange(6) == 5) & early, -np.inf, 1) * np.ones((2, 1)))


# --- samplers -----------------------------------------------------------------------------------

LOGITS = np.random.default_rng(3).normal(0, 2, size=(6, 11)).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept_top_k(logits, k):
    return set(sorted(range(len(logits)), key=lambda i: -logits[i])[:k])


def kept_top_p(logits, p):
    """Tokens in falling order until their sum is p."""
    kept, total, probabilities = set(), 0.0, softmax(np.float64(logits))
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        kept.add(i)
        total += probabilities[i]
        if total >= p:
            break
    return kept


def kept_min_p(logits, p):
    probabilities = softmax(np.float64(logits))
    return {i for i in range(len(logits)) if probabilities[i] >= p * probabilities.max()}


FILTERS = {
    "top_k": (keep_top_k, kept_top_k, [1, 3, 11, 50]),
    "top_p": (keep_top_p, kept_top_p, [1e-9, 0.3, 0.8, 0.99]),
    "min_p": (keep_min_p, kept_min_p, [0.01, 0.1, 0.5, 1.0]),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_the_definition_keeps(name):
    keep, definition, thresholds = FILTERS[name]
    for threshold in thresholds:
        filtered = np.asarray(keep(jnp.asarray(LOGITS), threshold))
        for row, logits in zip(filtered, LOGITS, strict=True):
            kept = definition(logits, threshold)
            assert set(np.flatnonzero(np.isfinite(row))) == kept
            np.testing.assert_array_equal(row[sorted(kept)], logits[sorted(kept)])
            assert (row[sorted(set(range(11)) - kept)] == -np.inf).all()


def test_a_nucleus_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8: 0.6 takes two tokens, 0.8 three or, of equals, both."""
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.125, 0.125]]))
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 0.6)), [[True, True, False, False]])
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(logits, 0.8)), [[True, True, True, True]])


SAMPLERS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "top-k": {"temperature": 1.5, "top_k": 4},
    "top-p": {"temperature": 1.5, "top_p": 0.8},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "all": {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_frequencies(name):
    """Chi-squared against the probabilities that the definitions leave, 20,000 draws."""
    options, draws = SAMPLERS[name], 20_000
    logits = np.float64(LOGITS[0]) / options.get("temperature", 1.0)
    for option, definition in (("top_k", kept_top_k), ("top_p", kept_top_p), ("min_p", kept_min_p)):
        if option in options:
            kept = definition(logits, options[option])
            logits = np.where([i in kept for i in range(11)], logits, -np.inf)
    expected = softmax(logits) * draws
    batch = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (draws, 11))
    tokens = jax.jit(sampling(**options))(jax.random.key(0), batch)
    counts = np.bincount(tokens, minlength=11)
    assert not counts[expected == 0].any()
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_greedy_takes_the_first_of_the_greatest():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    np.testing.assert_array_equal(greedy(jax.random.key(0), logits), [1, 0])
    assert sampling(temperature=0.0) is greedy
    assert distribution(temperature=0.0) is only_greatest
    np.testing.assert_array_equal(only_greatest(logits), [[-np.inf, 0, -np.inf], [0, -np.inf, -np.inf]])


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}]
)
def test_samplers_refuse_what_has_no_meaning(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} "):
        sampling(**options)
