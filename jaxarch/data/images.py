"""Labelled pictures: a folder, or scikit-learn's digits, as examples for a classifier.

    a folder           one subfolder a class; or of such folders `train` and one of `val`, `valid`, `validation`, `test`
    no path            the handwritten digits of scikit-learn: 1,797 pictures of 8 x 8 pixels in grey, 10 classes

The pictures of a folder are decoded and resized once, into a file that is mapped into memory: there may be more of
them than memory holds.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from jaxarch.data.cache import cached
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    import grain
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = ("val", "valid", "validation", "test")  # names of the held-out part beside `train`, the first that is there
DIGITS_SIZE, FOLDER_SIZE = 8, 64
FORMAT = 1  # of the cache: raised when the same pictures are decoded differently


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
    """

    train: grain.MapDataset[Pictures]
    validation: Pictures
    classes: tuple[str, ...]
    counts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.validation.pixels.shape[1:]
        return height, width, channels

    def save(self, folder: Path) -> None:
        """Writes the names of the classes into `classes.json`, and into `data.json` the counts."""
        (folder / "classes.json").write_text(json.dumps(self.classes, indent=2) + "\n")
        (folder / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n")


def load_images(
    path: str | None = None,
    *,
    size: int = 0,
    gray: bool = False,
    held_out: float = 0.2,
    split_seed: int = 0,
    most_held_out: int = 10_000,
    cache: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> ImageData:
    """Read pictures, resize them, split them.

    path: a folder; None: the digits.
    size: height and width; 0: 8 for the digits, 64 for a folder. A picture of another shape is cut at both ends of
        its longer side.
    gray: one channel instead of red, green and blue. The digits have one.
    held_out, split_seed: the fraction of each class for validation, and the seed of its choice; without effect where
        the folder is split by its subfolders.
    most_held_out: of more held-out pictures that many are drawn, once.
    cache: folder for the decoded pictures (default: `cache_folder()`). They are used again while the files' names,
        sizes and times of change are the same.
    seed: of the order of training examples.
    say: given one line before work that may take minutes, and one about what was read.

    Raises ConfigError where the pictures cannot be used: one line that says what would do.
    """
    if size < 0:
        raise ConfigError(f"--size {size} is below 0; 0 is the default.")
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} is not a fraction between 0 and 1; 0.2 holds out a fifth.")
    if path is None:
        name, classes = "scikit-learn's digits", tuple("0123456789")
        pixels, labels = _digits(size or DIGITS_SIZE)
        checksum, is_held_out = zlib.crc32(pixels.tobytes()), None
    else:
        name, source = path, _listed(path)
        classes, labels, is_held_out = source.classes, source.labels, source.is_held_out
        where = cache_folder() if cache is None else cache
        pixels, checksum = _decoded(source.files, size or FOLDER_SIZE, gray, where, say)
    by_subfolders = is_held_out is not None
    if is_held_out is None:
        is_held_out = stratified(labels, held_out, split_seed)
    train = np.flatnonzero(~is_held_out)
    # In random order, so that a batch has all classes.
    validation = np.random.default_rng(split_seed).permutation(np.flatnonzero(is_held_out))
    if not len(validation):
        raise ConfigError(f"--data {name} has one picture a class, so none can be held out; give more.")

    def of_each_class(rows: np.ndarray) -> dict[str, int]:
        return dict(zip(classes, np.bincount(labels[rows], minlength=len(classes)).tolist(), strict=True))

    split = zlib.crc32(np.stack([labels, is_held_out]).tobytes())
    counts = {"train": of_each_class(train), "validation": of_each_class(validation)}
    counts |= {"pixels_crc32": checksum, "split_crc32": split}
    say(
        f"{name}: {len(classes)} classes, pictures of {' x '.join(map(str, pixels.shape[1:]))}; "
        f"{len(train):,} to learn from, {len(validation):,} held out "
        f"({'by subfolders' if by_subfolders else 'at random, from each class alike'})"
    )
    validation = validation[:most_held_out]
    held = Pictures(pixels[validation], labels[validation], np.ones(len(validation), np.float32))
    return ImageData(examples(pixels, labels, train, seed), held, classes, counts)


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
    return jax.numpy.asarray(pixels, np.float32) / 127.5 - 1.0


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


def _digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the default pictures, scikit-learn's digits, need its package: pip install 'jaxarch[data]'; "
            "or give a folder of your own with --data."
        ) from None
    from PIL import Image

    found: Any = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)  # 17 levels of grey
    if size != DIGITS_SIZE:
        sized = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in pixels]
        pixels = np.stack([np.asarray(one) for one in sized])
    return pixels[..., None], found.target.astype(np.int32)


