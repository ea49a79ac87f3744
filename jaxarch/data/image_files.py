"""Pictures in files: one of them read, a folder of them listed and decoded once, and the one way of resizing."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from jaxarch.data.cache import cached
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HELD_OUT = ("val", "valid", "validation", "test")  # names of the held-out part beside `train`, the first that is there
FOLDER_SIZE = 64
FORMAT = 2  # of the cache: raised when the same pictures are decoded differently
NAMED = 10  # pictures left out that are named one by one
CHUNK = 1024  # pictures of an array that are worked on at a time


class Source(NamedTuple):
    """All pictures of a source, their classes, and which are held out (None: the source does not say).

    checksum: of all pixels.
    """

    pixels: UInt8[np.ndarray, "pictures height width channels"]
    labels: Int32[np.ndarray, " pictures"]
    classes: tuple[str, ...]
    is_held_out: Bool[np.ndarray, " pictures"] | None
    checksum: int


class Wanted(NamedTuple):
    """How pictures are to come: height and width (0: the source's own), grey, with opacity; and where they are kept.

    ratio: the width, as a multiple of the height.
    """

    size: int
    gray: bool
    alpha: bool
    cache: Path
    ratio: int = 1

    @property
    def mode(self) -> str:
        """Pillow's name of the channels."""
        return "L" if self.gray else "RGBA" if self.alpha else "RGB"

    def fingerprint(self, **source: Any) -> dict[str, Any]:
        wide = {"ratio": self.ratio} if self.ratio != 1 else {}
        return {"format": FORMAT, "size": self.size, "mode": self.mode} | wide | source


# --- resizing -----------------------------------------------------------------------------------


def resized(
    pixels: UInt8[np.ndarray, "pictures height width channels"], size: int
) -> UInt8[np.ndarray, "pictures size size channels"]:
    """Height and width `size`, the longer side cut at both ends: by Pillow's bicubic filter, which is antialiased.

    Of four channels the last is opacity: what is transparent lends its colour to nothing.
    """
    if pixels.shape[1:3] == (size, size):
        return pixels
    if not len(pixels):
        return np.zeros((0, size, size, pixels.shape[3]), np.uint8)
    return np.stack(list(in_threads(lambda one: _resized(one, size), list(pixels))))


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    if pixels.shape[-1] in (3, 4):
        return np.asarray(fitted(Image.fromarray(np.ascontiguousarray(pixels)), size))
    channels = [fitted(Image.fromarray(np.ascontiguousarray(one)), size) for one in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(one) for one in channels], -1)


def fitted(picture: Image.Image, size: int, ratio: int = 1) -> Image.Image:
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (ratio * size, size), Image.Resampling.BICUBIC)


def recolored(
    pixels: UInt8[np.ndarray, "pictures height width channels"], gray: bool, alpha: bool
) -> UInt8[np.ndarray, "pictures height width wanted"]:
    """Grey: the weights of ITU-R 601. Alpha: red, green, blue and opacity. Neither: what is transparent becomes white.

    Grey pictures stay grey unless opacity is asked for.
    """
    if pixels.shape[-1] == 1 and not alpha:
        return pixels
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    if alpha:
        opaque = np.full_like(pixels[..., :1], 255)
        return pixels if pixels.shape[-1] == 4 else np.concatenate([pixels, opaque], -1)
    if pixels.shape[-1] == 4:
        opacity = pixels[..., 3:] / np.float32(255)
        pixels = np.round(pixels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    if gray:
        pixels = np.round(pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)).astype(np.uint8)
    return pixels


# --- one picture --------------------------------------------------------------------------------


def read_picture(file: Path, size: int, gray: bool = False) -> UInt8[np.ndarray, "size size channels"]:
    """One picture, its longer side cut at both ends, resized. What is transparent becomes white.

    Raises ConfigError where it cannot be read.
    """
    found = _read(file, size, "L" if gray else "RGB")
    if isinstance(found, str):
        raise _unreadable(file, found)
    return found


def _unreadable(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"the picture {file} cannot be read ({reason}); mend or remove it.")


