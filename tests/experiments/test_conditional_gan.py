"""A conditional GAN from end to end, small: each way of telling labels; that they are obeyed."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import conditional_gan
from jaxarch.gan import features
from jaxarch.gan.finished import pictures, restored
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--model.deep", False, "--size", 8, "--batch-size", 6, "--model.latents", 3, "--model.features", 2]
LARGER = ["--model.deep", False, "--size", 8, "--batch-size", 16, "--model.latents", 4, "--model.features", 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Dark pictures and bright ones."""
    place = tmp_path_factory.mktemp("data") / "shades"
    rng = np.random.default_rng(0)
    for name, low in (("bright", 180), ("dark", 0)):
        (place / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(rng.integers(low, low + 76, (8, 8, 1), np.uint8)[..., 0]).save(
                place / name / f"{number}.png"
            )
    return place


@pytest.fixture(autouse=True)
def no_classifier(monkeypatch):
    """Pixels are features, and what fakes teach is not looked at: both take longer than all else here."""
    monkeypatch.setattr(features, "classifier", lambda data, say: features.pixels(8, data.shape[2]))
    taught = {"val/cas[shades-cnn]": jnp.float32(0.5), "val/cas_real[shades-cnn]": jnp.float32(1.0)}
    monkeypatch.setattr(features, "trained_on_fakes", lambda fakes, data: taught)


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(folder, tmp_path):
    options = [*TINY, "--data", folder, "--steps", 4, "--eval-every", 4, "--discriminator", "auxiliary"]
    options += ["--generator", "embedding", "--gray", True]
    whole = run(conditional_gan, tmp_path, *options, "--checkpoint-every", 2)
    assert_same(whole, resumed(conditional_gan, whole, 2))
    assert "val/cas[shades-cnn]" in log(whole)[-1] and "val/cas[shades-cnn]" not in log(whole)[0]
    assert restored(whole).classes == ("bright", "dark")


@pytest.mark.parametrize(
    ("generator", "discriminator"),
    [("embedding", "embedding"), ("batch_norm", "projection")],
)
def test_labels_are_obeyed(generator, discriminator, folder, tmp_path):
    """Bright ones are brighter than dark ones, after some seconds of learning."""
    options = [*LARGER, "--data", folder, "--gray", True, "--steps", 200, "--eval-every", 200]
    options += ["--optim.learning-rate", 4e-3]
    told = ["--generator", generator, "--discriminator", discriminator]
    finished = restored(run(conditional_gan, tmp_path, *options, *told))
    made = pictures(finished, jax.random.key(0), np.arange(40) % 2)
    levels = made.mean(axis=(1, 2, 3))
    assert levels[0::2].min() > levels[1::2].max() + 0.2


def test_each_network_is_told_in_its_way(folder):
    """A plane of 64 pixels or a vector of 128 features for each of two classes, or two logits; vectors or scales."""
    found = {}
    for generator in ("embedding", "batch_norm"):
        for discriminator in ("embedding", "projection", "auxiliary"):
            config = conditional_gan.Config(str(folder), generator=generator, discriminator=discriminator, size=8)
            built = conditional_gan.experiment(config)
            state = jax.eval_shape(built.init, jax.random.key(0), built.hypers)
            g, d = (jax.tree.map(lambda leaf: leaf.shape, part) for part in (state.generator, state.discriminator))
            found[generator] = g["norm_0"]["scale"], "embedding" in g
            found[discriminator, "d"] = d.get("embedding", d.get("classes"))
    assert found["embedding"] == ((128,), True) and found["batch_norm"] == ((2, 128), False)
    assert found["embedding", "d"] == {"embedding": (2, 64)} and found["projection", "d"] == {"embedding": (2, 128)}
    assert found["auxiliary", "d"]["kernel"] == (16 * 128, 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--game.pack", 2], "conditional_gan: --game.pack joins samples of several labels"),
        (["--discriminator", "batch_norm"], "conditional_gan: "),
    ],
)
def test_bad_options_are_one_clear_line(options, message, folder, tmp_path, capsys):
    assert exit_code(conditional_gan, "--runs", tmp_path / "runs", *TINY, "--data", folder, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()
