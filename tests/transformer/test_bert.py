"""BERT in and out. record_bert.py makes the recorded values, and the live models where it can."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.pretrained import load_pretrained, save_pretrained
from tests.transformer.record_bert import (
    LENGTH,
    MASK,
    PLACE,
    TOKENS,
    TYPES,
    VARIANTS,
    VOCAB,
    answers,
    published,
)

FILE = "model.safetensors"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """By the variant's name: its folder, as transformers wrote it, and its outputs."""

    def folder_and_outputs(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        with safe_open(PLACE / f"{name}.safetensors", framework="np") as file:
            config = file.metadata()["config"]
        tensors = load_file(PLACE / f"{name}.safetensors")
        out = {key.removeprefix("out."): tensors.pop(key) for key in [key for key in tensors if key.startswith("out.")]}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text(config)
        return folder, out

    return folder_and_outputs


def applied(model: Any, params: Any) -> dict[str, jax.Array]:
    out = model.apply({"params": params}, TOKENS, TYPES, MASK)
    return {"logits": out} if not isinstance(out, tuple) else {k: v for k, v in out._asdict().items() if v is not None}


def assert_outputs(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Where a token is no padding; relative to the largest."""
    assert actual.keys() == expected.keys()
    for name, own in actual.items():
        other, each = np.asarray(expected[name]), name == "hidden" or np.ndim(own) == 3
        own, other = (np.asarray(x)[MASK == 1] if each else x for x in (own, other))
        np.testing.assert_allclose(own, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name)


def assert_same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / FILE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_the_recorded_ones_and_the_tensors_come_back(name, recorded, tmp_path):
    folder, out = recorded(name)
    found = load_pretrained(folder)
    assert_outputs(jax.jit(partial(applied, found.model))(found.params), out, 3e-6)
    save_pretrained(tmp_path / "saved", *found)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))
    again = load_pretrained(tmp_path / "saved")
    assert again.model.config == found.model.config
    assert (again.model.head, again.model.labels) == (found.model.head, found.model.labels)
    if name == "bert_classes":
        assert found.model.labels == ("bad", "so-so", "good")
        assert again.config["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_agrees(name, tmp_path):
    """Live: outputs, gradients, and what it reads of what is written here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = published(name)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs")
    expected = answers(theirs)
    each = {k: torch.tensor(MASK[..., None]) if v.ndim == 3 else torch.ones(()) for k, v in expected.items()}
    sum((value * each[key]).square().mean() for key, value in expected.items()).backward()

    @jax.jit
    @lambda f: jax.value_and_grad(f, has_aux=True)
    def loss(params):
        out = applied(found.model, params)
        return sum(jnp.square(v * each[k].numpy()).mean() for k, v in out.items()), out

    (_, out), grads = loss(found.params)
    assert_outputs(out, {key: value.detach().numpy() for key, value in expected.items()}, 1e-5)

    # The gradients have the parameters' shapes, so they are written under the parameters' names.
    save_pretrained(tmp_path / "gradients", found.model, grads)
    written = load_file(tmp_path / "gradients" / FILE)
    wanted = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert written.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for key, gradient in written.items():  # one near 0, as all key biases' are, is rounding errors alone
        close = max(1e-4 * np.abs(wanted[key]).max(), 1e-7 * largest)
        np.testing.assert_allclose(gradient, wanted[key], rtol=0, atol=close, err_msg=key)

    save_pretrained(tmp_path / "ours", *found)
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert back.config.id2label == theirs.config.id2label and back.config.problem_type == theirs.config.problem_type
    for key, parameter in theirs.named_parameters():
        assert torch.equal(dict(back.named_parameters())[key], parameter), key
    with torch.no_grad():
        assert_outputs(
            {key: value.numpy() for key, value in answers(back).items()},
            {key: value.detach().numpy() for key, value in expected.items()},
            1e-6,
        )
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").hidden_act == theirs.config.hidden_act


# --- heads and forms of a folder ----------------------------------------------------------------


def test_a_body_becomes_a_classifier(recorded, caplog, tmp_path):
    """Its head is new and said to be; body and pooler are the folder's."""
    folder, _ = recorded("bert")
    whole = load_pretrained(folder)
    found = load_pretrained(
        folder, architecture="BertForSequenceClassification", overrides={"num_labels": 3}, key=jax.random.key(1)
    )
    new = "classifier.weight, classifier.bias"
    assert caplog.messages == [f"{folder}, read as a BertForSequenceClassification: {new} are new."]
    assert found.model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    jax.tree.map(
        np.testing.assert_array_equal, {k: v for k, v in found.params.items() if k in whole.params}, whole.params
    )
    kernel = found.params["classifier"]["kernel"]
    assert kernel.shape == (16, 3) and np.asarray(kernel).std() > 0.01
    save_pretrained(tmp_path / "saved", *found)
    assert load_pretrained(tmp_path / "saved").model.labels == found.model.labels
    named = encoder(found.model.config, VOCAB, LENGTH, head="classes", labels=("no", "so-so", "yes"))
    save_pretrained(tmp_path / "named", named, found.params)
    assert load_pretrained(tmp_path / "named").model.labels == ("no", "so-so", "yes")


def test_a_masked_lm_becomes_a_body_without_a_pooler(recorded, caplog):
    folder, _ = recorded("bert_masked_lm")
    found = load_pretrained(folder, architecture="BertModel", overrides={"pooler": False})
    assert "are left out" in caplog.text and "are new" not in caplog.text and found.model.head == "none"
    assert jax.eval_shape(found.model.apply, {"params": found.params}, TOKENS).pooled is None
    caplog.clear()
    assert load_pretrained(folder, architecture="BertModel").model.head == "pooler"
    assert "bert.pooler.dense.weight, bert.pooler.dense.bias are new" in caplog.text


def test_a_body_without_a_pooler(recorded, tmp_path):
    """It says so in its config.json, as far as this library is concerned."""
    folder, out = recorded("bert")
    rewritten(folder, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("pooler.")})
    with pytest.raises(ConfigError, match=r"the tensor bert\.pooler\.dense\.weight is missing"):
        load_pretrained(folder)
    found = load_pretrained(folder, overrides={"pooler": False})
    assert_outputs(jax.jit(partial(applied, found.model))(found.params), {"hidden": out["hidden"]}, 3e-6)
    save_pretrained(tmp_path / "saved", *found)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))
    assert load_pretrained(tmp_path / "saved").model.head == "none"
    transformers = pytest.importorskip("transformers")
    _, info = transformers.BertModel.from_pretrained(
        tmp_path / "saved", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info.values()), info


