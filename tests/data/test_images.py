"""Pictures as examples: what is read, how it is split, and what cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxarch.data.image_files import recolored
from jaxarch.data.images import Pictures, load_images, read_picture, resized, scaled, stratified, unscaled
from jaxarch.run.protocol import ConfigError


def picture(path: Path, color=(0, 0, 0), size=(6, 4), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def folder(root: Path, classes: dict[str, int]) -> str:
    """Picture number i of class c is of the colour (20 c, i, 0)."""
    for label, (name, count) in enumerate(sorted(classes.items())):
        for number in range(count):
            picture(root / name / f"{number:02}.png", (20 * label, number, 0))
    return str(root)


def load(path, tmp_path, **options):
    return load_images(path, **{"size": 4, "cache": tmp_path / "cache"} | options)


def marks(pictures: Pictures) -> list[tuple[int, int, int]]:
    """The class and the number in the colours, and the label."""
    pixels = np.asarray(pictures.pixels).reshape(len(pictures.labels), -1, 3)
    return [(int(one[0, 0]) // 20, int(one[0, 1]), int(label)) for one, label in zip(pixels, pictures.labels)]


def epoch(data, number: int, count: int) -> list[tuple[int, int, int]]:
    found = [data.train[i] for i in range(number * count, (number + 1) * count)]
    assert all(one.weights == 1 and one.pixels.dtype == np.uint8 and one.labels.dtype == np.int32 for one in found)
    return marks(Pictures(*(np.stack(leaves) for leaves in zip(*found, strict=True))))


def test_a_folder_is_split_by_class_and_each_epoch_has_all(tmp_path):
    path = folder(tmp_path / "a", {"cat": 10, "bird": 5, "dog": 20, "eel": 2})
    said = []
    data = load(path, tmp_path, say=said.append)
    assert data.classes == ("bird", "cat", "dog", "eel") and data.shape == (4, 4, 3)
    held = marks(data.validation)
    assert [sum(mark[2] == label for mark in held) for label in range(4)] == [1, 2, 4, 1]
    one, two = epoch(data, 0, 29), epoch(data, 1, 29)
    assert sorted(one) == sorted(two) and one != two and len(set(one)) == 29
    everything = {(label, number, label) for label, count in enumerate((5, 10, 20, 2)) for number in range(count)}
    assert set(one) | set(held) == everything and not set(one) & set(held)
    assert said[-1].endswith("4 classes, pictures of 4 x 4 x 3; 29 to learn from, 8 held out "
                             "(at random, from each class alike)")  # fmt: skip
    assert said[0].startswith("decoding 37 pictures, once")
    assert data.counts["validation"] == {"bird": 1, "cat": 2, "dog": 4, "eel": 1}


def test_seeds_of_the_order_and_of_the_split_are_two(tmp_path):
    path = folder(tmp_path / "a", {"cat": 10, "bird": 15})
    one, order, split = (load(path, tmp_path, **seeds) for seeds in ({}, {"seed": 1}, {"split_seed": 1}))
    assert marks(one.validation) == marks(order.validation) and epoch(one, 0, 20) != epoch(order, 0, 20)
    assert set(marks(one.validation)) != set(marks(split.validation))
    again = load(path, tmp_path)
    assert epoch(one, 3, 20) == epoch(again, 3, 20) and marks(one.validation) == marks(again.validation)


def test_stratified_by_hand():
    """A quarter of 8, 4, 2 and 1 is 2, 1, at least 1, and of the last none."""
    labels = np.repeat([3, 0, 2, 1], [8, 4, 2, 1]).astype(np.int32)
    held = stratified(labels, 0.25, 0)
    assert [held[labels == label].sum() for label in (3, 0, 2, 1)] == [2, 1, 1, 0]
    assert any(not np.array_equal(held, stratified(labels, 0.25, seed)) for seed in (1, 2))
    assert stratified(np.zeros(4, np.int32), 0.9, 0).sum() == 3


@pytest.mark.parametrize(
    "names, held", [(("val", "test"), "val"), (("test",), "test"), (("validation",), "validation")]
)
def test_parts_in_subfolders(names, held, tmp_path):
    folder(tmp_path / "a" / "train", {"cat": 3, "dog": 4})
    for name in names:
        folder(tmp_path / "a" / name, {"cat": 1, "dog": 1 + (name == held)})
    said = []
    data = load(str(tmp_path / "a"), tmp_path, say=said.append)
    assert sorted(marks(data.validation)) == [(0, 0, 0), (1, 0, 1), (1, 1, 1)] and len(set(epoch(data, 0, 7))) == 7
    assert said[-1].endswith("7 to learn from, 3 held out (as the data says)")


def test_a_training_part_alone_is_split(tmp_path):
    folder(tmp_path / "a" / "train", {"cat": 5, "dog": 5})
    assert len(load(str(tmp_path / "a"), tmp_path).validation.labels) == 2


def test_some_of_many_held_out_pictures_have_all_classes(tmp_path):
    folder(tmp_path / "a" / "train", {"cat": 1, "dog": 1})
    folder(tmp_path / "a" / "val", {"cat": 20, "dog": 20})
    data = load(str(tmp_path / "a"), tmp_path, most_held_out=10)
    assert len(data.validation.labels) == len(set(marks(data.validation))) == 10
    assert set(data.validation.labels) == {0, 1}
    assert data.counts["validation"] == {"cat": 20, "dog": 20}


def test_decoded_once_until_a_file_changes(tmp_path):
    path = folder(tmp_path / "a", {"cat": 2, "dog": 2})
    said = []
    first = load(path, tmp_path, say=said.append)
    assert load(path, tmp_path, say=said.append).counts == first.counts
    picture(tmp_path / "a" / "cat" / "00.png", (200, 200, 200), (9, 9))
    assert load(path, tmp_path, say=said.append).counts["pixels_crc32"] != first.counts["pixels_crc32"]
    assert sum(line.startswith("decoding") for line in said) == 2
    gray = load(path, tmp_path, gray=True)
    every = np.stack([*(gray.train[i].pixels for i in range(2)), *gray.validation.pixels])
    assert gray.shape == (4, 4, 1) and (every == every[:, :1, :1]).all()
    np.testing.assert_allclose(sorted(every[:, 0, 0, 0]), [0.59, 5.98, 6.57, 200], atol=1)  # 0.299 R + 0.587 G


def test_what_is_kept_beside_a_run(tmp_path):
    data = load(folder(tmp_path / "a", {"cat": 3, "dog": 2}), tmp_path)
    data.save(tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text()) == ["cat", "dog"]
    assert json.loads((tmp_path / "data.json").read_text())["train"] == {"cat": 2, "dog": 1}


def test_pictures_straight_in_a_folder_are_one_class(tmp_path):
    for number in range(5):
        picture(tmp_path / "flowers" / f"{number}.png", (0, number, 0))
    data = load(str(tmp_path / "flowers"), tmp_path)
    assert data.classes == ("flowers",) and data.name == "flowers" and data.counts["train"] == {"flowers": 4}
    assert len({one[1] for one in epoch(data, 0, 4)} | {one[1] for one in marks(data.validation)}) == 5
    assert data.train[1_000].pixels.shape == (4, 4, 3)  # a batch larger than the data takes them again
    folder(tmp_path / "flowers", {"rose": 2, "tulip": 2})
    said = []
    assert load(str(tmp_path / "flowers"), tmp_path, say=said.append).classes == ("rose", "tulip")
    assert said[0] == f"5 pictures straight in {tmp_path / 'flowers'} are passed over: its subfolders are the classes"


def test_parts_of_one_class(tmp_path):
    for name, count in (("train", 4), ("test", 2)):
        for number in range(count):
            picture(tmp_path / "a" / name / f"{number}.png", (0, number, 0))
    data = load(str(tmp_path / "a"), tmp_path)
    assert data.classes == ("a",) and len(data.validation.labels) == 2
    assert [mark[1] for mark in marks(data.pictures)] == [0, 1, 2, 3]
    assert data.pictures.pixels.base is not None  # lies in one piece, and is not copied


def test_a_corrupt_picture_is_named_and_left_out(tmp_path):
    """The others keep their labels, also when the cache is read."""
    path = folder(tmp_path / "a", {"cat": 5, "dog": 5})
    (tmp_path / "a" / "cat" / "03.png").write_bytes(b"no picture")
    (tmp_path / "a" / "dog" / "00.png").write_bytes(b"")
    for _ in range(2):
        said = []
        data = load(path, tmp_path, say=said.append)
        found = [*marks(data.pictures), *marks(data.validation)]
        assert sorted(found) == [(0, i, 0) for i in (0, 1, 2, 4)] + [(1, i, 1) for i in (1, 2, 3, 4)]
        named = [line for line in said if "left out" in line]
        assert named[0] == f"the picture {path}/cat/03.png cannot be read (cannot identify image file); it is left out"
        assert len(named) == 2 and "dog/00.png" in named[1]
    with pytest.raises(ConfigError, match=re.escape(f"the picture {path}/cat/03.png cannot be read (cannot")):
        load(path, tmp_path, strict=True)
    for file in (tmp_path / "a").rglob("*.png"):
        file.write_bytes(b"none")
    with pytest.raises(ConfigError, match=re.escape("04.png cannot be read (cannot identify image file); mend or")):
        load(path, tmp_path)


def test_opacity_is_kept_where_it_is_asked_for(tmp_path):
    for number in range(2):
        picture(tmp_path / "a" / f"{number}.png", (10, 20, 30, 40), mode="RGBA")
    picture(tmp_path / "a" / "2.png", (10, 20, 30))
    data = load(str(tmp_path / "a"), tmp_path, alpha=True)
    every = np.concatenate([data.pictures.pixels, data.validation.pixels])
    assert data.shape == (4, 4, 4) and sorted(every[:, 0, 0, 3]) == [40, 40, 255]
    # Premultiplied and back: a little is lost where little is opaque.
    np.testing.assert_allclose(every[..., :3], np.broadcast_to([10, 20, 30], (3, 4, 4, 3)), atol=4)
    assert load(str(tmp_path / "a"), tmp_path).shape == (4, 4, 3)


# --- one picture --------------------------------------------------------------------------------


def test_the_longer_side_is_cut_at_both_ends(tmp_path):
    """Ten columns of 4 rows: the middle 4 are white."""
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 4) == 255).all()
    assert read_picture(tmp_path / "a.png", 7).shape == (7, 7, 3)
    tall = np.swapaxes(pixels, 0, 1)
    Image.fromarray(np.ascontiguousarray(tall)).save(tmp_path / "b.png")
    assert (read_picture(tmp_path / "b.png", 4) == 255).all()


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
        ("P", 3, None),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black over white
        ("LA", (100, 255), (100, 100, 100)),
        ("I;16", 257 * 100 + 128, (100, 100, 100)),
    ],
)
def test_kinds_of_png(mode, color, expected, tmp_path):
    path = picture(tmp_path / "a.png", color, mode=mode)
    found = read_picture(path, 4)
    assert found.shape == (4, 4, 3) and found.dtype == np.uint8
    if expected is not None:
        np.testing.assert_allclose(found.reshape(-1, 3), [expected] * 16, atol=1)
    gray = read_picture(path, 4, gray=True)
    assert gray.shape == (4, 4, 1)


def test_a_photograph_lies_as_the_camera_says(tmp_path):
    """EXIF orientation 6: what is stored is to be turned clockwise, so that its left edge comes to the top."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    found = read_picture(tmp_path / "a.jpg", 8, gray=True)[..., 0]
    assert (found[:4] > 200).all() and (found[4:] < 55).all()


