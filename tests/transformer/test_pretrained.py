"""Published weights in and out. record_pretrained.py makes the recorded values, and the live models where it can."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from experiments import gpt
from jaxarch.data.tokenization import Bytes, Characters, train_bpe
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.decoder import ModelConfig, decoder, gpt2, llama
from jaxarch.transformer.decoding import generate, left_pad
from jaxarch.transformer.finished import restored
from jaxarch.transformer.positions import Rotary
from jaxarch.transformer.pretrained import Pretrained, __main__, load_pretrained, save_pretrained
from jaxarch.transformer.pretrained.folder import FAMILIES, family_for, family_of, layout_of, shapes_of
from jaxarch.transformer.pretrained.gpt2 import GPT2
from jaxarch.transformer.pretrained.rotary import read_rotary
from jaxarch.transformer.pretrained.tokenizer import as_subwords
from tests.run.running import run
from tests.transformer.record_pretrained import PLACE, RECORDED, TOKENS, VARIANTS, VOCAB, published

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], tuple[Path, np.ndarray]]:
    """By the variant's name: its folder, as transformers wrote it, and its logits for TOKENS."""

    def folder_and_logits(name: str) -> tuple[Path, np.ndarray]:
        with safe_open(PLACE / f"{name}.safetensors", framework="np") as file:
            config = file.metadata()["config"]
        tensors = load_file(PLACE / f"{name}.safetensors")
        np.testing.assert_array_equal(tensors.pop("tokens"), TOKENS)
        logits = tensors.pop("logits")
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text(config)
        return folder, logits

    return folder_and_logits


def applied(found: Pretrained, tokens: np.ndarray = TOKENS) -> jax.Array:
    return jax.jit(found.model.apply)({"params": found.params}, tokens)


def assert_relative(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_logits_are_the_recorded_ones_and_the_tensors_come_back(name, recorded, tmp_path):
    folder, logits = recorded(name)
    found = load_pretrained(folder)
    assert found.tokenizer is None and found.model.vocab == VOCAB
    assert found.config == json.loads((folder / "config.json").read_text())
    assert_relative(applied(found), logits, 2e-6)
    save_pretrained(tmp_path / "saved", found.model, found.params, None)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))
    again = load_pretrained(tmp_path / "saved")
    assert (again.model.config, again.model.length) == (found.model.config, found.model.length)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_agrees(name, tmp_path):
    """Live: logits, gradients, and what it reads of what is written here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = published(name)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs")

    def loss(params):
        logits = found.model.apply({"params": params}, TOKENS)
        return jnp.square(logits).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(found.params)
    expected = theirs(torch.tensor(TOKENS).long()).logits
    expected.square().mean().backward()
    assert_relative(logits, expected.detach().numpy(), 1e-5)

    # The gradients have the parameters' shapes, so they are written under the parameters' names.
    save_pretrained(tmp_path / "gradients", found.model, grads, None)
    written = load_file(tmp_path / "gradients" / FILE)
    wanted = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    assert written.keys() == wanted.keys()
    for key, gradient in written.items():
        assert_relative(gradient, wanted[key], 1e-4)

    save_pretrained(tmp_path / "ours", found.model, found.params, None)
    kind = type(theirs) if name != "mistral" else transformers.LlamaForCausalLM
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is kind and not any(info.values()), info
    for key, parameter in theirs.named_parameters():
        assert torch.equal(dict(back.named_parameters())[key], parameter), key
    with torch.no_grad():
        assert_relative(back(torch.tensor(TOKENS).long()).logits.numpy(), expected.detach().numpy(), 1e-6)


@pytest.mark.parametrize("name", ["mistral_window", "gemma2"])
def test_the_tokens_that_transformers_generates(name, tmp_path):
    """Greedily, on from prompts that are longer than the window, at its edge and shorter."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = published(name)
    theirs.save_pretrained(tmp_path)
    found = load_pretrained(tmp_path)
    window = max(found.model.config.windows)
    prompts = [TOKENS[0, :8].tolist(), TOKENS[1, :window].tolist(), TOKENS[1, -2:].tolist()]
    new_tokens = 10
    tokens = generate(found.model, {"params": found.params}, left_pad(prompts), new_tokens, jax.random.key(0))
    for prompt, continued in zip(prompts, tokens, strict=True):
        given = torch.tensor(np.array([prompt])).long()
        whole = theirs.generate(given, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        np.testing.assert_array_equal(continued, whole[0, len(prompt) :].numpy())


def test_a_sharded_folder_of_transformers(tmp_path):
    pytest.importorskip("torch")
    theirs = published("llama")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load_pretrained(tmp_path / "whole"), load_pretrained(tmp_path / "shards")
    jax.tree.map(np.testing.assert_array_equal, shards.params, whole.params)


# --- forms of a folder --------------------------------------------------------------------------


def test_shards_written_here(recorded, tmp_path):
    folder, _ = recorded("gpt2")
    found = load_pretrained(folder)
    save_pretrained(tmp_path / "shards", found.model, found.params, None, shard_bytes=5000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert len(files) > 2 and max(sizes) <= 5000 and index["metadata"]["total_size"] == sum(sizes)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "shards").params, found.params)


def rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / FILE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def test_names_of_older_folders(recorded):
    """GPT-2's first folder leaves the prefix out and holds the causal mask; a tied read-out may be written twice."""
    folder, logits = recorded("gpt2")
    mask = np.ones((1, 1, 12, 12), np.uint8)
    rewritten(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    rewritten(folder, lambda tensors: tensors.update({"h.0.attn.bias": mask, "lm_head.weight": tensors["wte.weight"]}))
    assert_relative(applied(load_pretrained(folder)), logits, 2e-6)
    folder, logits = recorded("llama")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewritten(folder, lambda tensors: tensors.update(frequencies))
    assert_relative(applied(load_pretrained(folder)), logits, 2e-6)


def test_bfloat16(recorded, tmp_path):
    folder, logits = recorded("llama")
    found = load_pretrained(folder, jnp.bfloat16)
    assert found.model.dtype == jnp.bfloat16
    exact = load_pretrained(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found.params, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}
    error = np.abs(applied(found) - logits)
    assert 0 < error.max() < 0.05 * np.abs(logits).max()
    save_pretrained(tmp_path / "half", found.model, found.params, None)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "half", jnp.bfloat16).params, found.params)
    # Numbers of 16 bits are numbers of 32.
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "half").params, found.params)


@pytest.mark.devices(4)
def test_onto_a_sharding_over_four_devices(recorded):
    """Rows of one kind, columns of another, by name; and all of them replicated."""
    mesh = Mesh(np.array(jax.devices()), ("model",))
    replicated = NamedSharding(mesh, PartitionSpec())

    def cut(parameter: str) -> NamedSharding:
        axes = {"query.kernel": (None, "model"), "out.kernel": ("model", None), "up.bias": ("model",)}
        return NamedSharding(mesh, PartitionSpec(*axes.get(".".join(parameter.split(".")[-2:]), ())))

    for name in "gpt2", "llama":
        folder, logits = recorded(name)
        whole, all_of_it = load_pretrained(folder), load_pretrained(folder, sharding=replicated)
        found = load_pretrained(folder, sharding=cut)
        jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
        jax.tree.map(np.testing.assert_array_equal, all_of_it.params, whole.params)
        assert_relative(applied(found), logits, 2e-6)
        kernels = [held.params["layers_1"]["attention"]["query"]["kernel"] for held in (found, all_of_it)]
        assert [len(kernel.sharding.device_set) for kernel in kernels] == [4, 4]
        assert [kernel.addressable_shards[3].data.shape for kernel in kernels] == [(16, 4), (16, 16)]


@pytest.mark.devices(4)
@pytest.mark.parametrize("name", ["bert_classes", "t5", "vit", "whisper", "gemma2"])
def test_every_family_onto_a_sharding(name, tmp_path):
    """Each parameter cut along the first axis that four divides: the same numbers, a quarter on each device."""
    with safe_open(PLACE / f"{name}.safetensors", framework="np") as file:
        (tmp_path / "config.json").write_text(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    answers = ("recorded.", "out.")  # what the model said, beside its tensors
    save_file({k: v for k, v in tensors.items() if "." in k and not k.startswith(answers)}, tmp_path / FILE)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    whole = load_pretrained(tmp_path)
    shapes = shapes_of(whole.model)

    def cut(parameter: str) -> NamedSharding:
        axis = next((i for i, size in enumerate(shapes[parameter]) if size % 4 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*(() if axis is None else (*(None,) * axis, "model"))))

    found = load_pretrained(tmp_path, sharding=cut)
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    parts = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(found.params)]
    assert sum(part == 0.25 for part in parts) > len(parts) / 2


