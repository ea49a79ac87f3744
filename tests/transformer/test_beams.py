from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention.cache import Cache, KeyValues, take_rows
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.beams import Beams, search
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.decoding import forced, generate, left_pad, not_before, repetition_penalty
from jaxarch.transformer.pretrained import load_pretrained

VOCAB, STOP, NEW = 4, 3, 4
PROMPTS = [[0, 2, 1], [1], [2, 2]]
CONFIG = ModelConfig(2, 2, 8, bias=True)


def drawn(config=CONFIG, vocab=VOCAB):
    model = decoder(config, vocab, 12)
    rng = np.random.default_rng(18)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.5, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def small():
    return drawn()


@pytest.fixture(scope="module")
def log_probs(small):
    """Of the next token after each of the prompts and any new tokens: `log_probs[b][new]`, a row of the vocabulary."""
    model, variables = small
    texts = list(itertools.product(range(VOCAB), repeat=NEW))
    forward = jax.jit(model.apply)
    tables = []
    for prompt in PROMPTS:
        logits = np.float64(forward(variables, np.array([[*prompt, *text] for text in texts], np.int32)))
        rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        table = {}
        for text, row in zip(texts, rows, strict=True):
            table |= {text[:count]: row[len(prompt) - 1 + count] for count in range(NEW + 1)}
        tables.append(table)
    return tables


def padded(text):
    return [*text, *[STOP] * (NEW - len(text))]


def assert_found(found, expected, returned):
    """expected: for each prompt all finished texts with their scores."""
    for tokens, scores, texts in zip(found.tokens, found.scores, expected, strict=True):
        best = sorted(texts, key=texts.get, reverse=True)[:returned]
        np.testing.assert_allclose(scores[: len(best)], [texts[text] for text in best], rtol=1e-5)
        np.testing.assert_array_equal(tokens[: len(best)], [padded(text) for text in best])
        assert (np.asarray(scores[len(best) :]) == -np.inf).all()


# --- against all texts, and against the search in plain Python ------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_a_beam_wide_enough_finds_the_best_of_all_texts(length_penalty, small, log_probs):
    """All texts of up to four tokens, of which the fourth is the stop token in 3 + 9 + 27 and 81 do not stop."""
    everything = []
    for table in log_probs:
        scores = {}
        for text in itertools.product(range(VOCAB), repeat=NEW):
            text = text[: text.index(STOP) + 1] if STOP in text else text
            total = sum(table[text[:count]][token] for count, token in enumerate(text))
            scores[text] = total / len(text) ** length_penalty
        everything.append(scores)
    assert len(everything[0]) == 1 + 3 + 9 + 27 + 81
    beams = Beams(121, 121, length_penalty, early_stopping="never")
    assert_found(search(*small, left_pad(PROMPTS), NEW, beams, STOP), everything, 121)


def searched(table, width, penalty, early):
    """Beam search by its definition; the scores of finished texts, the best `width` of them."""
    beams, finished = {(): 0.0}, {}
    for length in range(1, NEW + 1):
        weighed = {(*text, token): beams[text] + table[text][token] for text in beams for token in range(VOCAB)}
        ranked = sorted(weighed, key=weighed.get, reverse=True)
        beams = {}
        for rank, text in enumerate(ranked[: 2 * width]):
            if text[-1] == STOP or length == NEW:
                if rank < width:
                    finished[text] = weighed[text] / length**penalty
            elif len(beams) < width:
                beams[text] = weighed[text]
        finished = dict(sorted(finished.items(), key=lambda item: item[1], reverse=True)[:width])
        if not beams:
            break
        if len(finished) == width:
            reached = NEW if early == "never" and penalty > 0 else length
            if early is True or max(beams.values()) / reached**penalty <= min(finished.values()):
                break
    return finished


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_narrow_beams_follow_the_definition(early, length_penalty, small, log_probs):
    for width in (2, 3):
        expected = [searched(table, width, length_penalty, early) for table in log_probs]
        found = search(*small, left_pad(PROMPTS), NEW, Beams(width, width, length_penalty, early), STOP)
        assert_found(found, expected, width)


def test_the_meanings_of_early_stopping_differ_here(log_probs):
    """Or the tests above could not tell them apart."""
    results = [[searched(table, 2, 1.0, early) for table in log_probs] for early in (True, False, "never")]
    assert results[0] != results[1] != results[2]


# --- laws ---------------------------------------------------------------------------------------


def test_one_beam_is_greedy():
    model, variables = drawn(vocab=17)
    prompts = left_pad([[3, 1, 4, 1], [2], [6, 5, 3]])
    processors = (forced((None, 5)), not_before(3, 7))
    for options in ((7, ()), (None, ()), (7, processors)):
        found = search(model, variables, prompts, 6, Beams(1), *options)
        greedily = generate(
            model, variables, prompts, 6, jax.random.key(0), stop_token=options[0], processors=options[1]
        )
        np.testing.assert_array_equal(found.tokens[:, 0], greedily)