def test_scaled_by_hand():
    np.testing.assert_allclose(scaled(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], atol=1e-6)


def test_unscaled_is_the_inverse_and_cuts_at_the_ends():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(unscaled(np.asarray(scaled(levels))), levels)
    np.testing.assert_array_equal(unscaled(np.array([-3.0, -0.002, 0.002, 5.0], np.float32)), [0, 127, 128, 255])


def test_resized_keeps_what_is_even_and_cuts_the_longer_side():
    flat = np.full((2, 6, 6, 3), [10, 20, 30], np.uint8)
    assert (resized(flat, 3) == [10, 20, 30]).all() and (resized(flat, 9) == [10, 20, 30]).all()
    assert resized(flat, 6) is flat and resized(flat[:0], 3).shape == (0, 3, 3, 3)
    wide = np.zeros((1, 4, 8, 1), np.uint8)
    wide[:, :, 2:6] = 200
    assert (resized(wide, 4) == 200).all()
    assert (np.swapaxes(resized(np.swapaxes(wide, 1, 2), 4), 1, 2) == 200).all()


def test_resized_is_antialiased():
    """Columns in turn black and white, a quarter as large: the mean, where picking columns would give black alone."""
    stripes = np.zeros((1, 32, 32, 1), np.uint8)
    stripes[:, :, 1::2] = 255
    np.testing.assert_allclose(resized(stripes, 8)[:, :, 1:-1], 127.5, atol=3)


