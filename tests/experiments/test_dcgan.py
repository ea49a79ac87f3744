"""DCGAN from end to end, small: a run with all its parts resumed, what it reports and leaves, bad options."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import dcgan
from jaxarch.data.images import Pictures, load_images
from jaxarch.gan.dcgan import Generator
from jaxarch.gan.finished import pictures, restored
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--size", 8, "--batch-size", 4, "--model.latents", 3, "--model.features", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of one class, so that no classifier has to be trained; one of them is none."""
    place = tmp_path_factory.mktemp("data") / "shades"
    place.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)).save(place / f"{number}.png")
    (place / "broken.png").write_bytes(b"no picture")
    return place


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(folder, tmp_path, capsys):
    """Batch statistics, DiffAugment, two updates of D, the average."""
    options = [*TINY, "--data", folder, "--gray", True, "--steps", 4, "--eval-every", 4]
    options += ["--model.deep", False, "--model.norm", "batch", "--augment", "diff", "--game.critics", 2]
    whole = run(dcgan, tmp_path, *options, "--checkpoint-every", 2)
    assert "broken.png" in capsys.readouterr().out
    assert_same(whole, resumed(dcgan, whole, 2))
    names = set().union(*log(whole))
    assert {"train/d_loss", "train/g_loss", "train/d_accuracy"} <= names
    assert {"train/g_grad_norm/dense", "train/d_grad_norm/layer_0", "val/fid[pixels]", "val/fid_floor[pixels]"} <= names
    assert not any("cas" in name for name in names)
    samples = whole / "samples"
    assert {path.name for path in (samples / "0000004").iterdir()} == {"fakes.png", "nearest.png"}
    with Image.open(samples / "training.gif") as gif:
        assert gif.n_frames == 2


def test_a_run_is_taken_up_without_its_data(folder, tmp_path):
    """Pictures with opacity, one a step; spectral vectors, of which the generator has none."""
    done = run(dcgan, tmp_path, *TINY, "--data", folder, "--steps", 1, "--alpha", True, "--batch-size", 1)
    finished = restored(done)
    assert isinstance(finished.generator, Generator) and finished.classes == ()
    assert finished.generator.deep and set(finished.variables) == {"params", "batch_stats"}
    some = pictures(finished, jax.random.key(0), np.zeros(3, int))
    assert some.shape == (3, 8, 8, 4) and np.abs(some).max() <= 1


def test_the_default_game_is_that_of_spectral_normalisation():
    """Shapes alone, of the step on a batch of digits."""
    pytest.importorskip("sklearn")
    built = dcgan.experiment(dcgan.Config())
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(built.data[i] for i in range(64)))
    state = jax.eval_shape(built.init, jax.random.key(0), built.hypers)
    after, metrics = jax.eval_shape(built.step, state, batch, jax.ShapeDtypeStruct((), np.int32))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(state.d_stats) == {"spectral"} and set(state.g_stats) == {"batch_stats"}
    assert dcgan.experiment(dcgan.Config(game=dcgan.GameConfig(critics=3))).batch_size == 3 * built.batch_size == 192
    adaptive = dcgan.experiment(dcgan.Config(augment="adaptive"))
    assert jax.eval_shape(adaptive.init, jax.random.key(0), adaptive.hypers).augmentation is not None
    assert "train/penalty" not in metrics and built.monitor == "val/fid[digits-cnn]"


@pytest.mark.parametrize("augment", ["none", "diff", "adaptive"])
def test_options_reach_what_they_are_of(augment, folder, monkeypatch):
    read, played = {}, []
    monkeypatch.setattr(dcgan, "load_images", lambda *args, **named: read.update(named) or load_images(*args, **named))
    monkeypatch.setattr(dcgan, "make_step", lambda *args: played.extend(args))
    said = {"gray": False, "alpha": True, "held_out": 0.3, "split_seed": 5, "strict": False}
    config = dcgan.Config(
        str(folder), 8, **said, data_seed=6, eval_pictures=13, steps=7, batch_size=4, precision="bf16", augment=augment
    )
    dcgan.experiment(config)
    assert {"size": 8, "seed": 6, "most_held_out": 13, **said}.items() <= read.items()
    generator, discriminator, game, optim, prepare, steps, given = played
    assert generator.dtype == discriminator.dtype == jnp.bfloat16
    assert (game, optim, steps) == (config.game, config.optim, 7)
    pixels = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
    samples, condition = prepare(Pictures(pixels, np.arange(3), np.ones(3, np.float32)))
    np.testing.assert_allclose(samples.reshape(-1), [-1, 1, -0.6], atol=1e-6)
    assert condition is None and (given is None) == (augment == "none")
    if given is not None:
        assert given.adapt is None if augment == "diff" else given.adapt.keywords["batch_size"] == 4


@pytest.mark.slow
def test_digits_are_learned(tmp_path):
    """A fifth of the default's length: untrained, the distance is above 60; the default's is below 1."""
    done = run(dcgan, tmp_path, "--steps", 600, "--model.features", 32, "--eval-every", 600)
    assert log(done)[0]["val/fid[digits-cnn]"] > 40
    assert log(done)[-1]["val/fid[digits-cnn]"] < 5


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", 12], "dcgan: --size 12 is not 8, 16, 32, 64 or another power of two."),
        (["--steps", 0], "dcgan: --steps 0 is below 1."),
        (["--data-seed", -1], "dcgan: --data-seed -1 is below 0."),
        (["--game.pack", 3], "dcgan: --game.pack 3 does not divide --batch-size 4."),
        (["--model.features", 0], "dcgan: --model.features 0 is below 1."),
        (["--strict", True], "dcgan: "),
        (["--data", "nowhere"], "dcgan: --data nowhere does not exist"),
    ],
)
def test_bad_options_are_one_clear_line(options, message, folder, tmp_path, capsys):
    assert exit_code(dcgan, "--runs", tmp_path / "runs", *TINY, "--data", folder, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1 and not (tmp_path / "runs").exists()
    assert "--strict" not in options or "broken.png" in error
