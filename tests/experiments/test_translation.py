"""Translation from end to end, small: a run resumed, what it writes, its objective by hand, its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import translation
from jaxarch.data.pairs import Pairs, load_pairs
from jaxarch.run import ConfigError, load
from jaxarch.run.program import Member
from jaxarch.transformer.beams import Beams
from jaxarch.transformer.encoder_decoder import EncoderDecoderConfig, encoder_decoder
from jaxarch.transformer.training import OptimConfig, cross_entropy
from tests.run.running import after, assert_same, exit_code, log, run

TINY = ["--model.layers", 1, "--model.heads", 2, "--model.dim", 8, "--batch-size", 4]
MODEL = EncoderDecoderConfig(1, heads=2, dim=8)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A cipher: each letter becomes the next one of the alphabet."""
    rng = np.random.default_rng(0)
    words = {"".join(rng.choice(list("abcde"), rng.integers(1, 5))) for _ in range(200)}
    path = tmp_path / "pairs.tsv"
    lines = (f"{word}\t{''.join(chr(ord(letter) + 1) for letter in word)}\n" for word in sorted(words))
    path.write_text("".join(lines))
    return path


def test_stopped_and_resumed_is_uninterrupted_and_what_it_reports(pairs, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    options = [*TINY, "--data", pairs, "--steps", 6, "--eval-every", 3, "--model.dropout", 0.2]
    whole = run(translation, tmp_path, *options, name="whole")
    run(translation, tmp_path, *options, "--stop-at", 3, name="parts")
    assert_same(whole, run(translation, tmp_path, "--resume", name="parts"))
    lines = [line.split("\t") for line in (whole / "samples/0000006/translations.tsv").read_text().splitlines()]
    data = load_pairs(str(pairs))
    assert lines[0] == ["source", "reference", "translation"]
    assert [tuple(line[:2]) for line in lines[1:]] == data.texts
    assert (whole / "samples/0000006/attention.png").read_bytes().startswith(b"\x89PNG")
    last = log(whole)[-1]
    exact = np.mean([line[1] == line[2] for line in lines[1:]])
    assert last["val/exact_match"] == pytest.approx(exact) and {"val/loss", "val/bleu", "val/chrf"} < last.keys()
    # What is written is what the saved parameters say, some pairs at a time too, the last of which are filled up.
    monkeypatch.setattr(translation, "ROWS", 5)
    state = load(whole).state
    model = encoder_decoder(MODEL, data.vocab, (data.validation.source.shape[1], data.validation.targets.shape[1]))
    source = np.asarray(data.validation.source)
    assert len(source) % 5
    found = translation.translations(model, {"params": state.evaluated}, data, source, Beams(1))
    assert [data.text(row) for row in found] == [line[2] for line in lines[1:]]


def test_the_words_of_a_language_may_need_a_package(monkeypatch):
    """The library says so by another kind of error than an import's."""
    metrics = pytest.importorskip("sacrebleu.metrics")

    def missing(tokenize):
        raise RuntimeError(tokenize)

    monkeypatch.setattr(metrics, "BLEU", missing)
    with pytest.raises(ConfigError, match=r"--bleu ja-mecab needs another package: pip install 'sacrebleu\[ja\]'"):
        translation.scoring("ja-mecab")


def test_the_objective_by_hand():
    """Of two pairs, in numpy: each target's own logarithm, and a tenth of the mean of all; padding counts nothing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    source = np.array([[1, 2, 4, 0], [1, 4, 0, 0]], np.int32)
    targets = np.array([[1, 2, 4], [3, 4, 0]], np.int32)
    weights = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    seen = {}

    class Model:
        def apply(self, variables, source, inputs, segments, deterministic, rngs):
            seen.update(segments=segments, deterministic=deterministic, rngs=rngs, inputs=inputs)
            return jnp.asarray(logits)

    batch = Pairs(source, targets, targets, weights)
    total, weight = translation.smoothed(Model(), 0, 0.1)({}, batch, jax.random.key(0))  # pyright: ignore
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    own = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    expected = -((0.9 * own + 0.1 * log_p.mean(-1)) * weights).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 5 and seen["deterministic"] is False and seen["rngs"] is not None
    np.testing.assert_array_equal(seen["segments"], [[1, 1, 1, 0], [1, 1, 0, 0]])
    plain, _ = translation.smoothed(Model(), 0, 0.0)({}, batch, jax.random.key(0))  # pyright: ignore
    np.testing.assert_allclose(plain, cross_entropy(jnp.asarray(logits), targets, weights), rtol=1e-6)


def test_scores_by_hand():
    """BLEU of 4-grams and chrF of 6-grams of what is all right, all wrong, and one letter off."""
    pytest.importorskip("sacrebleu")
    scores = translation.scoring("char")
    assert scores(["eins", "zwei"], ["eins", "zwei"]) == {"val/exact_match": 1, "val/bleu": 100, "val/chrf": 100}
    wrong = scores(["xxxxxx", "yyyyyy"], ["eins", "zwei"])
    assert wrong["val/exact_match"] == 0 and wrong["val/chrf"] == 0
    np.testing.assert_array_less(wrong["val/bleu"], 10)
    # abcde for abcdf: 4/5, 3/4, 2/3 and 1/2 of the n-grams are right.
    close = scores(["abcde"], ["abcdf"])
    assert close["val/exact_match"] == 0
    np.testing.assert_allclose(close["val/bleu"], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, rtol=1e-4)
    # Precision and recall are the same, and of n-grams of 1 to 5: 4/5, 3/4, 2/3, 1/2 and 0.
    np.testing.assert_allclose(close["val/chrf"], 100 * np.mean([4 / 5, 3 / 4, 2 / 3, 1 / 2, 0]), rtol=1e-4)


def test_the_labels_of_the_picture_end_where_the_text_does(pairs):
    data = load_pairs(str(pairs))
    a, b = data.tokenizer.encode("ab")
    pad, begin, end = data.specials
    assert translation._labels(data, np.array([a, b, end, a, pad])) == ["a", "b", "end"]
    assert translation._labels(data, np.array([a, begin, b])) == ["a", "", "b"]


@pytest.mark.slow
def test_a_cipher_is_learned(pairs):
    """And by the loss of held-out pairs, not of those learned from."""
    pytest.importorskip("sacrebleu")
    model = EncoderDecoderConfig(1, heads=2, dim=32, positions="learned")
    optim = OptimConfig(optimizer="muon", learning_rate=3e-3, warmup=10)
    experiment = translation.experiment(
        translation.Config(str(pairs), steps=200, batch_size=16, model=model, optim=optim)
    )
    programs, carry = after(experiment, [Member(0, {})], 200)
    accuracy = programs.evaluate(carry.state, 200)["val/accuracy"]
    assert accuracy.total / accuracy.weight > 0.9  # pyright: ignore


def test_a_package_that_is_not_there_is_named_with_its_extra(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert exit_code(translation, "--data", pairs, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert "is not installed; it comes with the extra: pip install 'jaxarch[data]'." in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoothing", 1], "translation: --smoothing 1 is not in [0, 1); 0.1 is usual."),
        (["--beams", 0], "translation: --beams 0 is below 1; 4 is usual."),
        (["--length-penalty", 0.5], "translation: --length-penalty is of --beams 2 and more"),
        (["--steps", 0], "translation: --steps 0 is below 1."),
        (["--held-out", 0], "translation: --held-out 0 is below 1."),
        (["--optim.accumulate", 5], "translation: --optim.accumulate 5 does not divide --batch-size 64."),
        (["--data-seed", -1], "translation: --data-seed -1 is below 0."),
        (["--data", "no.tsv"], "translation: --data no.tsv does not exist;"),
        (["--data", "a.txt", "--target", "b.txt"], "translation: a.txt line 2 has no partner: b.txt ends with line 1;"),
    ],
)
def test_usage(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\ntwo\n")
    Path("b.txt").write_text("eins\n")
    assert exit_code(translation, *arguments, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_presets_are_configurations_that_can_be_built():
    for config in translation.PRESETS.values():
        model = encoder_decoder(config.model, 100, (8, 8))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())
        assert jax.tree.leaves(shapes)


@pytest.mark.slow
def test_numbers_become_words(tmp_path):
    """The default in a fifth of its steps and no more pairs than those: most letters are right."""
    pytest.importorskip("num2words")
    pytest.importorskip("sacrebleu")
    folder = run(translation, tmp_path, "--steps", 200, "--held-out", 200, "--eval-every", 200)
    result = json.loads((folder / "result.json").read_text())
    assert result["val/chrf"] > 80
