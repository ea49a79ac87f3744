"""T5 in and out. record_t5.py makes the recorded values, and the live models where it can."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.encoder_decoder import EncoderDecoderConfig, encoder_decoder, t5_v1_1
from jaxarch.transformer.pretrained import Pretrained, load_pretrained, save_pretrained
from jaxarch.transformer.pretrained.t5 import specials
from tests.transformer.record_t5 import MASK, PLACE, RECORDED, SOURCE, TOKENS, VARIANTS, VOCAB, answer, published

FILE = "model.safetensors"
Recorded = Callable[[str], tuple[Path, np.ndarray]]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """By the variant's name: its folder, as transformers wrote it, and its answer."""

    def folder_and_answer(name: str) -> tuple[Path, np.ndarray]:
        with safe_open(PLACE / f"{name}.safetensors", framework="np") as file:
            config = file.metadata()["config"]
        tensors = load_file(PLACE / f"{name}.safetensors")
        for key, value in (("source", SOURCE), ("mask", MASK), ("tokens", TOKENS)):
            np.testing.assert_array_equal(tensors.pop(key), value)
        values = tensors.pop("answer")
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text(config)
        return folder, values

    return folder_and_answer


def changed(folder: Path, **changes: Any) -> Path:
    """A change of config.json; `...` takes the entry away."""
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def inputs(found: Pretrained) -> tuple[np.ndarray, ...]:
    return (SOURCE, MASK) if type(found.model).__name__ == "Encoder" else (SOURCE, TOKENS, MASK)


PROGRAMS: dict[Any, Any] = {}  # compiled once for all models that are alike


def applied(found: Pretrained) -> jax.Array:
    program = PROGRAMS.setdefault((type(found.model), found.model.config), jax.jit(found.model.apply))
    return program({"params": found.params}, *inputs(found))


