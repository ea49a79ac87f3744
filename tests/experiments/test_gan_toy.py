"""The toy GANs from end to end: resumed, over replicas, what is learned by several seeds, bad options."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import gan_toy
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--width", 8, "--layers", 1, "--batch-size", 16, "--steps", 8, "--eval-every", 4]


@pytest.mark.parametrize("way", [[], ["--replicas", 2, "--scan", 2]], ids=["solo", "replicas"])
def test_stopped_and_resumed_is_uninterrupted(way, tmp_path):
    options = [*TINY, *way, "--game.penalty-every", 3, "--game.critics", 2, "--game.pack", 2]
    options += ["--game.gamma-final", 0.1, "--optim.final", 0.1, "--game.reuse-fakes", True]
    whole = run(gan_toy, tmp_path, *options, "--checkpoint-every", 5)
    assert_same(whole, resumed(gan_toy, whole, 5))
    assert {"val/modes", "val/high_quality", "val/reverse_kl"} <= log(whole)[-1].keys()
    picture = next((whole / "samples").rglob("points.png"))
    assert len(np.unique(np.asarray(Image.open(picture)))) > 20


def test_stacked_digits_stopped_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(gan_toy, "STACKED", 2000)
    monkeypatch.setattr(gan_toy, "classifier", untrained)
    options = ["--data", "stacked", "--width", 4, "--latents", 4, "--batch-size", 4, "--steps", 4, "--eval-every", 4]
    whole = run(gan_toy, tmp_path, *options, "--checkpoint-every", 2)
    assert_same(whole, resumed(gan_toy, whole, 2))
    assert {"val/modes", "val/reverse_kl", "val/reverse_kl_floor"} <= log(whole)[-1].keys()


def test_a_step_draws_its_own_samples(monkeypatch):
    """As many as its turns need, other ones in each step and replica."""
    given = []
    monkeypatch.setattr(gan_toy, "make_step", lambda *args: given.extend(args) or (lambda *step: (step, {})))
    config = gan_toy.Config("grid", steps=9, batch_size=100, width=4, layers=1, game=gan_toy.GameConfig(critics=5))
    built = gan_toy.experiment(config)
    state = gan_toy.GANState(**(dict.fromkeys(gan_toy.GANState.__dataclass_fields__) | {"key": jax.random.key(0)}))
    (_, one, _), _ = built.step(state, None, jnp.int32(0))
    (_, other, _), _ = built.step(state, None, jnp.int32(1))
    (_, replica, _), _ = built.step(state.replace(key=jax.random.key(1)), None, jnp.int32(0))
    assert one.shape == other.shape == (500, 2) and len(np.unique([one, other, replica])) > 2990
    assert gan_toy.toy.modes_of(one, gan_toy.toy.grid()).found == 25 and given[-1] == 9
    np.testing.assert_array_equal(given[-2](one)[0], one)
    assert given[-2](one)[1] is None and given[2:4] == [config.game, config.optim]


def test_numbers_are_read_of_stacked_digits(monkeypatch):
    """Three samples with a 1 in one place each are three numbers, of the thousand as many as the classifier tells."""
    monkeypatch.setattr(gan_toy, "STACKED", 3000)
    monkeypatch.setattr(gan_toy, "classifier", untrained)
    task = gan_toy.stacked_digits(gan_toy.Config("stacked", latents=4, width=4))
    digits = jnp.tile(jnp.eye(3, dtype=int), (334, 1))[:1000]
    # The middle of the greys that are read as this digit.
    samples = jnp.broadcast_to(((digits + 0.5) * 25.6 / 127.5 - 1)[:, None, None], (1000, 8, 8, 3))
    found = jax.jit(lambda key: task.measure(lambda key, count: samples[:count], key))(jax.random.key(0))
    assert found["val/modes"] == 3
    np.testing.assert_allclose(found["val/reverse_kl"], np.log(1000 / 3), rtol=1e-4)
    # Of real ones the three channels are drawn one by one: as many numbers as three times as many single digits say.
    real = np.asarray(task.draw(jax.random.key(0), 26_000)[:, 3, 3])
    read = np.floor((real + 1) * 127.5 * 10 / 256 + 1e-4).astype(int)
    share = np.bincount(read.reshape(-1), minlength=10) / read.size
    joint = np.bincount(read @ [1, 10, 100], minlength=1000).reshape(10, 10, 10) / len(read)
    expected = share[:, None, None] * share[:, None] * share
    np.testing.assert_allclose(joint, expected, atol=5 * np.sqrt(expected.max() / len(read)))
    entropy = -np.sum(expected[expected > 0] * np.log(expected[expected > 0]))
    # 3,000 samples: and half as much for each number of those that there are (Miller 1955).
    expected = np.log(1000) - entropy + ((expected > 0).sum() - 1) / 2 / 3000
    np.testing.assert_allclose(found["val/reverse_kl_floor"], expected, rtol=0.1)


def untrained(data):
    """Reads a digit from the grey level of one pixel."""
    from jaxarch.gan.features import Extractor

    def apply(pixels):
        digits = pixels[:, 3, 3, 0].astype(int) * 10 // 256
        return digits[:, None].astype("f4"), jax.nn.one_hot(digits, 10)

    return Extractor("pixel", 8, 1, apply)


@pytest.mark.slow
def test_the_default_game_finds_all_modes(tmp_path):
    """Ten seeds at once; the mixture itself would have 98.9 % of high quality."""
    folder = run(gan_toy, tmp_path, "--replicas", 10, "--scan", 200)
    result = json.loads((folder / "result.json").read_text())
    assert result["val/modes/replicas"] == [8.0] * 10
    assert result["val/high_quality"] > 0.9


@pytest.mark.parametrize(
    "options, said",
    [
        (["--width", 0], "--width 0 is below 1"),
        (["--batch-size", 10, "--game.pack", 4], "--game.pack 4 does not divide --batch-size 10"),
        (["--data", "square"], "square"),
        (["--game.objective", "softmax"], "softmax"),
    ],
)
def test_bad_options_are_told_in_a_line(options, said, tmp_path, capsys):
    assert exit_code(gan_toy, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err