class _Source(NamedTuple):
    """is_held_out: None where the folder does not say."""

    files: list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    is_held_out: np.ndarray | None


def _listed(path: str) -> _Source:
    """The files of a folder by class and name."""
    root = Path(path).expanduser()
    hint = "give a folder that has a subfolder of pictures for each class"
    if not root.exists():
        raise ConfigError(f"--data {path} does not exist; {hint}.")
    if not root.is_dir():
        raise ConfigError(f"--data {path} is a file; {hint}.")
    try:
        parts = [root]
        if (root / "train").is_dir() and _folders(root / "train"):
            other = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
            parts = [root / "train"] + ([other] if other else [])
        by_class = [{folder.name: found for folder in _folders(part) if (found := _pictures(folder))} for part in parts]
        if not by_class[0]:
            loose = " in subfolders, but only beside them" if any(map(_is_picture, parts[0].iterdir())) else ""
            raise ConfigError(f"--data {path} holds no pictures{loose} ({', '.join(SUFFIXES)}); {hint}.")
    except OSError as error:
        raise ConfigError(f"cannot read --data {path}: {error.strerror}; give a folder that you may read.") from error
    classes = tuple(sorted(by_class[0]))
    if len(classes) == 1:
        raise ConfigError(f"--data {path} has one class, {classes[0]}; {hint}.")
    for part, found in zip(parts[1:], by_class[1:], strict=True):
        unknown = sorted(found.keys() - set(classes))
        if unknown:
            raise ConfigError(f"{part} has the class {unknown[0]}, which {parts[0]} has not; nothing would learn it.")
        if not found:
            raise ConfigError(f"{part} holds no pictures ({', '.join(SUFFIXES)}); {hint}.")
    files, labels, held = [], [], []
    for number, found in enumerate(by_class):
        for label, name in enumerate(classes):
            files += found.get(name, [])
            labels += [label] * len(found.get(name, []))
            held += [number == 1] * len(found.get(name, []))
    is_held_out = np.array(held) if len(parts) > 1 else None
    return _Source(files, np.array(labels, np.int32), classes, is_held_out)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _pictures(folder: Path) -> list[Path]:
    """Of the folder, at any depth."""
    return sorted(path for path in folder.rglob("*") if _is_picture(path))


def _decoded(
    files: list[Path], size: int, gray: bool, cache: Path, say: Callable[[str], None]
) -> tuple[UInt8[np.ndarray, "files size size channels"], int]:
    """All pictures, mapped from the cache, and their checksum."""
    channels = 1 if gray else 3

    def decode(folder: Path) -> None:
        say(f"decoding {len(files):,} pictures, once; they are kept in {cache}")
        crc32 = 0
        with (folder / "pixels.bin").open("wb") as out:
            for one in _in_threads(lambda file: read_picture(file, size, gray), files):
                crc32 = zlib.crc32(one.tobytes(), crc32)
                out.write(one.tobytes())
        (folder / "checksum.json").write_text(json.dumps(crc32))

    stats = [(str(file.resolve()), file.stat()) for file in files]
    source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    folder = cached(cache, {"format": FORMAT, "pictures": source, "size": size, "channels": channels}, decode)
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r", shape=(len(files), size, size, channels))
    # A view; slices of np.memmap itself cost several times more.
    return np.asarray(pixels), json.loads((folder / "checksum.json").read_text())


def read_picture(file: Path, size: int, gray: bool = False) -> UInt8[np.ndarray, "size size channels"]:
    """One picture, its longer side cut at both ends, resized. What is transparent becomes white.

    Raises ConfigError where it cannot be read.
    """
    from PIL import Image, ImageOps

    mode = "L" if gray else "RGB"
    try:
        with warnings.catch_warnings(), Image.open(file) as opened:
            warnings.simplefilter("ignore")  # about odd metadata, and palettes with transparent colours
            picture = _eight_bits(ImageOps.exif_transpose(opened))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = ImageOps.fit(picture.convert(mode), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).removesuffix(".").replace(f" {str(file)!r}", "").replace("\n", " ")
        raise ConfigError(f"the picture {file} cannot be read ({reason}); mend or remove it.") from None
    return np.asarray(picture).reshape(size, size, -1)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A conversion by the library would clip deeper greys at 255."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are no greys of 8 or 16 bits, but of the kind {picture.mode}")
    return Image.fromarray((values.astype(np.int64) // 257).astype(np.uint8))


Item = TypeVar("Item")
Result = TypeVar("Result")


def _in_threads(function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """The results in order, a few ahead of their use: decoding leaves Python's lock to others."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(items), 64 * workers):
            yield from threads.map(function, items[start : start + 64 * workers])