def test_a_prompt_is_searched_alike_alone_and_in_any_batch(small):
    beams = Beams(3, 3)
    together = search(*small, left_pad(PROMPTS, pad=1), NEW, beams, STOP)
    for number, prompt in enumerate(PROMPTS):
        alone = search(*small, left_pad([prompt]), NEW, beams, STOP)
        np.testing.assert_array_equal(together.tokens[number], alone.tokens[0])
        np.testing.assert_allclose(together.scores[number], alone.scores[0], rtol=1e-5)


def test_scanned_layers_and_a_cache_that_grows_change_nothing(small, monkeypatch):
    _, variables = small
    expected = search(*small, left_pad(PROMPTS), NEW, Beams(3, 3), STOP)
    from jaxarch.transformer import beams, decoding
    from jaxarch.transformer.blocks import stack_layers

    monkeypatch.setattr(decoding, "LEAST_STAGE", 1)
    beams._program.cache_clear()
    scanned = decoder(dataclasses.replace(CONFIG, scan_layers=True), VOCAB, 12)
    found = search(scanned, {"params": stack_layers(variables["params"])}, left_pad(PROMPTS), NEW, Beams(3, 3), STOP)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize("layers", [(), (3,)], ids=["unrolled", "scanned"])
def test_rows_of_a_cache(layers):
    """Also with an encoder's keys and values, whose sequences have numbers."""
    rng = np.random.default_rng(0)

    def entry(slots):
        return KeyValues(*(jnp.asarray(rng.normal(size=(*layers, 4, 2, slots, 5))) for _ in range(2)))

    def entries(slots):
        return entry(slots) if layers else (entry(slots), entry(slots))

    cache = Cache(entries(6), jnp.int32(3), jnp.arange(4), entries(7), jnp.asarray(rng.integers(0, 2, (4, 7))))
    rows = [2, 2, 0, 3, 1]
    taken = take_rows(cache, jnp.array(rows))
    assert taken.index == 3
    np.testing.assert_array_equal(taken.start, rows)
    np.testing.assert_array_equal(taken.memory_segments, np.asarray(cache.memory_segments)[rows])
    for kept, all_rows in zip(jax.tree.leaves(taken), jax.tree.leaves(cache), strict=True):
        if kept.ndim > 2:
            np.testing.assert_array_equal(
                kept, np.stack([np.asarray(all_rows)[..., r, :, :, :] for r in rows], axis=-4)
            )


def test_beams_refuse_what_has_no_meaning(small):
    with pytest.raises(ConfigError, match="--beams 0 is below 1"):
        Beams(0)
    with pytest.raises(ConfigError, match="--beams 2 cannot return 3 texts"):
        Beams(2, 3)
    with pytest.raises(ConfigError, match="do not fit the model's length 12"):
        search(*small, left_pad(PROMPTS), 11)


# --- parity -------------------------------------------------------------------------------------


def test_transformers_finds_the_same(tmp_path):
    """Texts and scores of `generate(num_beams=...)`, prompts padded on the left."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    sizes = {"vocab_size": 13, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 0.25}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=5)).eval()
    theirs.save_pretrained(tmp_path)
    found = load_pretrained(tmp_path)
    prompts = left_pad([[3, 1, 4, 1], [2], [6, 11, 3]], pad=5)
    slots = np.arange(prompts.tokens.shape[1])
    inputs = {
        "input_ids": torch.tensor(np.asarray(prompts.tokens)).long(),
        "attention_mask": torch.tensor(slots >= slots.size - np.asarray(prompts.lengths)[:, None]).long(),
    }
    lengths = set()
    for early, penalty, repetition, least in (
        (False, 1.0, 1.0, 0),
        (True, 1.0, 1.0, 0),
        ("never", 2.0, 1.0, 0),
        (False, -1.0, 1.0, 2),
        (True, 0.0, 1.7, 0),
    ):
        with torch.no_grad():
            expected = theirs.generate(
                **inputs,
                num_beams=4,
                num_return_sequences=3,
                max_new_tokens=8,
                min_new_tokens=least or None,
                early_stopping=early,
                length_penalty=penalty,
                repetition_penalty=repetition,
                pad_token_id=5,
                return_dict_in_generate=True,
                output_scores=True,
            )
        processors = (repetition_penalty(repetition),) if repetition != 1 else ()
        processors += (not_before(least, 5),) if least else ()
        ours = search(found.model, {"params": found.params}, prompts, 8, Beams(4, 3, penalty, early), 5, processors)
        new = expected.sequences.numpy()[:, slots.size :].reshape(3, 3, -1)
        np.testing.assert_array_equal(ours.tokens[..., : new.shape[-1]], new)
        assert (np.asarray(ours.tokens[..., new.shape[-1] :]) == 5).all()
        np.testing.assert_allclose(ours.scores.reshape(-1), expected.sequences_scores.numpy(), rtol=1e-4)
        lengths |= {int((row != 5).sum()) for row in new.reshape(9, -1)}
    assert len(lengths) > 3, "or the lengths' penalty was not tried"