def test_names_of_the_first_published_folders(recorded):
    """gamma and beta; numbers of positions; the read-out twice; what a masked LM does not read of pretraining."""
    folder, out = recorded("bert_masked_lm")
    more = {
        "bert.embeddings.position_ids": np.arange(LENGTH)[None],
        "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
        "bert.pooler.dense.bias": np.ones(16, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 16), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    rewritten(
        folder,
        lambda tensors: (
            {
                name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                for name, t in tensors.items()
            }
            | {
                "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
                "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
            }
            | more
        ),
    )
    found = load_pretrained(folder)
    assert_outputs(jax.jit(partial(applied, found.model))(found.params), out, 3e-6)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("bert", {"architectures": ["BertForPreTraining"]}, "the architecture BertForPreTraining is not supported"),
        ("bert", {"hidden_act": "swoosh"}, "hidden_act swoosh cannot be expressed here, only gelu or "),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type relative_key cannot be"),
        ("bert", {"is_decoder": True}, "is_decoder True cannot be expressed here, only False."),
        ("bert", {"add_cross_attention": True}, "add_cross_attention True cannot be expressed here, only False."),
        ("bert", {"type_vocab_size": 0}, "--model.types 0 is below 1."),
        ("bert", {"num_attention_heads": 5}, "--model.heads 5 does not divide --model.dim 16; 4 would."),
        ("bert_masked_lm", {"tie_word_embeddings": False}, "tie_word_embeddings False cannot be expressed here"),
        ("bert_classes", {"id2label": ["good"]}, "id2label is ['good'], not an object of names by number."),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_one_clear_line(name, changes, message, recorded):
    folder, _ = recorded(name)
    with pytest.raises(ConfigError) as error:
        load_pretrained(configured(folder, **changes))
    assert str(error.value).startswith(f"{folder}/config.json: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, option", [({"placement": "pre"}, "placement pre"), ({"positions": "rotary"}, "positions rotary")]
)
def test_an_encoder_that_is_no_bert_is_refused(fields, option, tmp_path):
    model = encoder(EncoderConfig(1, 2, 8, **fields), VOCAB, LENGTH)
    with pytest.raises(ConfigError, match=re.escape(f"against BERT stands --model.{option}.")):
        save_pretrained(tmp_path / "a", model, {})
