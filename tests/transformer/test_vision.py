"""The Vision Transformer: its parts against their definitions, published weights against recorded and live models."""

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
from jaxarch.transformer.blocks import attention_weights, stack_layers
from jaxarch.transformer.pretrained import load_pretrained, save_pretrained
from jaxarch.transformer.vision import (
    PatchEmbedding,
    VisionConfig,
    at_resolution,
    interpolated,
    looked_at,
    patches,
    rollout,
    vision,
)
from tests.transformer.record_vit import OTHER_SIZES, PLACE, RECORDED, VARIANTS, answer, pictures, published

FILE = "model.safetensors"
SMALL = VisionConfig(layers=2, heads=2, dim=8, patch=(2, 3))
IMAGE = (4, 9, 2)
KEY = jax.random.key(0)


def shaken(model, seed: int = 0) -> Any:
    """Parameters of which none is 0 or 1, so that no part is without effect."""
    shapes = jax.eval_shape(model.init, KEY, *model.inputs())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), shapes)


def some(count: int, image: tuple[int, int, int] = IMAGE, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *image)).astype(np.float32)


def assert_relative(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- patches ------------------------------------------------------------------------------------


def test_patches_by_hand():
    """A picture of 4 x 6 pixels whose number is 10 row + column: the second patch of 2 x 3 begins at 3."""
    picture = (10 * np.arange(4)[:, None] + np.arange(6))[None, :, :, None].astype(np.float32)
    expected = [[0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15], [20, 21, 22, 30, 31, 32], [23, 24, 25, 33, 34, 35]]
    np.testing.assert_array_equal(patches(jnp.asarray(picture), (2, 3))[0], expected)


def test_the_embedding_is_a_strided_convolution():
    x = jnp.asarray(some(2))
    module = PatchEmbedding(8, (2, 3))
    params = shaken_of(module, x)
    convolved = jax.lax.conv_general_dilated(
        x, params["kernel"], (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        module.apply({"params": params}, x), convolved.reshape(2, -1, 8) + params["bias"], rtol=1e-5, atol=1e-5
    )


def shaken_of(module, x: jax.Array) -> Any:
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


# --- the model ----------------------------------------------------------------------------------


def by_hand(params: Any, x: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Dosovitskiy et al. 2021, eq. 1 to 4, in float64: logits of one picture."""
    p: Any = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    down, across = config.patch
    cut = [
        x[row : row + down, column : column + across].reshape(-1)
        for row in range(0, x.shape[0], down)
        for column in range(0, x.shape[1], across)
    ]
    z = np.stack(cut).astype(np.float64) @ p["patches"]["kernel"].reshape(-1, config.dim) + p["patches"]["bias"]
    if config.pooling == "class":
        z = np.concatenate([p["class_token"][0], z])
    z = z + p["positions"][0]

    def norm(z, own):
        z = z - z.mean(-1, keepdims=True)
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + config.eps) * own["scale"] + own["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    for number in range(config.layers):
        layer = p[f"layers_{number}"]
        y = norm(z, layer["attention_norm"])
        q, k, v = (y @ layer["attention"][name]["kernel"] for name in ("query", "key", "value"))
        if config.qkv_bias:
            q, k, v = (t + layer["attention"][name]["bias"] for t, name in zip((q, k, v), ("query", "key", "value")))
        width = config.dim // config.heads
        heads = []
        for head in range(config.heads):
            own = slice(head * width, (head + 1) * width)
            logits = q[:, own] @ k[:, own].T / np.sqrt(width)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
        z = z + np.concatenate(heads, -1) @ layer["attention"]["out"]["kernel"] + layer["attention"]["out"]["bias"]
        up, to = layer["feed_forward"]["up"], layer["feed_forward"]["down"]
        y = norm(z, layer["feed_forward_norm"])
        z = z + gelu(y @ up["kernel"] + up["bias"]) @ to["kernel"] + to["bias"]
    z = norm(z, p["norm"])
    pooled = z[0] if config.pooling == "class" else z.mean(0)
    return pooled @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("options", [{}, {"pooling": "mean", "qkv_bias": False, "mlp_dim": 5, "eps": 0.1}])
def test_the_model_is_its_definition(options):
    config = VisionConfig(**{"layers": 2, "heads": 2, "dim": 8, "patch": (2, 3)} | options)
    model = vision(config, IMAGE, ("a", "b", "c"))
    params, x = shaken(model), some(3)
    found = jax.jit(model.apply)({"params": params}, x)
    assert_relative(found, np.stack([by_hand(params, one, config) for one in x]), 2e-6)


def test_scanned_recomputed_or_in_bfloat16_it_is_the_same_model():
    model = vision(SMALL, IMAGE, ("a", "b"))
    params, x = shaken(model), some(3)
    expected = jax.jit(model.apply)({"params": params}, x)
    other = vision(VisionConfig(2, 2, 8, (2, 3), scan_layers=True, remat=True), IMAGE, ("a", "b"))
    assert_relative(jax.jit(other.apply)({"params": stack_layers(params)}, x), expected, 1e-6)
    half = jax.jit(vision(SMALL, IMAGE, ("a", "b"), dtype=jnp.bfloat16).apply)({"params": params}, x)
    assert half.dtype == jnp.float32
    assert_relative(half, expected, 0.05)


def test_a_new_head_says_nothing_and_dropout_needs_a_key():
    model = vision(VisionConfig(1, 2, 8, (2, 3), dropout=0.5), IMAGE, ("a", "b"))
    params = jax.jit(model.init)(KEY, *model.inputs())["params"]
    x = some(2)
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, x), np.zeros((2, 2)))
    params = shaken(model)

    @jax.jit
    def applied(key):
        return model.apply({"params": params}, x, deterministic=False, rngs={"dropout": key})

    one, again, other = (applied(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_without_a_head_it_gives_all_tokens():
    model = vision(SMALL, IMAGE)
    assert jax.eval_shape(model.apply, {"params": shaken(model)}, some(3)).shape == (3, 7, 8)
    with pytest.raises(ValueError, match="are not of"):
        model.apply({"params": shaken(model)}, some(3, (4, 6, 2)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"heads": 5}, "--model.heads 5 does not divide --model.dim 64; --model.dim 65 would do."),
        ({"layers": 0}, "--model.layers 0 is below 1."),
        ({"patch": (2, 0)}, "--model.patch 2 0 has a side below 1."),
        ({"patch": (3, 2)}, "--model.patch 3 2 does not divide pictures of 8 x 8 pixels."),
        ({"eps": 0.0}, "--model.eps 0 is not above 0; 1e-6 is usual."),
        ({"dropout": 1.0}, "--model.dropout 1 is not in [0, 1); 0.1 is usual."),
        ({"mlp_dim": -1}, "--model.mlp-dim -1 is below 0; 0 is the default."),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        vision(VisionConfig(**wrong), (8, 8, 1))


# --- other resolutions --------------------------------------------------------------------------


def test_interpolation_by_hand():
    """Two points a, b become four: the first lies 1/4 before a, where Keys' kernel gives b the weight 1.25's.

    With the points beyond the edge equal to a: a (1 - w(1.25)) + b w(1.25), w(x) = -0.75 (x^3 - 5 x^2 + 8 x - 4).
    """
    a, b, token = 2.0, -3.0, 7.0
    positions = jnp.array([token, a, b])[None, :, None]
    beyond = -0.75 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    inner = (1.25 * 0.75**3 - 2.25 * 0.75**2 + 1) + -0.75 * (1.75**3 - 5 * 1.75**2 + 8 * 1.75 - 4)
    expected = [token] + [one + weight * (other - one) for one, other, weight in
                          ((a, b, beyond), (a, b, inner), (b, a, inner), (b, a, beyond))]  # fmt: skip
    for old, new in (((1, 2), (1, 4)), ((2, 1), (4, 1))):
        found = jax.jit(partial(interpolated, old=old, new=new))(positions)
        np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-6)


def test_interpolation_to_the_same_grid_changes_nothing():
    positions = jax.random.normal(KEY, (1, 13, 4))
    assert interpolated(positions, (3, 4), (3, 4)) is positions
    assert interpolated(positions, (3, 4), (4, 3)).shape == (1, 13, 4)


@pytest.mark.parametrize("old, new", [((4, 4), (7, 3)), ((14, 14), (5, 24)), ((1, 3), (2, 2)), ((3, 2), (3, 5))])
def test_interpolation_is_torchs(old, new):
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 5)).astype(np.float32)
    picture = torch.tensor(positions[:, 1:].reshape(1, *old, 5).transpose(0, 3, 1, 2))
    theirs = torch.nn.functional.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    expected = theirs.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 5)
    found = jax.jit(partial(interpolated, old=old, new=new))(positions)
    assert_relative(found[:, 1:], expected, 1e-6)
    np.testing.assert_array_equal(found[:, 0], positions[:, 0])


def test_a_model_at_another_resolution():
    model = vision(SMALL, IMAGE, ("a", "b"))
    params = shaken(model)
    same, kept = at_resolution(model, params, 4, 9)
    assert same == model and kept["positions"] is params["positions"]
    other, moved = at_resolution(model, params, 8, 6)
    assert other.grid == (4, 2) and jax.eval_shape(other.apply, {"params": moved}, some(2, (8, 6, 2))).shape == (2, 2)
    assert all(moved[name] is params[name] for name in params if name != "positions")
    with pytest.raises(ConfigError, match="patches of 2 x 3 do not divide pictures of 8 x 8 pixels"):
        at_resolution(model, params, 8, 8)


# --- what it looks at ---------------------------------------------------------------------------


def test_rollout_by_hand():
    """Two layers, of two heads and of one, on two tokens."""
    first = np.array([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])
    second = np.array([[[[0.2, 0.8], [1.0, 0.0]]]])
    mixed = np.array([[0.75, 0.25], [0.25, 0.75]])
    expected = np.array([[0.6, 0.4], [0.5, 0.5]]) @ mixed
    np.testing.assert_allclose(rollout([jnp.asarray(first), jnp.asarray(second)])[0], expected, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_what_the_head_reads_of_each_patch(pooling):
    config = VisionConfig(2, 2, 8, (2, 3), pooling=pooling)
    model = vision(config, IMAGE, ("a", "b"))
    params, x = shaken(model), jnp.asarray(some(3))
    found = np.asarray(jax.jit(partial(looked_at, model))(params, x))
    weights = jax.jit(partial(attention_weights, model))({"params": params}, x)
    shares = np.asarray(rollout([weights["layers_0.attention"], weights["layers_1.attention"]]))
    shares = shares[:, 0, 1:] if pooling == "class" else shares.mean(1)
    np.testing.assert_allclose(found, (shares / shares.sum(1, keepdims=True)).reshape(3, 2, 3), rtol=1e-6)
    np.testing.assert_allclose(found.sum((1, 2)), 1, rtol=1e-5)
    scanned = vision(VisionConfig(2, 2, 8, (2, 3), pooling=pooling, scan_layers=True), IMAGE, ("a", "b"))
    np.testing.assert_allclose(jax.jit(partial(looked_at, scanned))(stack_layers(params), x), found, rtol=1e-5)


# --- published weights --------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """By the variant's name: its folder, as transformers wrote it, and what was recorded of it."""

    def folder_and_values(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        with safe_open(PLACE / f"{name}.safetensors", framework="np") as file:
            config = file.metadata()["config"]
        tensors = load_file(PLACE / f"{name}.safetensors")
        values = {key.removeprefix("recorded."): tensors.pop(key) for key in list(tensors) if "recorded." in key}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / FILE, {"format": "pt"})
        (folder / "config.json").write_text(config)
        return folder, values

    return folder_and_values


def changed(folder: Path, **fields: Any) -> Path:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | fields))
    return folder


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = load_file(one / FILE), load_file(other / FILE)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and np.array_equal(tensor, right[name]), name


@pytest.mark.parametrize("name", RECORDED)
def test_answers_are_the_recorded_ones_and_the_tensors_come_back(name, recorded, tmp_path):
    folder, values = recorded(name)
    found = load_pretrained(folder)
    assert_relative(jax.jit(found.model.apply)({"params": found.params}, values["pictures"]), values["answer"], 2e-6)
    save_pretrained(tmp_path / "saved", *found)
    assert_same_tensors(tmp_path / "saved", folder)
    again = load_pretrained(tmp_path / "saved")
    same = ("config", "image", "labels", "pooler")
    assert all(getattr(again.model, field) == getattr(found.model, field) for field in same)
    assert again.config["id2label"] == {"0": "cat", "1": "dog", "2": "eel"} and again.config["label2id"]["dog"] == 1
    if name == "vit":
        assert found.model.labels == ("cat", "dog", "eel") and found.model.grid == (2, 6)


@pytest.mark.parametrize("other", OTHER_SIZES)
def test_answers_at_another_resolution_are_the_recorded_ones(other, recorded):
    folder, values = recorded("vit_body")
    found = load_pretrained(folder)
    height, width = OTHER_SIZES[other]
    model, params = at_resolution(found.model, found.params, height, width)
    found = jax.jit(model.apply)({"params": params}, values[f"{other}.pictures"])
    assert_relative(found, values[f"{other}.answer"], 5e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_agrees(name, tmp_path):
    """Live: what the heads and the tokens are, gradients, and what it reads of what is written here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs, x = published(name), pictures(name)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_pretrained(tmp_path / "theirs")

    def loss(params):
        given = found.model.apply({"params": params}, x)
        return jnp.square(given).mean(), given

    (_, given), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(found.params)
    expected = answer(theirs, x)
    expected.square().mean().backward()
    assert_relative(given, expected.detach().numpy(), 1e-5)
    save_pretrained(tmp_path / "gradients", found.model, grads)
    written = load_file(tmp_path / "gradients" / FILE)
    theirs_too = type(theirs)(theirs.config)
    for own, other in zip(theirs_too.parameters(), theirs.parameters(), strict=True):
        own.data = other.grad
    theirs_too.save_pretrained(tmp_path / "expected")
    wanted = load_file(tmp_path / "expected" / FILE)  # under the names of the folder
    assert written.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for key, gradient in written.items():
        if key.endswith("key.bias"):  # adds the same to all logits of a query, which a softmax does not see
            assert np.abs(gradient).max() < 1e-6 * largest and np.abs(wanted[key]).max() < 1e-6 * largest
        else:
            assert_relative(gradient, wanted[key], 1e-4)

    tokens = jax.jit(found.model.clone(labels=(), pooler=None).apply)
    body = {key: value for key, value in found.params.items() if key != "head"}
    hidden = getattr(theirs, "vit", theirs)(torch.tensor(x.transpose(0, 3, 1, 2))).last_hidden_state
    assert_relative(tokens({"params": body}, x), hidden.detach().numpy(), 1e-5)

    save_pretrained(tmp_path / "ours", found.model, found.params)
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for (key, parameter), other in zip(theirs.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(parameter, other), key
    assert_relative(answer(back, x).detach().numpy(), expected.detach().numpy(), 1e-6)
    auto = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    for field in ("hidden_act", "qkv_bias", "image_size", "patch_size", "num_channels", "layer_norm_eps", "pooler_act"):
        assert getattr(auto, field) == getattr(theirs.config, field), field
    if found.model.labels:
        assert auto.id2label == theirs.config.id2label and auto.label2id == theirs.config.label2id


def test_a_body_becomes_a_classifier_with_a_new_head(recorded, caplog):
    folder, _ = recorded("vit_body")
    new = {"architecture": "ViTForImageClassification", "overrides": {"num_labels": 4}}
    found = load_pretrained(folder, **new)
    assert found.model.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    assert found.params["head"]["kernel"].shape == (16, 4) and not found.params["head"]["kernel"].any()
    assert "classifier.weight, classifier.bias are new" in caplog.messages[0]
    assert "vit.pooler.dense.bias, vit.pooler.dense.weight are left out" in caplog.messages[1]


BAD = {
    "hidden_act mish cannot be expressed here, only gelu or": {"hidden_act": "mish"},
    "patch_size is [2, 2, 2], not a height and a width.": {"patch_size": [2, 2, 2]},
    "image_size[0] is '8', not of type int.": {"image_size": "8"},
    "--model.patch 3 3 does not divide pictures of 8 x 12 pixels.": {"patch_size": 3},
    "id2label is {'1': 'a'}, not the names of the labels 0, 1 ...": {"id2label": {"1": "a"}},
    "num_channels 0 is below 1.": {"num_channels": 0},
    "num_labels 0 is below 1.": {"num_labels": 0},
    "head_dim 8 cannot be expressed here, only 4.": {"head_dim": 8},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_config_is_one_clear_line(message, recorded):
    folder, _ = recorded("vit")
    with pytest.raises(ConfigError, match=re.escape(f"{folder}/config.json: {message}")) as error:
        load_pretrained(changed(folder, **BAD[message]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (partial(vision, SMALL, IMAGE), "against ViT stands that it has no head."),
        (
            partial(vision, VisionConfig(1, 2, 8, (2, 3), pooling="mean"), IMAGE, ("a", "b")),
            "against ViT stands --model.pooling mean.",
        ),
    ],
)
def test_a_model_that_is_no_published_one_is_refused(make, message, tmp_path):
    model = make()
    with pytest.raises(ConfigError, match=re.escape(message)):
        save_pretrained(tmp_path / "a", model, shaken(model))
