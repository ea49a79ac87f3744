"""Pictures in arrays: NumPy's `.npz` and `.npy`, MNIST's idx files, CIFAR's binary files.

    .npz, .npy         pictures under one of the names below, labels and a held-out part where there are some
    idx                `train-images-idx3-ubyte`, its labels, and `t10k-...` as the held-out part; packed by gzip or not
    CIFAR              `data_batch_1.bin` ... and `test_batch.bin` of CIFAR-10, `train.bin` and `test.bin` of CIFAR-100

They are brought to 8 bits, to their size and channels once, and are mapped from the cache from then on.
"""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxarch.data.image_files import CHUNK, Source, Wanted, kept, recolored, resized, short_name, stamp
from jaxarch.run.protocol import ConfigError

# The first name that is in the file is taken; a held-out part is sought by the same order.
PICTURES = ("pixels", "images", "pictures", "x_train", "train_images", "x", "X", "data", "arr_0")
LABELS = ("labels", "y_train", "train_labels", "y", "targets", "label", "arr_1")
HELD_OUT = (("x_val", "y_val"), ("x_valid", "y_valid"), ("val_images", "val_labels"))
HELD_OUT += (("x_test", "y_test"), ("test_images", "test_labels"))
IDX = re.compile(r"(?P<part>.*?)[-_.]?images[-_.]idx[34]-ubyte(\.gz)?", re.IGNORECASE)
CIFAR_SHAPE = (3, 32, 32)


class Arrays(NamedTuple):
    """What a file holds: pictures of any number type, and labels or None."""

    pictures: np.ndarray
    labels: np.ndarray | None


class Found(NamedTuple):
    """The files of a source and how they are read.

    read: the training part and, where there is one, the held-out part; and a line that says what was taken, or "".
    names: of the labels 0, 1, ...; none: the labels themselves.
    """

    files: list[Path]
    read: Callable[[], tuple[list[Arrays], str]]
    names: tuple[str, ...] = ()


def array_source(path: str, wanted: Wanted, say: Callable[[str], None]) -> Source | None:
    """The pictures of such a file or folder; None: a folder of another kind. Raises ConfigError."""
    root = Path(path).expanduser()
    try:
        found = _found(root)
    except OSError as error:
        raise ConfigError(f"cannot read --data {path}: {error.strerror}; name what you may read.") from error
    if found is None:
        return None

    def make(facts: dict[str, Any]) -> Iterator[np.ndarray]:
        say(f"reading {', '.join(file.name for file in found.files)}, once; the pictures are kept in {wanted.cache}")
        try:
            parts, facts["taken"] = found.read()
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
            raise ConfigError(f"--data {path} cannot be read ({error}); is it whole?".replace("\n", " ")) from None
        pictures = [_nhwc(part.pictures, path) for part in parts]
        if any(one.shape[1:] != pictures[0].shape[1:] and not wanted.size for one in pictures):
            raise ConfigError(f"the held-out pictures of --data {path} have another shape; --size brings them to one.")
        labels = [_labels(part, path) for part in parts]
        every = np.concatenate(labels)
        known, places = np.unique(every, return_inverse=True)
        unknown = set(known) - set(labels[0])
        if unknown:
            raise ConfigError(f"the label {min(unknown)} of --data {path} is held out alone; nothing would learn it.")
        facts["classes"] = [_class_name(one, found.names) for one in known.tolist()]
        facts["unlabelled"] = parts[0].labels is None
        facts["labels"] = places.reshape(-1).tolist()
        facts["held_out"] = len(labels[1]) if len(labels) > 1 else 0
        for some in pictures:
            to_bytes = _to_bytes(some, path)
            for start in range(0, len(some), CHUNK):
                chunk = recolored(to_bytes(some[start : start + CHUNK]), wanted.gray, wanted.alpha)
                yield resized(chunk, wanted.size) if wanted.size else chunk

    fingerprint = wanted.fingerprint(arrays=[stamp(file) for file in found.files], names=found.names)
    pixels, facts = kept(wanted.cache, fingerprint, make)
    if facts["taken"]:
        say(facts["taken"])
    classes = (short_name(root),) if facts["unlabelled"] else tuple(facts["classes"])
    labels = np.array(facts["labels"], np.int32)
    is_held_out = np.arange(len(labels)) >= len(labels) - facts["held_out"] if facts["held_out"] else None
    return Source(pixels, labels, classes, is_held_out, facts["crc32"])