def test_a_device_reads_its_own_part_alone(recorded, monkeypatch):
    """Of a tensor that holds three parameters side by side, the columns of the one that is asked for."""
    from jaxarch.transformer.pretrained import tensors

    read, asked = tensors.Tensors.read, {}
    monkeypatch.setattr(
        tensors.Tensors,
        "read",
        lambda self, name, part: asked.setdefault(name, []).append(part) or read(self, name, part),
    )
    load_pretrained(recorded("gpt2")[0])
    parts = asked["transformer.h.0.attn.c_attn.weight"]
    assert sorted(part[1].start for part in parts) == [0, 16, 32]
    assert all(part[0] == slice(0, 16) and part[1].stop - part[1].start == 16 for part in parts)


def test_stacked_layers_are_written_apart(recorded, tmp_path):
    folder, _ = recorded("llama")
    found = load_pretrained(folder)
    scanned = decoder(dataclasses.replace(found.model.config, scan_layers=True), VOCAB, found.model.length)
    save_pretrained(tmp_path / "saved", scanned, stack_layers(found.params), None)
    assert_same_tensors(load_file(tmp_path / "saved" / FILE), load_file(folder / FILE))


def without_read_out(folder: Path, architecture: str) -> None:
    rewritten(folder, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    settings(architectures=[architecture])(folder)


def test_a_body_becomes_a_model_with_a_new_head(recorded, caplog):
    """Of its own key, and said; the rest is the folder's. A tied read-out is the embedding, so nothing is new."""
    folder, _ = recorded("llama")
    whole = load_pretrained(folder).params
    without_read_out(folder, "LlamaModel")
    rewritten(folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})
    found = load_pretrained(folder, architecture="LlamaForCausalLM", key=jax.random.key(1))
    assert caplog.messages == [f"{folder}, read as a LlamaForCausalLM: lm_head.weight are new."]
    rest = {name: value for name, value in found.params.items() if name != "readout"}
    jax.tree.map(np.testing.assert_array_equal, rest, {name: whole[name] for name in rest})
    np.testing.assert_array_equal(found.params["readout"]["kernel"], np.zeros((16, VOCAB)))  # as a decoder begins
    assert found.config["architectures"] == ["LlamaForCausalLM"]

    folder, logits = recorded("gpt2")
    settings(architectures=["GPT2Model"])(folder)
    caplog.clear()
    assert_relative(applied(load_pretrained(folder, architecture="GPT2LMHeadModel")), logits, 2e-6)
    assert not caplog.messages


def test_overrides_and_what_the_model_does_not_know(recorded, tmp_path):
    folder, _ = recorded("gpt2")
    settings(id2label={"0": "good"})(folder)
    found = load_pretrained(folder, overrides={"layer_norm_epsilon": 0.5})
    assert found.model.config.eps == 0.5 and found.config["layer_norm_epsilon"] == 0.5
    save_pretrained(tmp_path / "again", *found)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["id2label"] == {"0": "good"} and saved["layer_norm_epsilon"] == 0.5


def test_tensors_of_another_order_of_axes(recorded, tmp_path, monkeypatch):
    """As a convolution's: here the positions of a GPT-2, two axes as they are and two that are turned."""
    family = GPT2._replace(names=GPT2.names | {"transformer.wpe.weight": "positions.embedding@10"})
    monkeypatch.setattr("jaxarch.transformer.pretrained.folder.FAMILIES", (family,))
    folder, logits = recorded("gpt2")
    rewritten(folder, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].T.copy()}))
    found = load_pretrained(folder)
    assert_relative(applied(found), logits, 2e-6)
    save_pretrained(tmp_path / "again", *found)
    assert_same_tensors(load_file(tmp_path / "again" / FILE), load_file(folder / FILE))
    shapes = layout_of(family._replace(names={"w": "k@2310"}), {"k": (3, 5, 7, 11)}).shapes
    assert shapes == {"w": (11, 7, 3, 5)}  # [out, in, height, width] of a kernel [height, width, in, out]


# --- what is refused ----------------------------------------------------------------------------


