"""StyleGAN from end to end, small: runs with all their parts resumed, what they report, presets, bad options."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import stylegan
from jaxarch.gan.finished import pictures, restored
from jaxarch.gan.stylegan2 import StyleGAN2Generator
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--size", 4, "--batch-size", 4, "--model.latent-dim", 3, "--model.style-dim", 4, "--model.mapping-layers", 1]
TINY += ["--model.channel-base", 16, "--model.channel-max", 4]
R3GAN = ["--r3gan.latent-dim", 3, "--r3gan.channel-max", 4, "--r3gan.group-width", 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of one class, so that no classifier has to be trained."""
    place = tmp_path_factory.mktemp("data") / "shades"
    place.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(place / f"{number}.png")
    return place


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(folder, tmp_path):
    """Lazy R1, path lengths, the mean style, labels, the average, truncated pictures."""
    options = [*TINY, "--data", folder, "--steps", 6, "--eval-every", 6, "--game.penalty-every", 2]
    options += ["--game.path-length", 2, "--model.mixing", 0.9]
    options += ["--conditional", True]
    whole = run(stylegan, tmp_path, *options, "--checkpoint-every", 3)
    assert_same(whole, resumed(stylegan, whole, 3))
    assert {"train/path_length", "train/penalty", "val/fid[pixels]"} <= set().union(*log(whole))
    samples = whole / "samples" / "0000006"
    with Image.open(samples / "fakes.png") as plain, Image.open(samples / "truncated.png") as near:
        assert plain.size == near.size and (np.asarray(plain) != np.asarray(near)).any()
    finished = restored(whole)
    assert isinstance(finished.generator, StyleGAN2Generator) and finished.classes == ("shades",)
    assert np.abs(finished.variables["averages"]["style"]).max() > 0
    plain, near = (pictures(finished, jax.random.key(0), np.zeros(8, int), truncation=share) for share in (1.0, 0.0))
    assert near.shape == (8, 4, 4, 3) and 0 < near.std(0).mean() < 0.3 * plain.std(0).mean()  # noise alone


def test_the_backbone_of_r3gan(folder, tmp_path):
    options = [*TINY, *R3GAN, "--data", folder, "--steps", 2, "--eval-every", 2, "--backbone", "r3gan"]
    done = run(stylegan, tmp_path, *options)
    assert {"train/penalty", "val/fid[pixels]"} <= set().union(*log(done))
    assert not (done / "samples" / "0000002" / "truncated.png").exists()
    assert type(restored(done).generator).__name__ == "R3GANGenerator"


def test_what_depends_on_pictures_and_precision(folder):
    """R1's weight is 0.0002 * 16 * 16 / 8 = 0.0064 unless it is given; in bf16 activations have a bound."""
    for options, gamma, clamp in (
        ({}, 0.0064, 0.0),
        ({"precision": "bf16"}, 0.0064, 256.0),
        ({"game": stylegan.LAZY}, 1.0, 0.0),
    ):
        game = stylegan.GameConfig(gamma=0.0)
        config = stylegan.Config(str(folder), size=16, batch_size=8, **{"game": game, **options})
        settled = stylegan.settled(config, stylegan.dcgan.load(config))
        assert settled.game.gamma == pytest.approx(gamma) and settled.model.clamp == clamp
        assert stylegan.experiment(config).hypers.gamma == pytest.approx(gamma)


@pytest.mark.parametrize("name", ["", *stylegan.PRESETS])
def test_presets_play_their_game(name):
    """Shapes alone: of the step on a batch of their data."""
    pytest.importorskip("sklearn")
    pytest.importorskip("resvg_py")
    built = stylegan.experiment(stylegan.PRESETS[name] if name else stylegan.Config())
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(built.data[i] for i in range(4)))
    state = jax.eval_shape(built.init, jax.random.key(0), built.hypers)
    after, metrics = jax.eval_shape(built.step, state, batch, jax.ShapeDtypeStruct((), np.int32))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert ("train/path_length" in metrics) == (name == "paper") and "train/penalty" in metrics
    assert state.augmentation is None and built.batch_size == (16 if name == "emoji" else 32)
    assert ("from_rgb" in state.discriminator) == (name == "r3gan")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", 12], "stylegan: pictures of 12 x 12 pixels are not square, of 4, 8, 16 ... pixels; --size 32 is."),
        (
            ["--backbone", "r3gan", "--game.path-length", 2],
            "stylegan: --game.path-length is of StyleGAN2's styles; it is 0 for --backbone",
        ),
        (["--model.mixing", 2], "stylegan: --model.mixing 2 is not in [0, 1]; 0.9 is usual."),
        (["--conditional", True, "--game.pack", 2], "stylegan: --game.pack joins samples of several labels"),
        (["--batch-size", 0], "stylegan: --batch-size 0 is below 1."),
        (["--data", "nowhere"], "stylegan: --data nowhere does not exist"),
    ],
)
def test_bad_options_are_one_clear_line(options, message, folder, tmp_path, capsys):
    assert exit_code(stylegan, "--runs", tmp_path / "runs", *TINY, "--data", folder, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()
