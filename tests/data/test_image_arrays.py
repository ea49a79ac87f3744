"""Pictures in arrays: files written here byte by byte, and what is read from them."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxarch.data.images import load_images
from jaxarch.run.protocol import ConfigError


def load(path, tmp_path, **options):
    return load_images(str(path), **{"cache": tmp_path / "cache"} | options)


def numbered(count: int, height: int = 4, width: int = 4, channels: int = 3) -> np.ndarray:
    """Picture i has i in its first pixel's first channel, and no two pixels alike."""
    pixels = np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)
    return pixels + np.arange(count, dtype=np.uint8)[:, None, None, None]


def every(data) -> dict[int, tuple[np.ndarray, int]]:
    """All pictures by the number in their first pixel, with their labels."""
    parts = (data.pictures, data.validation)
    return {int(one[0, 0, 0]): (one, int(label)) for part in parts for one, label in zip(part.pixels, part.labels)}


# --- NumPy's files ------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures, labels", [("pixels", "labels"), ("x_train", "y_train"), ("arr_0", "arr_1")])
def test_npz(pictures, labels, tmp_path):
    pixels = numbered(10)
    np.savez(tmp_path / "my.npz", **{pictures: pixels, labels: np.arange(10) % 2 + 5, "other": np.zeros(3)})
    said = []
    data = load(tmp_path / "my.npz", tmp_path, say=said.append)
    assert data.classes == ("5", "6") and data.name == "my" and data.shape == (4, 4, 3)
    assert f"my.npz: pictures from {pictures}, labels from {labels}" in said
    for number, (one, label) in every(data).items():
        np.testing.assert_array_equal(one, pixels[number])
        assert label == number % 2
    assert len(every(data)) == 10
    again = []
    assert load(tmp_path / "my.npz", tmp_path, say=again.append).counts == data.counts
    assert again == said[1:]  # the same, but for the line about reading


def test_npz_with_a_held_out_part_and_names_for_classes(tmp_path):
    pixels = numbered(8)
    np.savez(
        tmp_path / "a.npz",
        train_images=pixels[:5],
        train_labels=np.array(["cat", "dog", "cat", "eel", "dog"])[:, None],
        test_images=pixels[5:],
        test_labels=np.array(["eel", "cat", "dog"])[:, None],
    )
    said = []
    data = load(tmp_path / "a.npz", tmp_path, say=said.append)
    assert data.classes == ("cat", "dog", "eel") and said[1].endswith(
        "labels from train_labels; held out is test_images"
    )
    np.testing.assert_array_equal(data.pictures.pixels, pixels[:5])
    assert data.pictures.labels.tolist() == [0, 1, 0, 2, 1]
    assert {number: label for number, (_, label) in every(data).items() if number > 4} == {5: 2, 6: 0, 7: 1}


@pytest.mark.parametrize(
    "pictures, expected",
    [
        (np.array([0.0, 0.2, 1.0]), [0, 51, 255]),
        (np.array([256, 257 * 51, 65535], np.uint16), [0, 51, 255]),
        (np.array([0, 51, 255], np.int64), [0, 51, 255]),
        (np.array([False, True, True]), [0, 255, 255]),
    ],
)
def test_kinds_of_numbers_without_labels(pictures, expected, tmp_path):
    np.save(tmp_path / "a.npy", np.tile(pictures[:, None, None], (1, 2, 2)))
    data = load(tmp_path / "a.npy", tmp_path)
    assert data.classes == ("a",) and data.shape == (2, 2, 1)
    found = np.concatenate([data.pictures.pixels, data.validation.pixels])
    assert sorted(found[:, 1, 1, 0]) == expected


