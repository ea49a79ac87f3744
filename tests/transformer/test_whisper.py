"""Whisper's folders in and out. record_speech.py makes the recorded values, and the live models where it can."""

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
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Library

from jaxarch.data.tokenization import Bytes, Subwords
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.beams import Beams
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.pretrained import Pretrained, load_pretrained, save_pretrained
from jaxarch.transformer.pretrained.whisper import load_markers, save_markers
from jaxarch.transformer.speech import whisper
from jaxarch.transformer.transcription import Markers, heard_language, written
from tests.transformer import record_speech as record
from tests.transformer.record_speech import ASKED, BEAMS, FEATURES, NEW_TOKENS, PLACE, TOKENS, answers, published

FILE = "model.safetensors"


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder as transformers wrote it, and what its model answers."""
    tensors = load_file(PLACE / "whisper.safetensors")
    expected = {name: tensors.pop(name) for name in list(tensors) if not name.startswith("model.")}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / FILE, {"format": "pt"})
    with safe_open(PLACE / "whisper.safetensors", framework="np") as file:
        for name, text in file.metadata().items():
            (tmp_path / "theirs" / f"{name}.json").write_text(text)
    return tmp_path / "theirs", expected


def assert_relative(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same_tensors(one: Path, other: Path) -> None:
    tensors, others = load_file(one / FILE), load_file(other / FILE)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def assert_answers(found: Pretrained, markers: Markers, expected: dict[str, np.ndarray]) -> None:
    variables = {"params": found.params}
    memory = jax.jit(lambda variables: found.model.apply(variables, FEATURES, method="encode"))(variables)
    languages = [record.LANGUAGES[name] for name in heard_language(found.model, variables, memory, markers)]
    assert languages == expected["languages"].tolist()
    for language, task in ASKED:
        prefix = markers.prefix(language, task)
        for name, search in ("written", None), ("searched", Beams(BEAMS, length_penalty=2.0)):
            tokens = written(found.model, variables, memory, prefix, NEW_TOKENS, markers, search)
            np.testing.assert_array_equal(tokens, expected[f"{name}_{language}_{task}"])


def test_the_recorded_answers_and_tensors(recorded, tmp_path):
    folder, expected = recorded
    found, markers = load_pretrained(folder), load_markers(folder)
    assert (found.model.vocab, found.model.length, found.model.source) == (60, 20, 10)
    assert markers.start == 41 and markers.end == 15 and dict(markers.languages) == {"en": 42, "de": 43}
    assert dict(markers.tasks) == {"transcribe": 45, "translate": 44} and markers.no_timestamps == 46
    assert markers.suppressed == (1, 2, *range(41, 60)) and markers.suppressed_first == (3, 15)
    # Else the comparison would show little: both languages are heard, and a text ends early.
    assert len({*expected["languages"]}) == 2 and (expected["written_en_transcribe"][:, -2:] == 15).all(axis=1).any()
    assert_relative(jax.jit(found.model.apply)({"params": found.params}, FEATURES, TOKENS), expected["logits"], 1e-5)
    assert_answers(found, markers, expected)

    save_pretrained(tmp_path / "ours", *found)
    save_markers(tmp_path / "ours", found.model, markers)
    assert_same_tensors(tmp_path / "ours", folder)
    again = load_pretrained(tmp_path / "ours")
    assert (again.model.config, again.model.source) == (found.model.config, found.model.source)
    assert load_markers(tmp_path / "ours") == markers
    scanned = whisper(dataclasses.replace(found.model.config, scan_layers=True), 60, 20, 10)
    save_pretrained(tmp_path / "scanned", scanned, {side: stack_layers(found.params[side]) for side in found.params})
    assert_same_tensors(tmp_path / "scanned", folder)


def test_the_body_alone(recorded, tmp_path):
    """Folders of a WhisperModel leave the prefix out; with a tied read-out nothing is missing in them."""
    folder, expected = recorded
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    changed(folder / "config.json", architectures=["WhisperModel"])
    body = load_pretrained(folder)
    save_pretrained(tmp_path / "body", *body)
    assert_same_tensors(tmp_path / "body", folder)
    found = load_pretrained(folder, architecture="WhisperForConditionalGeneration")
    variables = {"params": found.params}
    logits = jax.jit(found.model.apply)(variables, FEATURES, TOKENS)
    assert_relative(logits, expected["logits"], 1e-5)
    last = jax.jit(body.model.apply)(variables, FEATURES, TOKENS)
    np.testing.assert_allclose(last @ body.params["decoder"]["embedding"]["embedding"].T, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["tied", "free", "body"])
def test_transformers_agrees(kind, tmp_path):
    """Live: what it answers, gradients, and what it reads of what is written here."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    name = "WhisperModel" if kind == "body" else "WhisperForConditionalGeneration"
    theirs = published(name, seed=1, tie_word_embeddings=kind != "free")
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs")

    def loss(params):
        logits = found.model.apply({"params": params}, FEATURES, TOKENS)
        return jnp.square(logits).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(found.params)
    inputs = {"input_features": torch.tensor(FEATURES.swapaxes(1, 2)), "decoder_input_ids": torch.tensor(TOKENS).long()}
    expected = theirs(**inputs)[0]
    expected.square().mean().backward()
    assert_relative(logits, expected.detach().numpy(), 1e-5)

    # The gradients have the parameters' shapes, so they are written under the parameters' names.
    save_pretrained(tmp_path / "gradients", found.model, grads)
    gradients = load_file(tmp_path / "gradients" / FILE)
    named = {key: parameter for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    still = gradients.keys() - named.keys()
    assert [key.removeprefix("model.") for key in still] == ["encoder.embed_positions.weight"]
    for key, parameter in named.items():
        assert_relative(gradients[key], parameter.grad.numpy(), 1e-4)

    save_pretrained(tmp_path / "ours", found.model, found.params)
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_relative(back(**inputs)[0].numpy(), expected.detach().numpy(), 1e-6)
    if kind == "tied":
        markers, expected = load_markers(tmp_path / "theirs"), answers(theirs)
        assert_answers(found, markers, expected)
        save_markers(tmp_path / "ours", found.model, markers)
        read = type(theirs).from_pretrained(tmp_path / "ours").generation_config.to_dict()
        own = theirs.generation_config.to_dict()
        assert {name: read[name] for name in own} == own


def test_the_written_spectrogram_is_read(recorded, tmp_path):
    transformers = pytest.importorskip("transformers")
    found = load_pretrained(recorded[0])
    model = whisper(dataclasses.replace(found.model.config, bands=80), 60, 20, 100)
    save_markers(tmp_path, model, load_markers(recorded[0]))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert extractor(np.zeros(100, np.float32), sampling_rate=16_000)["input_features"].shape == (1, 80, 200)


# --- what stands beside the weights, and what is refused ----------------------------------------


def changed(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


def test_markers_of_folders_without_generation_config(recorded):
    """By the tokeniser's names, or what config.json says alone."""
    folder, _ = recorded
    (folder / "generation_config.json").unlink()
    changed(folder / "config.json", suppress_tokens=[4], begin_suppress_tokens=[5, 6])
    library = Library(models.WordLevel({"a": 0}, "a"))
    library.add_special_tokens([AddedToken(f"<|{name}|>") for name in ("endoftext", "startoftranscript", "en")])
    expected = Markers(2, 1, (("en", 3),), (), None, (4,), (5, 6))
    assert load_markers(folder, Subwords(library.to_str())) == expected
    assert load_markers(folder) == Markers(41, 15, suppressed=(4,), suppressed_first=(5, 6))
    with pytest.raises(ConfigError, match="the tokeniser has no <|startoftranscript|>"):
        load_markers(folder, Bytes())


Change = Callable[[Path], Any]
BAD: dict[str, Change] = {
    "{}/config.json: activation_function relu cannot be expressed here, only gelu.": lambda folder: changed(
        folder / "config.json", activation_function="relu"
    ),
    "{}/config.json: max_source_positions 0 is below 1.": lambda folder: changed(
        folder / "config.json", max_source_positions=0
    ),
    "{}/config.json: --model.decoder-heads 3 does not divide --model.dim 16.": lambda folder: changed(
        folder / "config.json", decoder_attention_heads=3
    ),
    "{}: the tensor model.encoder.conv1.weight is [16, 8, 3], not [16, 9, 3].": lambda folder: changed(
        folder / "config.json", num_mel_bins=9
    ),
    "{}/generation_config.json: decoder_start_token_id is missing.": lambda folder: changed(
        folder / "generation_config.json", decoder_start_token_id=None
    ),
    "{}/preprocessor_config.json: sampling_rate 8000 cannot be expressed here, only 16000.": lambda folder: changed(
        folder / "preprocessor_config.json", sampling_rate=8000
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_refused(message, recorded):
    folder, _ = recorded
    BAD[message](folder)
    with pytest.raises(ConfigError) as caught:
        load_pretrained(folder)
        load_markers(folder)
    assert str(caught.value) == message.format(folder)
