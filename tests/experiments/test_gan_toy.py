"""The toy GANs from end to end: resumed, over replicas, what is learned by several seeds, bad options."""

from __future__ import annotations

import json

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


def untrained(data):
    """Reads a digit from the grey level of one pixel."""
    from jaxarch.gan.features import Extractor

    def apply(pixels):
        import jax

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
