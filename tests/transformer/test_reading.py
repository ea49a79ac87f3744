"""What an encoder with a head says of texts, against the model applied to each alone; and the command for folders."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments import pretrained
from jaxarch.data.tokenization import Subwords
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.pretrained import save_pretrained
from jaxarch.transformer.reading import classify, fill, tag

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "is"]


def tokenizer() -> Subwords:
    library = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    library.add_special_tokens(WORDS[:5])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return Subwords(library.to_str())


def drawn(head, labels=()):
    model = encoder(EncoderConfig(1, 2, 8), len(WORDS), 20, head=head, labels=labels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def alone(model, params, text: str) -> np.ndarray:
    """Probabilities from the logits of this text without any padding, in float64."""
    tokens = np.array([[2, *(WORDS.index(word) for word in text.split()), 3]], np.int32)
    logits = np.asarray(model.apply({"params": params}, tokens)[0], np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


TEXTS = ["a good film", "bad", "a film is a film is bad"]


def test_classes_of_texts():
    model, params = drawn("classes", ("no", "yes", "perhaps"))
    found = classify(model, params, tokenizer(), TEXTS, batch_size=2)
    np.testing.assert_allclose(found, [alone(model, params, text) for text in TEXTS], atol=1e-5)
    with pytest.raises(ConfigError, match="the head classes is asked for what one with the head masked_lm gives"):
        fill(model, params, tokenizer(), TEXTS)


def test_classes_of_tokens_without_the_frame():
    model, params = drawn("token_classes", ("x", "y"))
    for text, found in zip(TEXTS, tag(model, params, tokenizer(), TEXTS), strict=True):
        rows = alone(model, params, text)[1:-1]
        assert [one.token for one in found] == text.split()
        assert [one.label for one in found] == ["xy"[row.argmax()] for row in rows]
        np.testing.assert_allclose([one.probability for one in found], rows.max(-1), atol=1e-5)


def test_missing_words():
    model, params = drawn("masked_lm")
    texts = ["a [MASK] film", "[MASK] is [MASK]"]
    found = fill(model, params, tokenizer(), texts, count=2)
    assert [len(places) for places in found] == [1, 2]
    for text, places in zip(texts, found, strict=True):
        rows = alone(model, params, text)[1:-1]
        masked = [row for row, word in zip(rows, text.split(), strict=True) if word == "[MASK]"]
        for guesses, row in zip(places, masked, strict=True):
            assert [guess.token for guess in guesses] == [WORDS[number] for number in np.argsort(-row)[:2]]
            np.testing.assert_allclose([guess.probability for guess in guesses], np.sort(row)[:-3:-1], atol=1e-5)
    with pytest.raises(ConfigError, match=r"'a film' has nothing to fill in; write \[MASK\] where a word is missing"):
        fill(model, params, tokenizer(), ["a film"])


ASKED = {
    ("pooler", (), "--text a bad"): None,
    ("classes", ("no", "yes"), "--prompt a"): "a BertForSequenceClassification tells the class of each --text, not --",
    ("masked_lm", (), ""): "a BertForMaskedLM fills in [MASK] in each --text, which is missing.",
    ("masked_lm", (), "--text [MASK] --top 0"): "--top 0 is below 1.",
}


@pytest.mark.parametrize("head, labels, options", ASKED)
def test_the_command(head, labels, options, tmp_path, monkeypatch, capsys):
    save_pretrained(tmp_path / "folder", *drawn(head, labels), tokenizer())
    monkeypatch.setattr(sys, "argv", ["pretrained", str(tmp_path / "folder"), *options.split()])
    expected = ASKED[head, labels, options]
    if expected is None:
        pretrained.main()
        rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-2:]]
        assert rows[0][0] == rows[1][1] == "1.000" and rows[0][1] == rows[1][0]
        return
    with pytest.raises(SystemExit) as exit_:
        pretrained.main()
    assert exit_.value.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith(f"pretrained: {expected}")


def test_pictures_are_seen_as_the_folder_says(tmp_path):
    pixels, file = (
        np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8),
        tmp_path / "preprocessor_config.json",
    )
    np.testing.assert_allclose(pretrained.normalized(pixels, file), pixels / 127.5 - 1, atol=1e-6)
    mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    file.write_text(json.dumps({"image_mean": mean, "image_std": deviation}))
    np.testing.assert_allclose(pretrained.normalized(pixels, file), (pixels / 255 - mean) / deviation, atol=1e-6)
    file.write_text(json.dumps({"do_normalize": False}))
    np.testing.assert_allclose(pretrained.normalized(pixels, file), pixels / 255, atol=1e-6)