def _read(file: Path, size: int, mode: str, ratio: int = 1) -> np.ndarray | str:
    """The picture, or why it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(file) as opened:
            warnings.simplefilter("ignore")  # about odd metadata, and palettes with transparent colours
            picture = _eight_bits(ImageOps.exif_transpose(opened))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                if mode != "RGBA":
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = fitted(picture.convert(mode), size, ratio)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        said = getattr(error, "strerror", None) or str(error)
        return said.removesuffix(".").replace(f" {str(file)!r}", "").replace("\n", " ")
    return np.asarray(picture).reshape(size, ratio * size, -1)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A conversion by the library would clip deeper greys at 255."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values are no greys of 8 or 16 bits, but of the kind {picture.mode}")
    return Image.fromarray((values.astype(np.int64) // 257).astype(np.uint8))


# --- a folder -----------------------------------------------------------------------------------


def folder_source(path: str, wanted: Wanted, strict: bool, say: Callable[[str], None]) -> Source:
    """The pictures of a folder: a subfolder a class; or all straight in it, one class by the folder's name.

    strict: a picture that cannot be read is an error; else it is named and left out.
    Raises ConfigError.
    """
    wanted = wanted._replace(size=wanted.size or FOLDER_SIZE)
    files, labels, classes, is_held_out = _listed(path, say)
    pixels, read, checksum = read_files(files, wanted, strict, say)
    held = None if is_held_out is None else is_held_out[read]
    return Source(pixels, labels[read], classes, held, checksum)


def read_files(
    files: list[Path], wanted: Wanted, strict: bool, say: Callable[[str], None]
) -> tuple[UInt8[np.ndarray, "read size width channels"], Bool[np.ndarray, " files"], int]:
    """The pictures that can be read, mapped from the cache, which of the files these are, and a checksum of all pixels.

    strict: a picture that cannot be read is an error; else it is named and left out.
    Raises ConfigError.
    """
    pixels, facts = _decoded(files, wanted, strict, say)
    skipped = {int(number): reason for number, reason in facts["skipped"].items()}
    for number in list(skipped)[: 1 if strict else NAMED]:
        if strict:
            raise _unreadable(files[number], skipped[number])
        say(f"the picture {files[number]} cannot be read ({skipped[number]}); it is left out")
    if len(skipped) > NAMED:
        say(f"and {len(skipped) - NAMED:,} more pictures are left out")
    return pixels, np.array([number not in skipped for number in range(len(files))]), facts["crc32"]


class _Listed(NamedTuple):
    files: list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    is_held_out: np.ndarray | None


def _listed(path: str, say: Callable[[str], None]) -> _Listed:
    """The files of a folder by class and name."""
    root = Path(path).expanduser()
    hint = "give a folder of pictures, with a subfolder for each class where there are classes"
    try:
        parts = _parts(root)
        by_class = [_by_class(part, root, say) for part in parts]
    except OSError as error:
        raise ConfigError(f"cannot read --data {path}: {error.strerror}; give a folder that you may read.") from error
    for part, found in zip(parts, by_class, strict=True):
        if not found:
            where = f"--data {path}" if part == parts[0] else str(part)
            raise ConfigError(f"{where} holds no pictures ({', '.join(SUFFIXES)}); {hint}.")
    classes = tuple(sorted(by_class[0]))
    for part, found in zip(parts[1:], by_class[1:], strict=True):
        unknown = sorted(found.keys() - set(classes))
        if unknown:
            raise ConfigError(f"{part} has the class {unknown[0]}, which {parts[0]} has not; nothing would learn it.")
    files, labels, held = [], [], []
    for number, found in enumerate(by_class):
        for label, name in enumerate(classes):
            files += found.get(name, [])
            labels += [label] * len(found.get(name, []))
            held += [number == 1] * len(found.get(name, []))
    is_held_out = np.array(held) if len(parts) > 1 else None
    return _Listed(files, np.array(labels, np.int32), classes, is_held_out)


def _parts(root: Path) -> list[Path]:
    """The folder itself, or its training and its held-out part."""
    train = root / "train"
    other = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    if train.is_dir() and (other or _folders(train)):
        return [train, other] if other else [train]
    return [root]


def _by_class(part: Path, root: Path, say: Callable[[str], None]) -> dict[str, list[Path]]:
    loose = sorted(path for path in part.iterdir() if _is_picture(path))
    found = {folder.name: files for folder in _folders(part) if (files := pictures_in(folder))}
    if not found:
        return {short_name(root): loose} if loose else {}
    if loose:
        say(f"{len(loose):,} pictures straight in {part} are passed over: its subfolders are the classes")
    return found


def short_name(path: Path) -> str:
    """Of a folder its name, of a file without its suffix."""
    whole = path.expanduser().resolve()
    return whole.name if whole.is_dir() else whole.stem


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def pictures_in(folder: Path) -> list[Path]:
    """Of the folder, at any depth."""
    return sorted(path for path in folder.rglob("*") if _is_picture(path))


def _decoded(files: list[Path], wanted: Wanted, strict: bool, say: Callable[[str], None]) -> tuple[np.ndarray, dict]:
    """The pictures that can be read, mapped from the cache; `skipped` of the facts says why others cannot."""

    def decode(facts: dict[str, Any]) -> Iterator[np.ndarray]:
        say(f"decoding {len(files):,} pictures, once; they are kept in {wanted.cache}")
        facts["skipped"] = skipped = {}
        for number, one in enumerate(
            in_threads(lambda file: _read(file, wanted.size, wanted.mode, wanted.ratio), files)
        ):
            if not isinstance(one, str):
                yield one[None]
            elif strict or len(skipped) == len(files) - 1:
                raise _unreadable(files[number], one)
            else:
                skipped[number] = one

    return kept(wanted.cache, wanted.fingerprint(pictures=[stamp(file) for file in files]), decode)


def stamp(file: Path) -> tuple[str, int, int]:
    """What changes when the file does."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def kept(
    cache: Path, fingerprint: dict[str, Any], make: Callable[[dict[str, Any]], Iterator[np.ndarray]]
) -> tuple[UInt8[np.ndarray, "pictures height width channels"], dict[str, Any]]:
    """Pictures that are made once, in pieces, and mapped into memory from then on: there may be more than it holds.

    make: is given a dictionary, which it may fill with facts (as JSON has them) that are kept too. Added to them are
        `crc32` of all pixels and `shape`.
    """

    def build(folder: Path) -> None:
        facts: dict[str, Any] = {}
        crc32, count, shape = 0, 0, ()
        with (folder / "pixels.bin").open("wb") as out:
            for some in make(facts):
                content = some.tobytes()
                crc32, count, shape = zlib.crc32(content, crc32), count + len(some), some.shape[1:]
                out.write(content)
        (folder / "facts.json").write_text(json.dumps(facts | {"crc32": crc32, "shape": [count, *shape]}))

    folder = cached(cache, fingerprint, build)
    facts = json.loads((folder / "facts.json").read_text())
    pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r", shape=tuple(facts["shape"]))
    # A view; slices of np.memmap itself cost several times more.
    return np.asarray(pixels), facts


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: list[Item]) -> Iterator[Result]:
    """The results in order, a few ahead of their use: decoding leaves Python's lock to others."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as threads:
        for start in range(0, len(items), 64 * workers):
            yield from threads.map(function, items[start : start + 64 * workers])