def assert_relative(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_answers_are_the_recorded_ones_and_the_tensors_come_back(name, recorded, tmp_path):
    folder, expected = recorded(name)
    found = load_pretrained(folder)
    assert found.model.vocab == VOCAB
    # What stands in padding is no answer of the encoder's; the decoder does not see it.
    seen = MASK.astype(bool) if name == "t5_encoder" else np.ones(TOKENS.shape, bool)
    assert_relative(np.asarray(applied(found))[seen], expected[seen], 3e-6)
    save_pretrained(tmp_path / "saved", *found)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))
    again = load_pretrained(tmp_path / "saved")
    assert again.model.config == found.model.config and type(again.model) is type(found.model)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    assert specials(again.config) == specials(found.config) == (0, 0, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_agrees(name, tmp_path):
    """Live: answers, gradients, and what it reads of what is written here."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = published(name)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs")
    seen = MASK[..., None] if name == "t5_encoder" else 1

    def loss(params):
        answer = found.model.apply({"params": params}, *inputs(found))
        return jnp.square(answer * seen).mean(), answer

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(found.params)
    expected = answer(theirs)
    (expected * torch.tensor(seen)).square().mean().backward()
    expected = expected.detach().numpy()
    assert_relative(ours * seen, expected * seen, 1e-5)

    # The gradients have the parameters' shapes, so they are written under the parameters' names.
    save_pretrained(tmp_path / "gradients", found.model, grads, None)
    written = load_file(tmp_path / "gradients" / FILE)
    wanted = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert written.keys() == wanted.keys()
    for key, gradient in written.items():
        assert_relative(gradient, wanted[key], 1e-4)

    save_pretrained(tmp_path / "ours", *found)
    kind = type(theirs) if name != "mt5" else type(published("t5"))
    back, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    back_parameters = dict(back.named_parameters())
    assert back_parameters.keys() == wanted.keys()
    for key, parameter in theirs.named_parameters():
        assert torch.equal(back_parameters[key], parameter), key
    with torch.no_grad():
        assert_relative(answer(back.eval()).numpy() * seen, expected * seen, 1e-6)


# --- forms of a folder --------------------------------------------------------------------------


def test_names_of_older_folders(recorded):
    """Copies of the embedding, a table that nothing uses, and a read-out that is the embedding."""
    folder, expected = recorded("t5")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def older(tensors):
        shared = tensors["shared.weight"]
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        tensors.update(dict.fromkeys(copies, shared) | {unused: np.ones((8, 4), np.float32)})

    assert_relative(applied(load_pretrained(rewritten(folder, older))), expected, 3e-6)
    rewritten(folder, lambda tensors: tensors.pop("shared.weight") is None)  # one of the copies serves as well
    assert_relative(applied(load_pretrained(folder)), expected, 3e-6)
    rewritten(folder, lambda tensors: tensors.update({"decoder.embed_tokens.weight": np.ones((VOCAB, 16), np.float32)}))
    with pytest.raises(ConfigError, match=r"decoder\.embed_tokens\.weight and .* differ"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("written", "tied", "scaled"),
    [
        ({"tie_word_embeddings": False, "scale_decoder_outputs": ...}, False, False),  # transformers 4, T5 1.1
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False, False),  # transformers 5, T5 1.1
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, False, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": ...}, False, True),
    ],
)
def test_a_read_out_of_its_own_whatever_config_json_says_of_it(written, tied, scaled, recorded):
    folder, expected = recorded("t5_v1_1")
    found = load_pretrained(changed(folder, **written))
    assert (found.model.config.tied, found.model.config.scaled_readout) == (tied, scaled)
    assert_relative(applied(found) * (4.0 if scaled else 1.0), expected, 3e-6)  # the root of d_model 16
    assert found.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("written", "scaled"),
    [
        ({"scale_decoder_outputs": ...}, True),
        ({"tie_word_embeddings": ...}, True),
        ({"scale_decoder_outputs": False}, False),
    ],
)
def test_a_tied_read_out(written, scaled, recorded):
    folder, expected = recorded("t5")
    found = load_pretrained(changed(folder, **written))
    assert found.model.config.tied and found.model.config.scaled_readout == scaled
    assert_relative(applied(found) * (1.0 if scaled else 0.25), expected, 3e-6)


@pytest.mark.parametrize(
    ("proj", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gelu_new", "gelu_tanh", False),
        ("gated-gelu", "gelu_tanh", True),
        ("gated-relu", "relu", True),
        ("gated-swish", "silu", True),
    ],
)
def test_kinds_of_feed_forward_layers(proj, activation, gated, recorded, tmp_path):
    folder, _ = recorded("t5_v1_1" if gated else "t5")
    found = load_pretrained(changed(folder, feed_forward_proj=proj))
    assert (found.model.config.activation, found.model.config.gated) == (activation, gated)
    save_pretrained(tmp_path / "again", *found)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["feed_forward_proj"] == proj.replace("swish", "silu") and written["is_gated_act"] == gated
    assert load_pretrained(tmp_path / "again").model.config == found.model.config


def test_the_encoder_of_a_whole_model(recorded):
    folder, _ = recorded("t5")
    found = load_pretrained(folder, architecture="T5EncoderModel")
    whole = load_pretrained(folder)
    memory = jax.jit(lambda params: whole.model.apply({"params": params}, SOURCE, MASK, method="encode"))
    np.testing.assert_array_equal(applied(found), memory(whole.params))
    assert set(found.params) == {"embedding", "encoder"}


def test_a_body_and_its_read_out(recorded, caplog):
    """T5Model has none: that of T5 1.1 is new, a tied one is the embedding."""
    folder, expected = recorded("t5")
    changed(folder, architectures=["T5Model"])
    found = load_pretrained(folder, architecture="T5ForConditionalGeneration")
    assert_relative(applied(found), expected, 3e-6)
    folder, _ = recorded("t5_v1_1")
    changed(folder, architectures=["T5Model"], tie_word_embeddings=False)
    rewritten(folder, lambda tensors: tensors.pop("lm_head.weight") is None)
    caplog.clear()
    load_pretrained(folder, architecture="T5ForConditionalGeneration")
    assert caplog.messages == [f"{folder}, read as a T5ForConditionalGeneration: lm_head.weight are new."]


def test_stacked_layers_are_written_apart(recorded, tmp_path):
    folder, _ = recorded("t5")
    found = load_pretrained(folder)
    config = dataclasses.replace(found.model.config, scan_layers=True)
    scanned = encoder_decoder(config, VOCAB, (14, 13))
    save_pretrained(tmp_path / "saved", scanned, stack_layers(found.params), None)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))


def test_special_tokens_of_a_folder():
    assert specials({}) == (0, 0, 1)
    assert specials({"pad_token_id": 5, "decoder_start_token_id": None, "eos_token_id": 2}) == (5, 5, 2)
    assert specials({"pad_token_id": 0, "decoder_start_token_id": 3}) == (0, 3, 1)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-tanh"},
            "feed_forward_proj gated-tanh cannot be expressed here, only relu, gelu,",
        ),
        ({"feed_forward_proj": "relu-gated"}, "feed_forward_proj relu-gated cannot be expressed here"),
        ({"num_layers": 0}, "num_layers 0 is below 1."),
        ({"d_kv": ...}, "d_kv is missing."),
        ({"relative_attention_max_distance": 4}, "--model.max-distance 4 is not above half of --model.buckets 8"),
        ({"num_layers": 3}, "the tensor encoder.block.2.layer.0.layer_norm.weight is missing"),
        ({"num_decoder_layers": 2}, "the tensor decoder.block.1.layer.0.layer_norm.weight is missing"),
        (
            {"feed_forward_proj": "gated-relu"},
            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight is missing",
        ),
        ({"d_kv": 5}, "is [24, 16], not [20, 16]"),
    ],
)
def test_what_does_not_fit_is_said(changes, message, recorded):
    folder, _ = recorded("t5")
    with pytest.raises(ConfigError) as error:
        load_pretrained(changed(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"norm": "layer"}, "--model.norm layer"),
        ({"placement": "post"}, "--model.placement post"),
        ({"positions": "sinusoidal"}, "--model.positions sinusoidal"),
        ({"scaled_attention": True}, "--model.scaled-attention True"),
        ({"bias": True}, "--model.bias True"),
        ({"activation": "gelu"}, "--model.activation gelu with --model.gated"),
    ],
)
def test_a_model_that_is_no_t5_is_not_written(fields, said, tmp_path):
    config = dataclasses.replace(t5_v1_1(1, 2, 8, 4, 16), **fields)
    model = encoder_decoder(config, VOCAB, (8, 8))
    with pytest.raises(ConfigError) as error:
        save_pretrained(tmp_path / "a", model, {})
    assert str(error.value) == f"this model cannot be written for transformers: against T5 stands {said}."


def test_the_default_of_experiments_is_no_t5():
    model = encoder_decoder(EncoderDecoderConfig(), VOCAB, (8, 8))
    with pytest.raises(ConfigError, match=r"against T5 stands --model\.norm layer, --model\.positions rotary"):
        save_pretrained("nowhere", model, {})