def settings(**changes: Any) -> Callable[[Path], None]:
    """A change of config.json; `...` takes the entry away."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {name: value for name, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, change) and None


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def indexed(weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / FILE).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def renamed(architecture: str, **changes: Any) -> Callable[[Path], None]:
    return settings(architectures=[f"{architecture}ForCausalLM"], model_type=architecture.lower(), **changes)


KNOWN = ", ".join(name for family in FAMILIES for name in family.architectures) + "."
NORM = "transformer.h.0.ln_1.weight"
BAD: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "there is no folder {}.": ("gpt2", shutil.rmtree),
    "{} has no config.json; name a folder that transformers has saved.": (
        "gpt2",
        lambda folder: (folder / "config.json").unlink(),
    ),
    "{}/config.json is damaged: Expecting value: line 1 column 1 (char 0).": (
        "gpt2",
        damaged("config.json", lambda _: b""),
    ),
    "{}/config.json is damaged: it holds no object.": ("gpt2", damaged("config.json", lambda _: b"[1]")),
    f"{{}}/config.json: the architecture Gemma3ForCausalLM is not supported; these are: {KNOWN}": (
        "llama",
        renamed("Gemma3"),
    ),
    "{}/config.json: GPT2Model has no head; ask for the architecture GPT2LMHeadModel.": (
        "gpt2",
        settings(architectures=["GPT2Model"]),
    ),
    f"{{}}/config.json: no architecture is named; these are: {KNOWN}": ("gpt2", settings(architectures=...)),
    "{}/config.json: the architecture LlamaForCausalLM is not of the model_type mistral.": (
        "llama",
        settings(model_type="mistral"),
    ),
    "{}/config.json: n_embd is missing.": ("gpt2", settings(n_embd=...)),
    "{}/config.json: n_layer is '2', not of type int.": ("gpt2", settings(n_layer="2")),
    "{}/config.json: --model.heads 5 does not divide --model.dim 16; 4 or 8 would.": ("gpt2", settings(n_head=5)),
    "{}/config.json: vocab_size 0 is below 1.": ("gpt2", settings(vocab_size=0)),
    "{}/config.json: activation_function swoosh cannot be expressed here, only gelu_new or gelu_pytorch_tanh or "
    "gelu_fast.": ("gpt2", settings(activation_function="swoosh")),
    "{}/config.json: hidden_act gelu cannot be expressed here, only silu or swish.": (
        "llama",
        settings(hidden_act="gelu"),
    ),
    "{}/config.json: scale_attn_by_inverse_layer_idx True cannot be expressed here, only False.": (
        "gpt2",
        settings(scale_attn_by_inverse_layer_idx=True),
    ),
    "{}/config.json: scale_attn_weights False cannot be expressed here, only True.": (
        "gpt2",
        settings(scale_attn_weights=False),
    ),
    "{}/config.json: rope_scaling longrope cannot be expressed here, only default, linear, dynamic, yarn, llama3.": (
        "llama",
        settings(rope_scaling={"type": "longrope", "factor": 2.0}),
    ),
    "{}/config.json: rope_parameters full_attention, sliding_attention cannot be expressed here, only one rotation for "
    "all layers.": ("llama", settings(rope_parameters={"full_attention": {}, "sliding_attention": {}})),
    "{}/config.json: high_freq_factor is missing.": (
        "llama",
        settings(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
    ),
    "{}/config.json: truncate False cannot be expressed here, only True.": (
        "qwen3",
        settings(rope_scaling={"rope_type": "yarn", "factor": 8.0, "truncate": False}),
    ),
    "{}/config.json: --model.rotary.factor 0.5 is below 1, which leaves all as it is.": (
        "llama",
        settings(rope_scaling={"type": "linear", "factor": 0.5}),
    ),
    "{}/config.json: rope_parameters is 'linear', not an object.": ("llama", settings(rope_parameters="linear")),
    "{}/config.json: partial_rotary_factor 0.5 cannot be expressed here, only 1.0.": (
        "llama",
        settings(partial_rotary_factor=0.5),
    ),
    "{}/config.json: mlp_bias True with attention_bias False cannot be expressed here, only with both True.": (
        "llama",
        settings(mlp_bias=True),
    ),
    "{}/config.json: layer_types sliding_attention cannot be expressed here, only full_attention.": (
        "llama",  # of which transformers reads no windows
        settings(layer_types=["full_attention", "sliding_attention"], sliding_window=4),
    ),
    "{}/config.json: layer_types full_attention cannot be expressed here, only sliding_attention.": (
        "mistral_window",  # nor of which layers have it
        settings(layer_types=["full_attention", "sliding_attention"]),
    ),
    "{}/config.json: layer_types sliding_attention needs a window, and sliding_window is none.": (
        "qwen2_window",
        settings(use_sliding_window=False, layer_types=["full_attention", "sliding_attention"]),
    ),
    "{}/config.json: layer_types linear_attention cannot be expressed here, only full_attention or "
    "sliding_attention.": (
        "qwen3",
        settings(layer_types=["full_attention", "linear_attention"]),
    ),
    "{}/config.json: layer_types is ['full_attention'], not a list of 2.": (
        "qwen3",
        settings(layer_types=["full_attention"]),
    ),
    "{}/config.json: hidden_act silu cannot be expressed here, only gelu_pytorch_tanh or gelu.": (
        "gemma",
        settings(hidden_act="silu"),
    ),
    "{}/config.json: hidden_activation gelu cannot be expressed here, only gelu_pytorch_tanh.": (
        "gemma2",
        settings(hidden_activation="gelu"),
    ),
    "{}/config.json: use_bidirectional_attention True cannot be expressed here, only False.": (
        "gemma2",
        settings(use_bidirectional_attention=True),
    ),
    "{}/config.json: quantization_config cannot be expressed here, only weights as floats.": (
        "llama",
        settings(quantization_config={"bits": 4}),
    ),
    f"{{}} has neither {FILE} nor {INDEX}; other files of weights are not read.": (
        "gpt2",
        lambda folder: (folder / FILE).unlink(),
    ),
    f"{{}}: the tensor {NORM} is missing.": ("gpt2", tensors(lambda found: found.pop(NORM) is None)),
    f"{{}}: the tensor {NORM} is [15], not [16].": (
        "gpt2",
        tensors(lambda found: found.update({NORM: found[NORM][1:]})),
    ),
    "{}: the tensor model.layers.0.mlp.up_proj.weight is [16, 24], not [24, 16].": (
        "llama",
        tensors(lambda found: found.update({"model.layers.0.mlp.up_proj.weight": np.zeros((16, 24), np.float32)})),
    ),
    "{}: the tensor model.layers.0.self_attn.q_proj.bias has no place in a LlamaForCausalLM.": (
        "llama",
        tensors(lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)})),
    ),
    "{}: the tensor strange has no place in a GPT2LMHeadModel.": (
        "gpt2",
        tensors(lambda found: found.update({"strange": np.zeros(3, np.float32)})),
    ),
    "{}: the tensor transformer.h.1.attn.c_attn.bias has no place in a GPT2LMHeadModel; the tensor ": (
        "gpt2",
        settings(n_layer=1),
    ),
    "{}: the tensors lm_head.weight and transformer.wte.weight differ, though tie_word_embeddings says that they are "
    "one.": ("gpt2", tensors(lambda found: found.update({"lm_head.weight": found["transformer.wte.weight"] + 1}))),
    f"{{}}: the tensor {NORM} is of type I32, not one of F64, F32, F16, BF16.": (
        "gpt2",
        tensors(lambda found: found.update({NORM: np.ones(16, np.int32)})),
    ),
    f"{{}}/{FILE} is damaged: Error while deserializing header: incomplete metadata, file not fully covered.": (
        "gpt2",
        damaged(FILE, lambda content: content[:-100]),
    ),
    f"{{}}/{FILE} is damaged: Error while deserializing header: header too large.": (
        "gpt2",
        damaged(FILE, lambda content: b"\xff" * 8 + content[8:]),
    ),
    f"{{}}/{FILE} is damaged: Error while deserializing header: header too small.": (
        "gpt2",
        damaged(FILE, lambda content: b""),
    ),
    f"{{}}/{INDEX} names model-00002-of-00002.safetensors, which is not there.": (
        "gpt2",
        indexed({NORM: "model-00002-of-00002.safetensors"}),
    ),
    "{}: the tensor a is missing in model-00001-of-00002.safetensors.": (
        "gpt2",
        indexed({"a": "model-00001-of-00002.safetensors"}),
    ),
    f"{{}}/{INDEX} is damaged: '../x' is no file of the folder.": ("gpt2", indexed({"a": "../x"})),
    f"{{}}/{INDEX} is damaged: it has no weight_map.": ("gpt2", indexed({})),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_folder_is_one_clear_line(message, recorded):
    name, spoil = BAD[message]
    folder, _ = recorded(name)
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        load_pretrained(folder)
    said = str(error.value)
    assert said == message.format(folder) or (not message.endswith(".") and said.startswith(message.format(folder)))
    assert "\n" not in said


def test_a_window_as_long_as_the_text_hides_nothing(recorded):
    folder, logits = recorded("llama")
    renamed("Mistral", sliding_window=12)(folder)
    found = load_pretrained(folder)
    assert found.model.config.window == (12,)
    assert_relative(applied(found), logits, 2e-6)


WINDOWS = {
    "mistral by default": ("llama", renamed("Mistral"), (4096,)),
    "mistral without": ("llama", renamed("Mistral", sliding_window=None), (0,)),
    "none of qwen's in use": ("qwen2", settings(sliding_window=3), (0,)),
    "qwen's last layers": (
        "qwen2_window",
        settings(num_hidden_layers=4, max_window_layers=3, layer_types=...),
        (0, 0, 0, 3),
    ),
    "qwen's by default": ("qwen2_window", settings(layer_types=..., max_window_layers=...), (0,)),
    "gemma's, of an odd number of layers": ("gemma2", settings(num_hidden_layers=3, layer_types=...), (4, 0)),
    "gemma's by default": ("gemma2", settings(layer_types=..., sliding_window=...), (4096, 0)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_the_layers(name, recorded):
    variant, change, expected = WINDOWS[name]
    folder, _ = recorded(variant)
    change(folder)
    content = json.loads((folder / "config.json").read_text())
    family = family_of(content)
    assert family.model(content, jnp.float32).config.window == expected


LONG = {"llama3": "llama3", "mistral_window": "linear", "qwen2_window": "dynamic", "qwen3_window": "yarn"}


@pytest.mark.parametrize("name", LONG)
def test_scaled_rotations_in_the_words_of_transformers_4(name, recorded, tmp_path):
    """As read, and as written beside those of 5."""
    folder, logits = recorded(name)
    content = json.loads((folder / "config.json").read_text())
    rope = content["rope_parameters"]
    assert rope.pop("rope_type") == LONG[name]
    base = rope.pop("rope_theta")
    settings(rope_parameters=..., rope_theta=base, rope_scaling=rope | {"type": LONG[name]})(folder)
    found = load_pretrained(folder)
    assert found.model.config.rotary.scaling == LONG[name]
    assert_relative(applied(found), logits, 2e-6)
    save_pretrained(tmp_path / "saved", found.model, found.params)
    settings(rope_parameters=...)(tmp_path / "saved")
    assert load_pretrained(tmp_path / "saved").model.config == found.model.config


# As their config.json says it, and how many parameters they are published to have.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 3.2 1B": (
        1_235_814_400,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "Gemma 2B": (
        2_506_172_416,
        {
            "architectures": ["GemmaForCausalLM"],
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "model_type": "gemma",
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
    ),
    "Gemma 2 2B": (
        2_614_341_888,
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(name):
    count, content = PUBLISHED[name]
    model = family_of(content).model(content, jnp.bfloat16)
    assert sum(map(math.prod, shapes_of(model).values())) == count
    family = family_for(model)
    again = family.model(family.settings(model), jnp.bfloat16)
    assert (again.config, again.vocab, again.length) == (model.config, model.vocab, model.length)


def read(**changes: Any) -> Rotary:
    return read_rotary({"max_position_embeddings": 40, **changes})


def test_numbers_of_a_scaling_that_are_left_out():
    """Lengths and yarn's factor of queries and keys, by transformers' rules."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert read(rope_scaling=yarn) == Rotary(1e4, "yarn", 4.0, 40)
    assert read(rope_scaling=yarn | {"original_max_position_embeddings": 10}).length == 10
    assert read(rope_scaling=yarn, original_max_position_embeddings=20).length == 20
    unsaid = {"rope_type": "yarn", "original_max_position_embeddings": 10, "factor": None, "beta_slow": None}
    assert read(rope_scaling=unsaid) == Rotary(1e4, "yarn", 4.0, 10)
    assert read(rope_scaling=yarn | {"attention_factor": 1.5}).attention_factor == 1.5
    sharpened = read(rope_scaling=yarn | {"mscale": 0.7, "mscale_all_dim": 1.2}).attention_factor
    np.testing.assert_allclose(sharpened, (0.07 * np.log(4) + 1) / (0.12 * np.log(4) + 1))
    assert read(rope_scaling=yarn | {"mscale": 0.7}).attention_factor == 0  # one of both has no effect
    assert read(rope_theta=7.0, rope_parameters={"rope_type": "linear", "factor": 2}) == Rotary(7.0, "linear", 2.0)


