"""Pictures to be translated into others: with their translations, or two kinds of them without.

Pairs (`load_picture_pairs`):

    emoji, digits      their outlines, or their greys, and the pictures themselves
    a folder           of pictures side by side, A on the left and B on the right; with `train` and `val` or `test`
                       folders of such, as the data sets of Isola et al. 2017. Or folders `A` and `B` of pictures with
                       the same names, `train` and `val` or `test` within them or not

Two kinds (`load_two_kinds`), of which no picture of the one has its counterpart in the other:

    digits             in white on black, and other ones in yellow chalk on a green board
    ink                in white on black, and other ones in blue ink on paper: what is light in one kind is dark in the
                       other, so that translations which confuse figure and ground come back as well
    emoji              on white, and other ones at night
    a folder           `trainA`, `trainB` and perhaps `testA`, `testB`, as the data sets of Zhu et al. 2017; or `A` and
                       `B`

Of the built-in two kinds the true translation is known, and given for what is held out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxarch.data.image_files import FOLDER_SIZE, HELD_OUT, Wanted, pictures_in, read_files
from jaxarch.data.images import Pictures, load_images
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    import grain

InputName = Literal["outline", "gray"]
BUILT_IN = ("emoji", "digits")
# What is white and what is black in other colours.
LOOKS = {"digits": ((250, 240, 150), (30, 80, 60)), "ink": ((40, 50, 140), (245, 235, 205))}
NIGHT = np.array([24, 32, 72])
DIM = 0.8  # how bright things are at night

Say = Callable[[str], None]
Pixels = UInt8[np.ndarray, "pictures height width channels"]


class PicturePair(NamedTuple):
    """A picture and its translation, or two that have nothing to do with one another."""

    a: UInt8[Array | np.ndarray, "*batch height width channels"]
    b: UInt8[Array | np.ndarray, "*batch height width others"]


class PictureTranslations(NamedTuple):
    """What an experiment learns from.

    train: single examples by number, shuffled anew in each epoch, without end. Of two kinds each has its own order, and
        an epoch is that of the larger one.
    validation: the held-out pictures. Of two kinds there may be more of one.
    truth: of two kinds whose translation is known, that of the held-out pictures of each: `b` are those of `a`; else
        None.
    counts: pictures of each part, and checksums.
    """

    train: grain.MapDataset[PicturePair]
    validation: PicturePair
    truth: PicturePair | None
    counts: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the counts into `data.json`."""
        (folder / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n")


def load_picture_pairs(
    path: str = "emoji",
    *,
    inputs: InputName = "outline",
    reverse: bool = False,
    size: int = 0,
    gray: bool = False,
    held_out: float = 0.2,
    split_seed: int = 0,
    cache: Path | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
) -> PictureTranslations:
    """Read pairs of pictures, A and its translation B.

    path: "emoji", "digits" or a folder.
    inputs: what the built-in pictures' A is: their outlines or their greys.
    reverse: of a folder, from B to A.
    size: height and width; 0: 8 for the digits, 32 for emoji, 64 for a folder.
    gray: one channel instead of red, green and blue.
    held_out, split_seed: the fraction for validation, and the seed of its choice; without effect where the folder says
        what is held out.
    seed: of the order of training examples.
    say: given one line before work that may take minutes, and one about what was read.

    A picture that cannot be read is named and left out with its partner.
    Raises ConfigError where the pictures cannot be used: one line that says what would do.
    """
    _check(held_out, size)
    if path in BUILT_IN:
        data = load_images(path, size=size, gray=gray, held_out=held_out, split_seed=split_seed, cache=cache)
        derive = outlines if inputs == "outline" else greys
        train, held = (
            PicturePair(derive(pixels), pixels) for pixels in (_pixels(data.pictures), _pixels(data.validation))
        )
    else:
        wanted = Wanted(size or FOLDER_SIZE, gray, False, cache_folder() if cache is None else cache)
        pairs, is_held = _pairs_of(Path(path).expanduser(), path, wanted, say)
        if is_held is None:
            is_held = _some(len(pairs.a), held_out, split_seed)
        pairs = PicturePair(*pairs[::-1]) if reverse else pairs
        train, held = (PicturePair(pairs.a[rows], pairs.b[rows]) for rows in (~is_held, is_held))
        if not len(train.a) or not len(held.a):
            raise ConfigError(f"--data {path} has {len(pairs.a)} pairs; some must be held out, and some to learn from.")
    shape = " x ".join(map(str, held.b.shape[1:]))
    say(f"{path}: pairs of pictures of {shape}; {len(train.a):,} to learn from, {len(held.a):,} held out")
    return PictureTranslations(_examples(train, seed, paired=True), held, None, _counts(train, held))


def load_two_kinds(
    path: str = "digits",
    *,
    size: int = 0,
    gray: bool = False,
    held_out: float = 0.2,
    split_seed: int = 0,
    cache: Path | None = None,
    seed: int = 0,
    say: Say = lambda line: None,
) -> PictureTranslations:
    """Read two kinds of pictures; the options are those of `load_picture_pairs`. Raises ConfigError.

    path: "digits", "ink", "emoji" or a folder.
    """
    _check(held_out, size)
    truth = None
    if path == "emoji" or path in LOOKS:
        if gray:
            raise ConfigError(f"--gray would leave little of --data {path}, whose two kinds differ in colour.")
        source, alpha = ("emoji", True) if path == "emoji" else ("digits", False)
        data = load_images(source, size=size, alpha=alpha, held_out=held_out, split_seed=split_seed, cache=cache)
        kinds = by_day_and_night if alpha else partial(in_two_looks, look=path)
        both, truth_of = kinds(_pixels(data.pictures)), kinds(_pixels(data.validation))
        # Each picture is of one kind alone.
        halves = np.random.default_rng(split_seed).permutation(len(both.a))
        half = len(halves) // 2
        train = PicturePair(both.a[np.sort(halves[:half])], both.b[np.sort(halves[half:])])
        half = len(truth_of.a) // 2
        held = PicturePair(truth_of.a[:half], truth_of.b[half:])
        truth = PicturePair(truth_of.a[half:], truth_of.b[:half])
    else:
        wanted = Wanted(size or FOLDER_SIZE, gray, False, cache_folder() if cache is None else cache)
        train, held = _kinds_of(Path(path).expanduser(), path, wanted, held_out, split_seed, say)
    shape = " x ".join(map(str, held.a.shape[1:]))
    say(
        f"{path}: two kinds of pictures of {shape}; {len(train.a):,} and {len(train.b):,} to learn from, "
        f"{len(held.a):,} and {len(held.b):,} held out"
    )
    return PictureTranslations(_examples(train, seed, paired=False), held, truth, _counts(train, held))


# --- what is made of pictures -------------------------------------------------------------------


def greys(pixels: Pixels) -> UInt8[np.ndarray, "pictures height width 1"]:
    """The weights of ITU-R 601."""
    return np.round(_luma(pixels)[..., None]).astype(np.uint8)


def outlines(pixels: Pixels) -> UInt8[np.ndarray, "pictures height width 1"]:
    """Dark where a colour changes most, on white: the longest of the channels' gradients by Sobel's differences."""
    padded = np.pad(pixels.astype(np.float32), [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")

    def smooth(x: np.ndarray, axis: int) -> np.ndarray:
        low, middle, high = (np.take(x, range(i, x.shape[axis] - 2 + i), axis) for i in range(3))
        return (low + 2 * middle + high) / 4

    def slope(x: np.ndarray, axis: int) -> np.ndarray:
        low, high = (np.take(x, range(i, x.shape[axis] - 2 + i), axis) for i in (0, 2))
        return (high - low) / 2

    length = np.hypot(smooth(slope(padded, 1), 2), smooth(slope(padded, 2), 1)).max(-1, keepdims=True)
    return (255 - np.clip(np.round(2 * length), 0, 255)).astype(np.uint8)


def in_two_looks(pixels: Pixels, look: str) -> PicturePair:
    """White on black, and the same in the colours of `LOOKS`; both in colour."""
    white = pixels[..., :1] / np.float32(255)
    figure, ground = LOOKS[look]
    other = np.round(white * np.array(figure) + (1 - white) * np.array(ground)).astype(np.uint8)
    return PicturePair(np.repeat(pixels[..., :1], 3, -1), other)


def by_day_and_night(pixels: UInt8[np.ndarray, "pictures height width 4"]) -> PicturePair:
    """Of pictures with opacity: on white, and darker before a night sky."""
    opacity = pixels[..., 3:] / np.float32(255)
    colors = pixels[..., :3] * opacity
    day, night = colors + 255 * (1 - opacity), DIM * colors + NIGHT * (1 - opacity)
    return PicturePair(np.round(day).astype(np.uint8), np.round(night).astype(np.uint8))


def _luma(pixels: Pixels) -> Float[np.ndarray, "pictures height width"]:
    if pixels.shape[-1] == 1:
        return pixels[..., 0].astype(np.float32)
    return pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)


# --- folders ------------------------------------------------------------------------------------


def _pixels(pictures: Pictures) -> Pixels:
    return np.asarray(pictures.pixels)


def _check(held_out: float, size: int) -> None:
    if size < 0:
        raise ConfigError(f"--size {size} is below 0; 0 is the default.")
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} is not a fraction between 0 and 1; 0.2 holds out a fifth.")


def _pairs_of(root: Path, path: str, wanted: Wanted, say: Say) -> tuple[PicturePair, np.ndarray | None]:
    """All pairs, and which are held out (None: the folder does not say)."""
    if (root / "A").is_dir() and (root / "B").is_dir():
        by_name = [
            {str(file.relative_to(root / kind).with_suffix("")): file for file in pictures_in(root / kind)}
            for kind in "AB"
        ]
        names = sorted(by_name[0].keys() & by_name[1].keys())
        alone = len(by_name[0]) + len(by_name[1]) - 2 * len(names)
        if alone:
            say(f"{alone:,} pictures of {path} have no partner of the same name; they are left out")
        if not names:
            raise ConfigError(f"the folders A and B of --data {path} have no pictures of the same names.")
        first, second = (read_files([files[name] for name in names], wanted, False, say) for files in by_name)
        read = first[1] & second[1]
        pairs = PicturePair(first[0][read[first[1]]], second[0][read[second[1]]])
        parts = [name.split("/")[0] for name, is_read in zip(names, read, strict=True) if is_read]
    else:
        files = _pictures(root, path, "give a folder of pictures side by side, or one with the folders A and B")
        pixels, read, _ = read_files(files, wanted._replace(ratio=2), False, say)
        pairs = PicturePair(pixels[:, :, : wanted.size], pixels[:, :, wanted.size :])
        parts = [file.relative_to(root).parts[0] for file, is_read in zip(files, read, strict=True) if is_read]
    is_held = np.array([part in HELD_OUT for part in parts])
    return pairs, is_held if is_held.any() else None


def _kinds_of(
    root: Path, path: str, wanted: Wanted, held_out: float, split_seed: int, say: Say
) -> tuple[PicturePair, PicturePair]:
    """The pictures to learn from and those held out, of each kind."""
    train, held = [], []
    for kind in "AB":
        folder = root / f"train{kind}"
        folder = folder if folder.is_dir() else root / kind
        hint = "give a folder that has trainA and trainB, or A and B, with pictures in them"
        if not folder.is_dir():
            raise ConfigError(f"--data {path} has no folder train{kind}; {hint}.")
        pixels = read_files(_pictures(folder, str(folder), hint), wanted, False, say)[0]
        other = next((root / f"{name}{kind}" for name in HELD_OUT if (root / f"{name}{kind}").is_dir()), None)
        if other is not None and folder.name != kind:
            train.append(pixels)
            held.append(read_files(_pictures(other, str(other), hint), wanted, False, say)[0])
        else:
            is_held = _some(len(pixels), held_out, split_seed)
            train.append(pixels[~is_held])
            held.append(pixels[is_held])
        if not len(train[-1]) or not len(held[-1]):
            raise ConfigError(f"{folder} has one picture, so none can be held out; give more.")
    return PicturePair(*train), PicturePair(*held)


def _pictures(folder: Path, path: str, hint: str) -> list[Path]:
    try:
        files = pictures_in(folder)
    except OSError as error:
        raise ConfigError(f"cannot read --data {path}: {error.strerror}; give a folder that you may read.") from error
    if not files:
        missing = "holds no pictures" if folder.is_dir() else "is no folder"
        raise ConfigError(f"--data {path} {missing}; {hint}.")
    return files


def _some(count: int, fraction: float, seed: int) -> np.ndarray:
    """Which of them are held out: that fraction, one at least and never the last."""
    held = np.zeros(count, bool)
    held[np.random.default_rng(seed).permutation(count)[: min(max(round(fraction * count), 1), count - 1)]] = True
    return held


def _counts(train: PicturePair, held: PicturePair) -> dict[str, Any]:
    def checksum(pixels: Any) -> int:
        return zlib.crc32(np.ascontiguousarray(pixels).tobytes())

    return {
        "train": [len(train.a), len(train.b)],
        "validation": [len(held.a), len(held.b)],
        "pixels_crc32": [checksum(pixels) for pixels in (*train, *held)],
    }


def _examples(train: PicturePair, seed: int, paired: bool) -> grain.MapDataset[PicturePair]:
    """By number, without end. Each epoch has all pictures of the larger kind once, in a new order."""
    import grain

    def order(count: int, seed: int) -> grain.MapDataset[int]:
        return grain.MapDataset.range(count).seed(seed).shuffle().repeat()

    orders = [order(len(pixels), 2 * seed + (0 if paired else kind)) for kind, pixels in enumerate(train)]

    def example(number: int) -> PicturePair:
        return PicturePair(*(pixels[places[number]] for pixels, places in zip(train, orders, strict=True)))

    # Positions in time, not pictures: so that each kind runs through its own order.
    return grain.MapDataset.range(2**40).map(example)
