"""Labelled pictures, as examples: scikit-learn's digits, OpenMoji's emoji, or pictures of one's own.

    digits, no path    the handwritten digits of scikit-learn: 1,797 pictures of 8 x 8 pixels in grey, 10 classes
    emoji              OpenMoji's emoji of a single code point: 1,483 in colour, 8 groups (`jaxarch.data.emoji`)
    a folder           one subfolder a class, or all pictures straight in it; or of such folders `train` and one of
                       `val`, `valid`, `validation`, `test`
    arrays             `.npz`, MNIST's idx files, CIFAR's binary files (`jaxarch.data.image_arrays`)

Pictures are decoded and resized once, into a file that is mapped into memory: there may be more of them than memory
holds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from jaxarch.data.emoji import emoji_source
from jaxarch.data.image_arrays import array_source
from jaxarch.data.image_files import Source, Wanted, folder_source, read_picture, recolored, resized, short_name
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    import grain

DIGITS_SIZE = 8

__all__ = [
    "ImageData",
    "Pictures",
    "examples",
    "load_images",
    "read_picture",
    "resized",
    "scaled",
    "stratified",
    "unscaled",
]


class Pictures(NamedTuple):
    """Pictures, what they show, and what each counts in the loss. A grey level of 0 is black, 255 white."""

    pixels: UInt8[Array | np.ndarray, "*batch height width channels"]
    labels: Int32[Array | np.ndarray, "*batch"]
    weights: Float32[Array | np.ndarray, "*batch"]


class ImageData(NamedTuple):
    """What an experiment learns from.

    train: single examples by number, shuffled anew in each epoch, without end.
    validation: the held-out part or some of it, in random order.
    classes: their names; a label is a place among them.
    counts: of both parts, the pictures of each class; and checksums of all pixels and of the split.
    name: "digits", "emoji", or that of the file or folder.
    everything, rows: all pictures as their source has them, mapped into memory, and which of them are for training.
    """

    train: grain.MapDataset[Pictures]
    validation: Pictures
    classes: tuple[str, ...]
    counts: dict[str, Any]
    name: str
    everything: Pictures
    rows: np.ndarray

    @property
    def pictures(self) -> Pictures:
        """The training part, unshuffled. Mapped into memory where it lies in one piece, else a copy: keep it."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        rows = slice(first, last + 1) if last + 1 - first == len(self.rows) else self.rows
        return jax.tree.map(lambda leaf: leaf[rows], self.everything)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.validation.pixels.shape[1:]
        return height, width, channels

    def save(self, folder: Path, classes: bool = True) -> None:
        """Writes the counts into `data.json` and, of what is told labels, the classes' names into `classes.json`."""
        if classes:
            (folder / "classes.json").write_text(json.dumps(self.classes, indent=2) + "\n")
        (folder / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n")


def load_images(
    path: str | None = None,
    *,
    size: int = 0,
    gray: bool = False,
    alpha: bool = False,
    held_out: float = 0.2,
    split_seed: int = 0,
    most_held_out: int = 10_000,
    strict: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> ImageData:
    """Read pictures, resize them, split them.

    path: "digits" or None, "emoji" (a folder of such a name is ./digits), a folder or a file.
    size: height and width; 0: 8 for the digits, 32 for emoji, 64 for a folder, arrays as they are. A picture of
        another shape is cut at both ends of its longer side.
    gray: one channel instead of red, green and blue. Digits, and arrays of one channel, have one as they are.
    alpha: four channels, the last of them opacity. Otherwise what is transparent becomes white.
    held_out, split_seed: the fraction of each class for validation, and the seed of its choice; without effect where
        the source says what is held out.
    most_held_out: of more held-out pictures that many are drawn, once.
    strict: a file that is no picture is an error; otherwise it is named by a line and left out.
    cache: folder for the decoded pictures (default: `cache_folder()`). They are used again while the files' names,
        sizes and times of change are the same.
    seed: of the order of training examples.
    say: given one line before work that may take minutes, and one about what was read.

    Raises ConfigError where the pictures cannot be used: one line that says what would do.
    """
    if size < 0:
        raise ConfigError(f"--size {size} is below 0; 0 is the default.")
    if gray and alpha:
        raise ConfigError("--gray and --alpha exclude each other: opacity is the fourth channel beside the colours.")
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} is not a fraction between 0 and 1; 0.2 holds out a fifth.")
    wanted = Wanted(size, gray, alpha, cache_folder() if cache is None else cache)
    name, source = _source(path, wanted, strict, say)
    called = path or "scikit-learn's digits"
    pixels, labels, classes, is_held_out, checksum = source
    by_source = is_held_out is not None
    if is_held_out is None:
        is_held_out = stratified(labels, held_out, split_seed)
    train = np.flatnonzero(~is_held_out)
    # In random order, so that a batch has all classes.
    validation = np.random.default_rng(split_seed).permutation(np.flatnonzero(is_held_out))
    if not len(validation) or not len(train):
        raise ConfigError(f"--data {called} has one picture a class, so none can be held out; give more.")

    def of_each_class(rows: np.ndarray) -> dict[str, int]:
        return dict(zip(classes, np.bincount(labels[rows], minlength=len(classes)).tolist(), strict=True))

    split = zlib.crc32(np.stack([labels, is_held_out]).tobytes())
    counts = {"train": of_each_class(train), "validation": of_each_class(validation)}
    counts |= {"pixels_crc32": checksum, "split_crc32": split}
    what = f"{len(classes)} classes" if len(classes) > 1 else "1 class"
    say(
        f"{called}: {what}, pictures of {' x '.join(map(str, pixels.shape[1:]))}; "
        f"{len(train):,} to learn from, {len(validation):,} held out "
        f"({'as the data says' if by_source else 'at random, from each class alike'})"
    )
    everything = Pictures(pixels, labels, np.ones(len(labels), np.float32))
    held = jax.tree.map(lambda leaf: leaf[validation[:most_held_out]], everything)
    return ImageData(examples(pixels, labels, train, seed), held, classes, counts, name, everything, train)


def examples(
    pixels: UInt8[np.ndarray, "pictures height width channels"],
    labels: Int32[np.ndarray, " pictures"],
    rows: np.ndarray,
    seed: int,
) -> grain.MapDataset[Pictures]:
    """The pictures of these rows by number, without end; each epoch has all of them once, in a new order."""
    import grain

    one = np.ones((), np.float32)
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
    return order.map(lambda place: Pictures(pixels[rows[place]], labels[rows[place]], one))


def scaled(pixels: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """In [-1, 1]: black is -1, white 1, as the published models of Dosovitskiy et al. 2021 take pictures."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0


def unscaled(pictures: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """The nearest of the 256 levels, on the host: what `scaled` was given, and for outsiders of [-1, 1] its ends."""
    return np.clip(np.round((np.asarray(pictures, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def stratified(labels: Int32[np.ndarray, " n"], fraction: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Which are held out: that fraction of each class, rounded; at least one of it, and never the last."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held[rng.permutation(rows)[:count]] = True
    return held


# --- where they come from -----------------------------------------------------------------------


def _source(path: str | None, wanted: Wanted, strict: bool, say: Callable[[str], None]) -> tuple[str, Source]:
    """Its name, and the pictures."""
    if path is None or path == "digits":
        return "digits", _digits(wanted)
    if path == "emoji":
        return "emoji", emoji_source(wanted, say)[0]
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(
            f"--data {path} does not exist; give digits, emoji, a folder of pictures, with a subfolder for each class "
            "where there are classes, or an .npz."
        )
    return short_name(root), array_source(path, wanted, say) or folder_source(path, wanted, strict, say)


def _digits(wanted: Wanted) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the default pictures, scikit-learn's digits, need its package: pip install 'jaxarch[data]'; "
            "or give a folder of your own with --data."
        ) from None
    found: Any = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 levels of grey
    pixels = recolored(resized(pixels, wanted.size or DIGITS_SIZE), wanted.gray, wanted.alpha)
    labels = found.target.astype(np.int32)
    return Source(pixels, labels, tuple("0123456789"), None, zlib.crc32(pixels.tobytes()))
