"""Fine-tuning from end to end, on small random folders: what is trained, resumed, written out and refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from experiments import finetune
from jaxarch.data.tokenization import Subwords, train_bpe
from jaxarch.run import load
from jaxarch.transformer.decoder import decoder, gpt2
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.finished import restored
from jaxarch.transformer.pretrained import __main__, load_pretrained, save_pretrained
from tests.run.running import log, run

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "the", "a", "is", "was"]
VOCAB = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
STEPS = ["--steps", 6, "--batch-size", 8, "--length", 8, "--optim.warmup", 1, "--optim.learning-rate", 0.01]


def wordpiece() -> Subwords:
    """A tokeniser of BERT's kind: whole words in small letters between [CLS] and [SEP]."""
    library = Tokenizer(models.WordPiece(VOCAB, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", VOCAB["[CLS]"]), ("[SEP]", VOCAB["[SEP]"])]
    library.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return Subwords(library.to_str())


def drawn(model, seed: int):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.inputs())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BertModel with a pooler, as the MiniLM is, of two thin layers."""
    folder = tmp_path_factory.mktemp("folders") / "bert"
    model = encoder(EncoderConfig(2, 2, 16), len(VOCAB), 12, head="pooler")
    save_pretrained(folder, model, drawn(model, 0), wordpiece())
    return folder


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "gpt"
    tokenizer = train_bpe(["the good film was good and the bad film was bad. " * 3], 280)
    model = decoder(gpt2(2, 2, 16), tokenizer.vocab, 16)
    save_pretrained(folder, model, drawn(model, 1), tokenizer)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """What is said is one of four words; the rest is noise."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = ["text,label"]
    for _ in range(400):
        words = rng.choice(WORDS[4:], size=rng.integers(2, 7)).tolist()
        verdict = rng.integers(4)
        words.insert(rng.integers(len(words) + 1), WORDS[verdict])
        rows.append(f"{' '.join(words)},{'good' if verdict < 2 else 'bad'}")
    path.write_text("\n".join(rows) + "\n")
    return path


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("tune", ["full", "lora", "head"])
def test_a_run_learns_is_loaded_and_written_out(tune, bert, reviews, tmp_path, monkeypatch, capsys):
    """And what it wrote answers as the run did, though the folder that it began with is gone."""
    options = ["--pretrained", bert, "--data", reviews, "--tune", tune, *STEPS, "--steps", 60]
    folder = run(finetune, tmp_path, *options, "--lora.targets", "query", "up")
    lines = log(folder)
    assert lines[-1]["val/loss"] < lines[0]["val/loss"]
    said = capsys.readouterr().out
    state = load(folder).state
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    assert f"{trained:,} of {trained + frozen:,} parameters are trained" in said
    assert result(folder)["parameters"] == trained
    for name, before in load_pretrained(bert).params.items():
        if state.frozen is not None and name in state.frozen:
            jax.tree.map(np.testing.assert_array_equal, state.frozen[name], before)

    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["pretrained", "export", str(folder), str(out)])
    __main__.main()
    found = load_pretrained(out)
    assert found.model.labels == ("bad", "good")
    tokens, _, mask = found.tokenizer.frame(["the film was good", "bad bad plot"], 8)
    logits = jax.jit(found.model.apply)({"params": found.params}, tokens, segments=mask)
    model, params, _ = restored(folder)
    whole = state.whole(2.0)
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, whole))
    assert model.config.dropout == 0 and found.tokenizer.to_json() == wordpiece().to_json()

    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "BertForSequenceClassification" and not any(info.values()), info
    assert theirs.config.id2label == {0: "bad", 1: "good"} and theirs.config.label2id == {"bad": 0, "good": 1}
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(**inputs).logits.numpy(), logits, atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(out)
    assert reader("bad bad plot")["input_ids"] == tokens[1, :5].tolist()