def test_the_base_of_rotations_in_the_words_of_transformers_4(recorded):
    folder, logits = recorded("llama_tied")
    settings(rope_parameters=..., rope_theta=50.0, rope_scaling=None)(folder)
    assert_relative(applied(load_pretrained(folder)), logits, 2e-6)


GEMMA_2 = dataclasses.replace(
    llama(2, 2, 8), norm="zero_centered_rms", placement="both", mlp="geglu", scale_embedding=True
)
REFUSED = {
    "--model.positions rotary; against Llama, Mistral, Qwen2 or Qwen3 stands --model.mlp gelu, --model.norm layer; "
    "against Gemma stands --model.mlp gelu, --model.norm layer, --model.scale-embedding False; against Gemma 2 stands "
    "--model.mlp gelu, --model.norm layer, --model.placement pre, --model.scale-embedding False.": ModelConfig(
        1, 2, 8, positions="rotary"
    ),
    "--model.kv-heads 1; against": dataclasses.replace(gpt2(1, 2, 8), kv_heads=1),
    "--model.head-width 2; against": dataclasses.replace(gpt2(1, 2, 8), head_width=2),
    "--model.soft-cap 5.0; against": dataclasses.replace(gpt2(1, 2, 8), soft_cap=5.0),
    "Qwen3 stands --model.qk-norm with biases of other layers than all of the attention; against": dataclasses.replace(
        llama(1, 2, 8), qk_norm=True, bias=True
    ),
    "Qwen3 stands --model.window with biases of other layers than queries, keys and values; ": dataclasses.replace(
        llama(1, 2, 8), window=(3,), attention_bias="all"
    ),
    "Qwen3 stands --model.window that differs from layer to layer; against": dataclasses.replace(
        llama(2, 2, 8), window=(3, 0)
    ),
    "Qwen3 stands --model.window of two lengths beside 0; against": dataclasses.replace(
        llama(2, 2, 8), window=(3, 4), qk_norm=True
    ),
    "Qwen3 stands --model.attention-soft-cap 3.0; against": dataclasses.replace(llama(1, 2, 8), attention_soft_cap=3.0),
    "Gemma 2 stands --model.attention-bias qkv, --model.attention-scale 0.3, which is not 1 / sqrt(a whole number).": (
        dataclasses.replace(GEMMA_2, attention_bias="qkv", attention_scale=0.3)
    ),
    "against GPT-2 stands --model.window 3 4, --model.mlp geglu, ": dataclasses.replace(GEMMA_2, window=(3, 4)),
    "Gemma 2 stands --model.window of two lengths beside 0.": dataclasses.replace(GEMMA_2, window=(3, 4)),
    "against Gemma stands --model.norm rms, --model.placement both; against Gemma 2 stands --model.norm rms.": (
        dataclasses.replace(GEMMA_2, norm="rms")
    ),
}


