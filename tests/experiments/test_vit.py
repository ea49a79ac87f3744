"""Picture classification from end to end, small: a run with all its parts resumed, what is learned, bad options."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import vit
from jaxarch.data.images import Pictures
from jaxarch.run import ConfigError
from jaxarch.transformer.finished import restored
from jaxarch.transformer.pretrained import load_pretrained, save_pretrained
from jaxarch.transformer.training import TrainState
from jaxarch.transformer.vision import VisionConfig, vision
from tests.run.running import assert_same, exit_code, log, run

TINY = ["--model.layers", 1, "--model.heads", 2, "--model.dim", 8, "--model.patch", 2, 4, "--size", 8]
TINY += ["--batch-size", 4, "--steps", 4, "--eval-every", 4, "--optim.optimizer", "adamw"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of pictures in colour: bright ones and dark ones."""
    rng = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(15):
            pixels = rng.integers(low, low + 96, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(folder, tmp_path):
    """Every augmentation, dropout, accumulation, the average, several steps a dispatch, the report."""
    options = [*TINY, "--data", folder, "--steps", 6, "--eval-every", 6, "--model.dropout", 0.2, "--scan", 3]
    options += ["--optim.accumulate", 2, "--optim.ema", 0.9, "--augment.mixup", 0.5, "--augment.cutmix", 1.0]
    options += ["--augment.flip", True, "--augment.crop", 2]
    whole = run(vit, tmp_path, *options, name="whole")
    run(vit, tmp_path, *options, "--stop-at", 3, name="parts")
    parts = run(vit, tmp_path, "--resume", name="parts")
    assert_same(whole, parts)
    assert json.loads((parts / "assets" / "classes.json").read_text()) == ["bright", "dark"]
    picture = Image.open(whole / "samples" / "0000006" / "predictions.png")
    assert picture.size[0] > 1000 and len(np.unique(np.asarray(picture))) > 100
    assert {"val/loss", "val/accuracy", "train/loss"} <= log(whole)[-1].keys()
    assert abs(log(whole)[0]["val/loss"] - np.log(2)) < 1e-5  # a new head says nothing


def test_a_run_is_taken_up_without_its_data(folder, tmp_path):
    """By what it says of itself: its classes among it, dropout not, with which no weight's meaning changes."""
    first = run(vit, tmp_path, *TINY, "--data", folder, "--model.dropout", 0.2)
    model, params, tokenizer = restored(first)
    assert tokenizer is None and model.labels == ("bright", "dark") and model.image == (8, 8, 3)
    out = tmp_path / "out"
    save_pretrained(out, model, params)
    found = load_pretrained(out)
    pictures = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 3)), jnp.float32)
    expected = jax.jit(model.apply)({"params": params}, pictures)
    np.testing.assert_array_equal(jax.jit(found.model.apply)({"params": found.params}, pictures), expected)
    run(vit, tmp_path, *TINY, "--data", folder, "--model.dropout", 0.0, "--init-from", first, name="again")
    other = run(vit, tmp_path, *TINY, "--data", folder, "--model.pooling", "mean", name="mean")
    with pytest.raises(ConfigError, match="the run neither of a decoder nor of a model of a published family"):
        restored(other)


def test_weights_for_other_classes_are_refused(folder, tmp_path, capsys):
    first = run(vit, tmp_path, *TINY, "--data", folder)
    run(vit, tmp_path, *TINY, "--data", folder, "--split-seed", 1, "--init-from", first, name="b")
    (folder / "dark").rename(folder / "night")
    assert exit_code(vit, "--runs", tmp_path, "--name", "c", *TINY, "--data", folder, "--init-from", first) == 2
    assert "classes.json is not this run's" in capsys.readouterr().err


MODEL = vision(VisionConfig(1, 2, 8, (2, 2)), (4, 4, 1), ("a", "b", "c"))