def _found(root: Path) -> Found | None:
    if root.is_dir():
        return _idx_folder(root) or _cifar_folder(root)
    if root.suffix in (".npz", ".npy"):
        return Found([root], lambda: _numpy(root))
    if IDX.fullmatch(root.name):
        return _idx([root])
    if root.suffix == ".bin":
        return _cifar([root], [])
    raise ConfigError(
        f"--data {root} is a file of no known kind; give a folder of pictures, an .npz, MNIST's "
        "train-images-idx3-ubyte or CIFAR's data_batch_1.bin."
    )


# --- numbers ------------------------------------------------------------------------------------


def _nhwc(pictures: np.ndarray, path: str) -> np.ndarray:
    """`[pictures, height, width, channels]`, also of pictures without channels, or with the channels first."""
    if pictures.ndim == 3:
        return pictures[..., None]
    if pictures.ndim == 4 and pictures.shape[-1] in (1, 3, 4):
        return pictures
    if pictures.ndim == 4 and pictures.shape[1] in (1, 3, 4):
        return np.moveaxis(pictures, 1, -1)
    raise ConfigError(
        f"the pictures of --data {path} have the shape {list(pictures.shape)}, which is neither [pictures, height, "
        "width] nor that with 1, 3 or 4 channels."
    )


def _to_bytes(pictures: np.ndarray, path: str) -> Callable[[np.ndarray], UInt8[np.ndarray, "..."]]:
    """How the numbers of this array become 0 to 255. Raises ConfigError where that is not clear."""
    if pictures.dtype == np.uint8:
        return lambda some: np.ascontiguousarray(some)
    if pictures.dtype == bool:
        return lambda some: some.astype(np.uint8) * 255
    if pictures.dtype == np.uint16:
        return lambda some: (some // 257).astype(np.uint8)
    low, high = (pictures.min(), pictures.max()) if pictures.size else (0, 0)
    if np.issubdtype(pictures.dtype, np.integer) and low >= 0 and high <= 255:
        return lambda some: some.astype(np.uint8)
    if np.issubdtype(pictures.dtype, np.floating) and low >= 0 and high <= 1:
        return lambda some: np.round(some * 255).astype(np.uint8)
    raise ConfigError(
        f"the pictures of --data {path} are {pictures.dtype} from {low:.4g} to {high:.4g}; give integers from 0 to "
        "255, or fractions from 0 to 1."
    )


def _labels(part: Arrays, path: str) -> np.ndarray:
    if part.labels is None:
        return np.zeros(len(part.pictures), np.int64)
    labels = part.labels[:, 0] if part.labels.ndim == 2 and part.labels.shape[1] == 1 else part.labels
    if labels.shape != (len(part.pictures),):
        raise ConfigError(
            f"--data {path} has {len(part.pictures):,} pictures and labels of the shape {list(part.labels.shape)}; "
            "each picture needs one."
        )
    return labels


def _class_name(label: Any, names: tuple[str, ...]) -> str:
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return label.decode() if isinstance(label, bytes) else str(label)


# --- NumPy's files ------------------------------------------------------------------------------


def _numpy(file: Path) -> tuple[list[Arrays], str]:
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return [Arrays(loaded, None)], ""
    with loaded as arrays:
        names = arrays.files
        pictures = next((name for name in PICTURES if name in names), None)
        if pictures is None:
            raise ConfigError(
                f"--data {file} has the arrays {', '.join(names) or '(none)'}; pictures are sought under "
                f"{', '.join(PICTURES)}."
            )
        labels = next((name for name in LABELS if name in names), None)
        held = next((pair for pair in HELD_OUT if pair[0] in names), None)
        if held and labels and held[1] not in names:
            raise ConfigError(f"--data {file} has {held[0]}, but no {held[1]}: the held-out pictures have no labels.")
        pairs = [(pictures, labels)] + ([(held[0], labels and held[1])] if held else [])
        parts = [Arrays(arrays[one], arrays[other] if other else None) for one, other in pairs]
        taken = f"pictures from {pictures}, " + (f"labels from {labels}" if labels else "without labels")
        return parts, f"{file.name}: {taken}" + (f"; held out is {held[0]}" if held else "")


# --- MNIST's idx --------------------------------------------------------------------------------


def _idx_folder(root: Path) -> Found | None:
    matches = {file: match for file in sorted(root.iterdir()) if (match := IDX.fullmatch(file.name))}
    if not matches:
        return None
    held = [file for file, match in matches.items() if re.search("t10k|test|val", match["part"], re.IGNORECASE)]
    train = [file for file in matches if file not in held]
    if len(train) != 1 or len(held) > 1:
        names = ", ".join(file.name for file in matches)
        raise ConfigError(f"--data {root} has not one training file of idx pictures, but {names}; name the file.")
    return _idx(train + held)


def _idx(images: list[Path]) -> Found:
    def labels_of(file: Path) -> Path | None:
        name = re.sub("images", "labels", re.sub(r"idx[34]", "idx1", file.name), flags=re.IGNORECASE)
        plain = name.removesuffix(".gz")
        return next((file.with_name(one) for one in (name, plain, plain + ".gz") if file.with_name(one).exists()), None)

    labels = [labels_of(file) for file in images]
    if None in labels and any(labels):
        raise ConfigError(f"--data {images[0].parent} has labels for one of its parts alone.")

    def read() -> tuple[list[Arrays], str]:
        pairs = zip(images, labels, strict=True)
        return [Arrays(_idx_array(one), None if label is None else _idx_array(label)) for one, label in pairs], ""

    return Found([*images, *filter(None, labels)], read)


def _idx_array(file: Path) -> np.ndarray:
    """Two zero bytes, the type (8: bytes), the number of axes, each axis as four bytes, then the numbers."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as content:
        magic = content.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08":
            raise ValueError(f"{file.name} is no idx file of bytes")
        shape = np.frombuffer(content.read(4 * magic[3]), ">u4").astype(int)
        values = np.frombuffer(content.read(), np.uint8)
    if values.size != shape.prod():
        raise ValueError(f"{file.name} holds {values.size:,} numbers where it says {shape.prod():,}")
    return values.reshape(shape)


# --- CIFAR's binary files -----------------------------------------------------------------------


def _cifar_folder(root: Path) -> Found | None:
    batches = sorted(root.glob("data_batch_*.bin")) or sorted(root.glob("train.bin"))
    if not batches:
        if any(root.glob("data_batch_[0-9]")):
            raise ConfigError(
                f"--data {root} has CIFAR's batches as pickles, which run code when read; give the binary version."
            )
        return None
    return _cifar(batches, [file for name in ("test_batch.bin", "test.bin") if (file := root / name).exists()])


def _cifar(train: list[Path], test: list[Path]) -> Found:
    named = (train[0].with_name(name) for name in ("batches.meta.txt", "fine_label_names.txt"))
    meta = next((file for file in named if file.exists()), None)
    names = tuple(meta.read_text().split()) if meta else ()

    def read() -> tuple[list[Arrays], str]:
        return [_cifar_arrays(part) for part in (train, test) if part], ""

    return Found([*train, *test], read, names)


def _cifar_arrays(files: list[Path]) -> Arrays:
    """Records of a label, or a coarse and a fine one, and the pixels: all of red, then of green, then of blue."""
    pixels = int(np.prod(CIFAR_SHAPE))
    sizes = [file.stat().st_size for file in files]
    width = next((width for width in (pixels + 1, pixels + 2) if all(size and size % width == 0 for size in sizes)), 0)
    if not width:
        raise ValueError(f"{files[0].name} has not the size of whole records of CIFAR-10 or CIFAR-100")
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, width) for file in files])
    return Arrays(records[:, -pixels:].reshape(-1, *CIFAR_SHAPE), records[:, width - pixels - 1])