def ones(config: ModelConfig, vocab: int = VOCAB) -> tuple[Any, Any]:
    """A model, and parameters of its shapes."""
    model = decoder(config, vocab, 12)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return model, jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("message", REFUSED)
def test_a_model_that_is_of_no_family_is_refused(message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        save_pretrained(tmp_path / "a", *ones(REFUSED[message]), None)
    assert str(error.value).startswith("this model cannot be written for transformers: against GPT-2 stands ")
    assert not (tmp_path / "a").exists()


def test_parameters_of_another_model_and_a_folder_in_use_are_refused(tmp_path):
    model, params = ones(gpt2(1, 2, 8))
    with pytest.raises(ConfigError, match=r"the parameters are not this model's: positions.embedding is missing\."):
        save_pretrained(tmp_path, model, {k: v for k, v in params.items() if k != "positions"}, None)
    with pytest.raises(ConfigError, match=r"norm.scale is \[7\], not \[8\]\."):
        save_pretrained(tmp_path, model, params | {"norm": {"scale": jnp.ones(7), "bias": jnp.ones(8)}}, None)
    with pytest.raises(ConfigError, match=r"norm.bias is missing\."):
        save_pretrained(tmp_path, model, params | {"norm": {"scale": jnp.ones(8)}}, None)
    save_pretrained(tmp_path, model, params, None)
    with pytest.raises(ConfigError, match=r"already holds config\.json; name a new folder\."):
        save_pretrained(tmp_path, model, params, None)


# --- tokenisers ---------------------------------------------------------------------------------

TEXT = 'Once upon a time,\r\n\tthere was "a  model" of é, ß and 🙂.\n\n It\'s the end.  '
TOKENIZERS = {
    "characters": Characters("".join(sorted(set(TEXT)))),
    "bytes": Bytes(),
    "subwords": train_bpe([TEXT], 270),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_keep_their_numbers(name, tmp_path):
    own = TOKENIZERS[name]
    tokens = own.encode(TEXT)
    save_pretrained(tmp_path, *ones(gpt2(1, 2, 8), own.vocab), own)
    read = load_pretrained(tmp_path).tokenizer
    assert read is not None and read.vocab == own.vocab and read.end == own.end
    np.testing.assert_array_equal(read.encode(TEXT), tokens)
    assert read.decode(tokens) == own.decode(tokens) == TEXT
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == tokens.tolist() and theirs.decode(tokens.tolist()) == TEXT
    assert theirs.eos_token_id == own.end


def test_every_byte_has_its_own_number():
    every = "".join(map(chr, range(0x800)))
    np.testing.assert_array_equal(as_subwords(Bytes()).encode(every), Bytes().encode(every))


def test_an_unknown_character_stays_an_error():
    with pytest.raises(Exception, match="UNK"):
        as_subwords(TOKENIZERS["characters"]).encode("Z")


# --- the command --------------------------------------------------------------------------------

TINY = ["--model.layers", 1, "--model.heads", 2, "--model.dim", 16, "--length", 16, "--batch-size", 4]
TINY += ["--optim.optimizer", "adamw", "--steps", 2, "--stop-at", 1]  # no samples are drawn


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command; its exit code and the last line that it said."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["pretrained", *map(str, arguments)])
        code = 0
        try:
            __main__.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = capsys.readouterr()
        return code, (said.err or said.out).strip().splitlines()[-1]

    (tmp_path / "text.txt").write_text("In the beginning was the word, and the word was with a model.\n" * 20)
    return call


def test_export_of_a_run(command, tmp_path):
    """The average's weights. Without biases, it is a GPT-2 whose biases are 0."""
    options = [*TINY, "--data", tmp_path / "text.txt", "--optim.ema", 0.5, "--model.positions", "learned"]
    folder, out = run(gpt, tmp_path, *options), tmp_path / "out"
    assert command("export", folder, out) == (0, f"{out}: config.json, {FILE}, tokenizer.json, tokenizer_config.json")
    found = load_pretrained(out)
    model, params, tokenizer = restored(folder, "newest")
    assert found.tokenizer is not None and found.model.length == 16
    tokens = tokenizer.encode("the beginning")
    np.testing.assert_array_equal(found.tokenizer.encode("the beginning"), tokens)
    expected = jax.jit(model.apply)({"params": params}, tokens[None])
    assert_relative(applied(found, tokens[None]), expected, 1e-6)

    code, said = command("export", folder, out)
    assert (code, said) == (2, f"pretrained: {out} already holds config.json; name a new folder.")
    code, said = command("export", tmp_path / "none", out)
    assert (code, said) == (2, f"pretrained: {tmp_path / 'none'} is not a run: it has no config.json.")
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["model"]["soft_cap"] = 5.0  # as if the run had been one with it
    (folder / "config.json").write_text(json.dumps(saved))
    code, said = command("export", folder, tmp_path / "other")
    assert code == 2 and "against GPT-2 stands --model.soft-cap 5.0;" in said and not (tmp_path / "other").exists()

    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert_relative(theirs(torch.tensor(tokens)[None].long()).logits.numpy(), expected, 1e-5)
