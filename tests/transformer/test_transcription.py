"""Text of a sound. That the tokens are those of `transformers` is tested with its folders."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Library

from jaxarch.data.audio import resampled, spoken
from jaxarch.data.tokenization import Bytes, Characters, Subwords
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.spectrogram import RATE, fitted, log_mel
from jaxarch.transformer.speech import SpeechConfig, whisper
from jaxarch.transformer.transcription import Markers, heard_language, named_markers, transcribe, windows, written

LENGTH, SOURCE, WINDOW = 14, 10, 3200
CONFIG = SpeechConfig(layers=1, heads=2, dim=16, decoder_layers=1, decoder_heads=2, bands=8, readout="free")
MODEL = whisper(CONFIG, 24, LENGTH, SOURCE)
LETTERS = Characters("abcdefghijklmnop")  # tokens 0 to 15
MARKERS = Markers(
    17, 16, (("en", 18), ("de", 19)), (("translate", 20), ("transcribe", 21)), 22, (0, *range(17, 24)), (1, 16)
)
RNG = np.random.default_rng(10)  # whose model hears both languages and ends early in some rows
SOUND = RNG.normal(0, 0.1, 10_000).astype(np.float32) * np.repeat(RNG.random(100), 100).astype(np.float32)


def changing_sound() -> np.ndarray:
    """Noise alone, then a rising tone besides: the windows are heard as of different languages."""
    rng, n = np.random.default_rng(24), np.arange(10_000)
    tone = np.sin(n * rng.uniform(0.02, 2) + n * n * rng.uniform(0, 1e-4)) * rng.uniform(0, 1) * (n > 5000)
    return (tone + rng.normal(0, 0.1, 10_000) * np.repeat(rng.random(100), 100)).astype(np.float32)


AFTER_SOUND = RNG.bit_generator.state


@pytest.fixture(scope="module")
def drawn() -> tuple[dict, jax.Array]:
    """Parameters and features, the same ones each time that the fixture is made."""
    rng = np.random.default_rng()
    rng.bit_generator.state = AFTER_SOUND
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *MODEL.inputs())["params"]

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        middle, spread = {"scale": (1, 0.3), "bias": (0, 0.3)}.get(path[-1].key, (0, 0.8))
        return jnp.asarray(rng.normal(middle, spread, leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return params, jnp.asarray(rng.normal(size=(5, 2 * SOURCE, 8)), jnp.float32)


@pytest.fixture(scope="module")
def params(drawn) -> dict:
    return drawn[0]


@pytest.fixture(scope="module")
def memory(drawn) -> jax.Array:
    params, features = drawn
    return jax.jit(lambda features: MODEL.apply({"params": params}, features, method="encode"))(features)


def whole(params, memory, tokens) -> np.ndarray:
    """Logits after all the tokens, without a cache; the tokens are padded, as none sees a later one."""
    padded = np.pad(tokens, [(0, 0), (0, LENGTH - tokens.shape[1])])
    return np.array(decode(params, memory, jnp.asarray(padded)))[:, tokens.shape[1] - 1]


decode = jax.jit(lambda params, memory, tokens: MODEL.apply({"params": params}, tokens, memory, method="decode"))


def test_the_most_probable_tokens_that_are_not_suppressed(params, memory):
    prefix = MARKERS.prefix("de", "transcribe")
    assert prefix == (17, 19, 21, 22)
    found = np.asarray(written(MODEL, {"params": params}, memory, prefix, 10, MARKERS))
    tokens, done = np.tile(np.array(prefix, np.int32), (5, 1)), np.zeros(5, bool)
    for number in range(10):
        logits = whole(params, memory, tokens)
        logits[:, list(MARKERS.suppressed)] = -np.inf
        if number == 0:
            logits[:, list(MARKERS.suppressed_first)] = -np.inf
        best = np.where(done, 16, logits.argmax(axis=1))
        done |= best == 16
        tokens = np.concatenate([tokens, best[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(found, tokens[:, 4:])
    lengths = np.where(found == 16, 0, 1).sum(axis=1)
    assert 0 < lengths.min() < 10 and len({*found[:, 0]}) > 1  # else the test would show little


def test_the_language_that_is_heard(params, memory):
    start = np.full((5, 1), 17, np.int32)
    logits = whole(params, memory, start)
    expected = ["de" if de > en else "en" for en, de in logits[:, [18, 19]]]
    assert heard_language(MODEL, {"params": params}, memory, MARKERS) == expected and len({*expected}) == 2


def test_the_prefix_says_what_is_wanted():
    assert MARKERS.prefix("en", "translate") == (17, 18, 20, 22)
    assert MARKERS.prefix(None, "transcribe") == (17, 21, 22)
    english = Markers(17, 16, no_timestamps=22)
    assert english.prefix(None, "transcribe") == (17, 22)
    assert Markers(17, 16).prefix(None, "transcribe") == (17,)
    with pytest.raises(ConfigError, match="the model does not know the language fr; it knows en, de."):
        MARKERS.prefix("fr", "transcribe")
    with pytest.raises(ConfigError, match="the model does not know the task sing; it knows translate, transcribe."):
        MARKERS.prefix("en", "sing")
    with pytest.raises(ConfigError, match="the model does not know the language en; it knows none."):
        english.prefix("en", "transcribe")
    with pytest.raises(ConfigError, match="the model knows no tasks; it can transcribe, but not translate."):
        english.prefix(None, "translate")


def test_markers_by_their_names():
    library = Library(models.WordLevel({"a": 0, "b": 1}, "a"))
    names = ["endoftext", "startoftranscript", "en", "haw", "translate", "transcribe"]
    names += ["nospeech", "notimestamps", "0.00"]
    library.add_special_tokens([AddedToken(f"<|{name}|>") for name in names])
    languages, tasks = (("en", 4), ("haw", 5)), (("transcribe", 7), ("translate", 6))
    assert named_markers(Subwords(library.to_str())) == Markers(3, 2, languages, tasks, 9)
    with pytest.raises(ConfigError, match="the tokeniser has no <|startoftranscript|>"):
        named_markers(Bytes())


def test_windows_end_where_it_is_quiet():
    """Of 600 samples: the last 100 are searched in blocks of 2."""
    sound = np.ones(1500, np.float32)
    sound[530:534] = 0.1  # quiet from 530 to 534, quietest from 532 on
    sound[532:534] = 0
    sound[1000:1100] = 0  # searched from 1033 to 1133; of equals the last: from 1097 on
    assert windows(sound, 600) == [(0, 533), (533, 1098), (1098, 1500)]
    assert windows(sound[:600], 600) == [(0, 600)]
    assert windows(sound[:0], 600) == [(0, 0)]
    for count in 601, 5000:
        noise = np.random.default_rng(0).normal(size=count).astype(np.float32)
        spans = windows(noise, 600)
        assert spans[0][0] == 0 and spans[-1][1] == count and 0 < spans[-1][1] - spans[-1][0] <= 600
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(500 <= end - begin <= 600 for begin, end in spans[:-1])


def test_a_long_sound_is_the_text_of_its_windows(params):
    """Each window by itself, whatever the size of the batch; markers and what follows the end are left out."""
    sound = changing_sound()
    variables, spans = {"params": params}, windows(sound, WINDOW)
    assert len(spans) == 4
    texts, heard = [], []
    for begin, end in spans:
        features = log_mel(fitted(sound[begin:end], WINDOW), 8)[None]
        memory = jax.jit(lambda features: MODEL.apply(variables, features, method="encode"))(features)
        heard += heard_language(MODEL, variables, memory, MARKERS)
        tokens = np.asarray(written(MODEL, variables, memory, MARKERS.prefix(heard[0], "transcribe"), 7, MARKERS))[0]
        texts.append("".join(LETTERS.characters[token] for token in tokens if token < 16))
    assert heard[0] != heard[2]
    for batch in 1, 3:
        found = transcribe(MODEL, params, LETTERS, sound, MARKERS, batch=batch)
        assert found.language == heard[0] and found.text == "".join(texts)
        assert found.parts == tuple((b / RATE, e / RATE, text) for (b, e), text in zip(spans, texts, strict=True))
    other = transcribe(MODEL, params, LETTERS, sound, MARKERS, "en" if heard[0] == "de" else "de", batch=3)
    assert other.language != heard[0] and other.text != found.text
    assert transcribe(MODEL, params, LETTERS, sound, MARKERS, task="translate", batch=3).text != found.text


def test_what_does_not_fit(params):
    for options, message in (
        ({"new_tokens": 12}, "a prefix of 4 tokens and 12 new ones do not fit the model's length 14; 11 would."),
        ({"new_tokens": -1}, "-1 new tokens are too few; ask for 1 at least."),
    ):
        with pytest.raises(ConfigError) as caught:
            transcribe(MODEL, params, LETTERS, SOUND, MARKERS, **options)
        assert str(caught.value) == message


def test_a_spoken_sentence(params):
    """The whole way from words to words, though a model without training hears others."""
    pytest.importorskip("espeakng_loader")
    sound = resampled(*spoken("one two three"), RATE)
    found = transcribe(MODEL, params, LETTERS, sound, MARKERS, language="en")
    assert len(found.parts) > 1 and found.text and abs(found.parts[-1].end - len(sound) / RATE) < 1e-9