def shaken() -> dict:
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), *MODEL.inputs())["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def batch_of(count: int) -> Pictures:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, 4, 4, 1), np.uint8)
    weights = (np.arange(count) // 3 % 3).astype(np.float32)
    return Pictures(jnp.asarray(pixels), jnp.asarray(np.arange(count) % 3, jnp.int32), jnp.asarray(weights))


def test_the_loss_and_the_accuracy_by_hand():
    """Smoothed by 0.3, a third of which is each class's: the target is 0.8 for the true one and 0.1 for the others."""
    params, batch = shaken(), batch_of(11)
    logits = np.asarray(jax.jit(MODEL.apply)({"params": params}, batch.pixels / 127.5 - 1), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.full((11, 3), 0.1)
    targets[np.arange(11), batch.labels] = 0.8
    losses = -(targets * log_probs).sum(-1)
    objective = vit.classification(MODEL, vit.AugmentConfig(crop=0, smoothing=0.3))
    total, weight = jax.jit(objective)(params, batch, jax.random.key(0))
    assert weight == np.sum(batch.weights)
    np.testing.assert_allclose(total, (losses * batch.weights).sum(), rtol=1e-5)

    state = TrainState(params, (), None, jax.random.key(0), ())
    held = Pictures(*(np.asarray(leaf) for leaf in batch))
    metrics = jax.jit(vit.make_evaluate(MODEL, held, batch_size=4))(state, jax.random.key(0))
    plain = -log_probs[np.arange(11), batch.labels]
    hits = (logits.argmax(-1) == batch.labels) * batch.weights
    np.testing.assert_allclose(metrics["val/loss"].total, (plain * batch.weights).sum(), rtol=1e-5)
    assert (metrics["val/accuracy"].total, metrics["val/accuracy"].weight) == (hits.sum(), np.sum(batch.weights))


def test_with_both_mixes_it_is_one_of_them_a_step():
    """A mix of the pictures' numbers, or a box of one of them."""
    pictures = jnp.broadcast_to(jnp.arange(1.0, 9)[:, None, None, None], (8, 6, 6, 1))
    augment = vit.AugmentConfig(crop=0, mixup=1.0, cutmix=1.0)
    apply = jax.jit(lambda key: vit.augmented(key, pictures, jnp.eye(8), augment))
    blended = []
    for seed in range(12):
        mixed, targets = (np.asarray(part) for part in apply(jax.random.key(seed)))
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), targets @ np.arange(1.0, 9), rtol=1e-5)
        blended.append(not np.isin(mixed, np.arange(1.0, 9)).all())
    assert 0 < sum(blended) < 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model.heads", 5], "vit: --model.heads 5 does not divide --model.dim 8; --model.dim 10 would do."),
        (["--model.patch", 3, 3], "vit: --model.patch 3 3 does not divide pictures of 8 x 8 pixels"),
        (["--data", "nothing"], "vit: --data nothing does not exist; give digits"),
        (["--held-out", 0], "vit: --held-out 0 is not a fraction between 0 and 1"),
        (["--size", -8], "vit: --size -8 is below 0"),
        (["--augment.mixup", -1], "vit: --augment.mixup -1 is not 0 or above; 0 is off."),
        (["--augment.smoothing", 1], "vit: --augment.smoothing 1 is not in [0, 1); 0.1 is usual."),
        (["--optim.accumulate", 3], "vit: --optim.accumulate 3 does not divide --batch-size 4."),
        (["--split-seed", -1], "vit: --split-seed -1 is below 0."),
        (["--steps", 0], "vit: --steps 0 is below 1."),
        (["--modle.dim", 3], "vit: unknown option --modle.dim; did you mean --model.dim?"),
    ],
)
def test_usage(arguments, message, folder, tmp_path, capsys):
    assert exit_code(vit, *TINY, "--data", folder, *arguments, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_it_learns_the_digits(tmp_path):
    """Three seeds at once, as their own runs (see the experiment for what was measured)."""
    pytest.importorskip("sklearn")
    last = log(run(vit, tmp_path, "--replicas", 3, "--eval-every", 2000))[-1]
    found = last["val/accuracy/replicas"]
    assert len(found) == 3 and min(found) >= 0.96 and np.mean(found) >= 0.97


def test_the_default_pictures():
    """They fit the default patches."""
    pytest.importorskip("sklearn")
    experiment = vit.experiment(vit.Config(steps=2))
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(experiment.data[i] for i in range(4)))
    state = jax.eval_shape(experiment.init, jax.random.key(0), experiment.hypers)
    _, metrics = jax.eval_shape(experiment.step, state, batch, jnp.int32(0))
    assert batch.pixels.shape == (4, 8, 8, 1) and "train/loss" in metrics
    assert state.params["head"]["kernel"].shape == (64, 10) and state.params["positions"].shape == (1, 17, 64)