def test_channels_first_size_and_grey(tmp_path):
    pixels = np.full((5, 3, 8, 6), 100, np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    assert load(tmp_path / "a.npz", tmp_path).shape == (8, 6, 3)
    assert load(tmp_path / "a.npz", tmp_path, size=5, gray=True).shape == (5, 5, 1)
    data = load(tmp_path / "a.npz", tmp_path, size=5, alpha=True)
    assert (data.pictures.pixels == [100, 100, 100, 255]).all()


# --- MNIST's idx --------------------------------------------------------------------------------


def idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix, name", [("", "images-idx3-ubyte"), (".gz", "images.idx3-ubyte")])
def test_idx(suffix, name, tmp_path):
    pixels = numbered(9, channels=1)[..., 0]
    labels = np.array([3, 1, 2, 3, 1, 2, 1, 2, 3], np.uint8)
    for part, rows in (("train-", slice(6)), ("t10k-", slice(6, 9))):
        idx(tmp_path / "a" / f"{part}{name}{suffix}", pixels[rows])
        idx(tmp_path / "a" / f"{part}{name.replace('images', 'labels').replace('3', '1')}{suffix}", labels[rows])
    data = load(tmp_path / "a", tmp_path)
    assert data.classes == ("1", "2", "3") and data.shape == (4, 4, 1) and data.name == "a"
    np.testing.assert_array_equal(data.pictures.pixels[..., 0], pixels[:6])
    assert data.pictures.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert {number: label for number, (_, label) in every(data).items() if number > 5} == {6: 0, 7: 1, 8: 2}
    one = load(tmp_path / "a" / f"train-{name}{suffix}", tmp_path)
    assert len(every(one)) == 6 and one.classes == ("1", "2", "3")


def test_idx_without_labels(tmp_path):
    idx(tmp_path / "a" / "train-images-idx3-ubyte", numbered(4, channels=1)[..., 0])
    assert load(tmp_path / "a", tmp_path).classes == ("a",)


# --- CIFAR's binary files -----------------------------------------------------------------------


def cifar(path: Path, labels: list[list[int]], first: int = 0) -> None:
    """Records of these labels; picture i is red of level i, green 100, blue 200."""
    path.parent.mkdir(exist_ok=True)
    planes = [
        bytes([first + number]) * 1024 + bytes([100]) * 1024 + bytes([200]) * 1024 for number in range(len(labels))
    ]
    path.write_bytes(b"".join(bytes(label) + pixels for label, pixels in zip(labels, planes)))


def test_cifar_10(tmp_path):
    cifar(tmp_path / "a" / "data_batch_1.bin", [[1], [0], [1]])
    cifar(tmp_path / "a" / "data_batch_2.bin", [[0], [2]], first=3)
    cifar(tmp_path / "a" / "test_batch.bin", [[2], [0]], first=5)
    (tmp_path / "a" / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    data = load(tmp_path / "a", tmp_path)
    assert data.classes == ("airplane", "automobile", "bird") and data.shape == (32, 32, 3)
    assert data.pictures.labels.tolist() == [1, 0, 1, 0, 2]
    expected = np.array([[number, 100, 200] for number in range(5)])[:, None, None]
    np.testing.assert_array_equal(data.pictures.pixels, np.broadcast_to(expected, (5, 32, 32, 3)))
    assert {number: label for number, (_, label) in every(data).items() if number > 4} == {5: 2, 6: 0}
    one = load(tmp_path / "a" / "data_batch_1.bin", tmp_path)
    assert one.classes == ("airplane", "automobile") and len(every(one)) == 3


def test_cifar_100_has_a_coarse_label_before_the_fine_one(tmp_path):
    cifar(tmp_path / "a" / "train.bin", [[9, 1], [8, 0], [9, 1], [8, 0]])
    cifar(tmp_path / "a" / "test.bin", [[9, 1]], first=4)
    data = load(tmp_path / "a", tmp_path)
    assert data.classes == ("0", "1") and data.pictures.labels.tolist() == [1, 0, 1, 0]
    assert every(data)[4][1] == 1


# --- what cannot be read ------------------------------------------------------------------------


def write(name: str, content: bytes):
    def spoil(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return spoil


def npz(**arrays):
    def spoil(root: Path) -> Path:
        np.savez(root / "a.npz", **arrays)
        return root / "a.npz"

    return spoil


def pickled(root: Path) -> Path:
    (root / "data_batch_1").write_bytes(b"")
    return root


def two_parts(root: Path) -> Path:
    for name in ("a-train", "b-train"):
        idx(root / f"{name}-images-idx3-ubyte", np.zeros((2, 2, 2), np.uint8))
    return root


def short_idx(root: Path) -> Path:
    idx(root / "images-idx3-ubyte", np.zeros((2, 2, 2), np.uint8))
    content = (root / "images-idx3-ubyte").read_bytes()
    (root / "images-idx3-ubyte").write_bytes(content[:-3])
    return root


PIXELS = np.zeros((3, 2, 2), np.uint8)
BAD = {
    "has the arrays foo; pictures are sought under pixels, images,": npz(foo=PIXELS),
    "have the shape [3, 4], which is neither [pictures, height, width] nor": npz(images=np.zeros((3, 4), np.uint8)),
    "are float32 from -1 to 1; give integers from 0 to 255, or fractions from 0 to 1.": npz(
        images=np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 2, 2)
    ),
    "has 3 pictures and labels of the shape [2]; each picture needs one.": npz(images=PIXELS, labels=np.zeros(2, int)),
    "has x_test, but no y_test: the held-out": npz(x_train=PIXELS, y_train=np.zeros(3, int), x_test=PIXELS),
    "the label 7 of --data": npz(x_train=PIXELS, y_train=np.arange(3), x_test=PIXELS, y_test=np.array([0, 1, 7])),
    "have another shape; --size brings": npz(x_train=PIXELS, x_test=np.zeros((3, 4, 4), np.uint8)),
    "a.npz cannot be read (": write("a.npz", b"no such file"),
    "a.bin cannot be read (a.bin has not the size of whole records": write("a.bin", b"12345"),
    "images-idx3-ubyte is no idx file of bytes); is it whole?": write("images-idx3-ubyte", b"12345"),
    "images-idx3-ubyte holds 5 numbers where it says 8); is it whole?": short_idx,
    "(Not a gzipped file": write("images-idx3-ubyte.gz", b"12345"),
    "has CIFAR's batches as pickles, which run code when read; give the binary version.": pickled,
    "has not one training file of idx pictures, but a-train-images-idx3-ubyte, b-train": two_parts,
    "is a file of no known kind; give a folder of pictures, an .npz,": write("a.zip", b""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arrays_are_one_clear_line(message, tmp_path):
    (tmp_path / "a").mkdir()
    path = BAD[message](tmp_path / "a")
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load(path, tmp_path)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("*"))