def test_what_is_transparent_lends_no_colour_when_resized():
    """Opaque white beside transparent black: white everywhere, with less and less of it."""
    pixels = np.zeros((1, 4, 4, 4), np.uint8)
    pixels[:, :, :2] = 255
    found = resized(pixels, 3)[0, :, :, :]
    assert (found[found[..., 3] > 20][:, :3] >= 250).all() and len(np.unique(found[..., 3])) > 2


def test_recolored_by_hand():
    one = np.array([[[[100, 50, 200, 51]]]], np.uint8)  # an opacity of a fifth
    assert recolored(one, False, False).tolist() == [[[[224, 214, 244]]]]  # a fifth of it, and four of white
    assert recolored(one, True, False).tolist() == [[[[220]]]]  # 0.299 * 224 + 0.587 * 214 + 0.114 * 244 = 220.4
    assert recolored(one, False, True) is one
    assert recolored(one[..., :3], False, True).tolist() == [[[[100, 50, 200, 255]]]]
    gray = one[..., :1]
    assert recolored(gray, False, False) is gray and recolored(gray, True, False) is gray
    assert recolored(gray, False, True).tolist() == [[[[100, 100, 100, 255]]]]


# --- the digits ---------------------------------------------------------------------------------


def test_the_digits():
    """Those of the package, its levels 0 to 16 as 0 to 255; a fifth of each class, rounded, makes 359."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_images()
    assert data.shape == (8, 8, 1) and data.classes == tuple("0123456789")
    assert len(data.validation.labels) == 359 and sum(data.counts["train"].values()) == 1438
    shares = np.array(list(data.counts["validation"].values())) / np.bincount(found.target)
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    known = {(one.astype(int).tobytes(), label) for one, label in zip(found.images, found.target)}
    levels = np.round(np.asarray(data.validation.pixels[..., 0]) * (16 / 255)).astype(int)
    assert {(one.tobytes(), label) for one, label in zip(levels, data.validation.labels)} <= known
    assert load_images("digits", size=12).shape == (12, 12, 1) and data.name == "digits"
    assert load_images(alpha=True).shape == (8, 8, 4)
    part, every = data.pictures, epoch_of(data, 1438)
    assert sorted(zip(map(bytes, part.pixels), part.labels)) == sorted(zip(map(bytes, every.pixels), every.labels))
    # In the package's order.
    order = {one.astype(int).tobytes(): number for number, one in enumerate(found.images)}
    numbers = [order[one.tobytes()] for one in np.round(part.pixels[..., 0] * (16 / 255)).astype(int)]
    assert numbers == sorted(numbers)


def epoch_of(data, count: int) -> Pictures:
    return Pictures(*(np.stack(leaves) for leaves in zip(*(data.train[i] for i in range(count)), strict=True)))


def test_a_missing_package_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'jaxarch[data]'; or give a folder")):
        load_images()


# --- what cannot be read ------------------------------------------------------------------------


def broken(content: bytes):
    def spoil(root: Path) -> None:
        folder(root, {"cat": 2, "dog": 2})
        (root / "dog" / "01.png").write_bytes(content)

    return spoil


def truncated(root: Path) -> None:
    folder(root, {"cat": 2, "dog": 2})
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(root / "dog" / "01.png")
    whole = (root / "dog" / "01.png").read_bytes()
    (root / "dog" / "01.png").write_bytes(whole[: len(whole) // 2])


def deep(root: Path) -> None:
    folder(root, {"cat": 2, "dog": 2})
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(root / "dog" / "02.tiff")


BAD = {
    "--data {} does not exist; give digits, emoji, a folder of pictures, with a subfolder for each": lambda root: None,
    "--data {} is a file of no known kind; give a folder of pictures, an .npz": lambda root: root.write_bytes(b""),
    "--data {} holds no pictures (.bmp, .gif,": lambda root: (root / "cat").mkdir(parents=True),
    "--data {} has one picture a class, so none can be held out; give": lambda root: picture(root / "a.png"),
    "--data {} has one picture a class, so none can be held out; give more.": lambda root: folder(
        root, {"cat": 1, "dog": 1}
    ),
    "{}/val has the class eel, which {}/train has not; nothing would learn it.": lambda root: (
        folder(root / "train", {"cat": 2, "dog": 2}),
        folder(root / "val", {"cat": 2, "eel": 2}),
    ),
    "{}/test holds no pictures (": lambda root: (
        folder(root / "train", {"cat": 2, "dog": 2}),
        (root / "test").mkdir(),
    ),
    "the picture {}/dog/01.png cannot be read (cannot identify image file); mend or remove it.": broken(b"no picture"),
    "the picture {}/dog/01.png cannot be read (": truncated,
    "the picture {}/dog/02.tiff cannot be read (its values are no greys of 8 or 16 bits": deep,
}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_is_one_clear_line(message, tmp_path):
    root = tmp_path / "a"
    BAD[message](root)
    with pytest.raises(ConfigError) as error:
        load(str(root), tmp_path, strict=True)
    said, expected = str(error.value), message.replace("{}", str(root))
    assert said.startswith(expected) and said.endswith(".") and "\n" not in said
    assert not list((tmp_path / "cache").glob("*")) or "cannot be read" not in said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gray": True, "alpha": True}, "--gray and --alpha exclude each other: opacity is the fourth channel"),
        ({"size": -1}, "--size -1 is below 0; 0 is the default."),
        ({"held_out": 1.0}, "--held-out 1 is not a fraction between 0 and 1; 0.2 holds out a fifth."),
    ],
)
def test_bad_options(options, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(folder(tmp_path / "a", {"cat": 2, "dog": 2}), tmp_path, **options)


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    path = folder(tmp_path / "a", {"cat": 2, "dog": 2})
    (tmp_path / "a" / "cat" / "notes.txt").write_text("no picture")
    picture(tmp_path / "a" / "cat" / ".hidden.png")
    picture(tmp_path / "a" / ".thumbs" / "a.png")
    picture(tmp_path / "a" / "dog" / "deep" / "b.JPG", format="JPEG")
    assert load(path, tmp_path).counts["train"] == {"cat": 1, "dog": 2}
