"""Pictures with a text each: OpenMoji's emoji and their names, or a folder of one's own.

emoji              1,483 emoji and their Unicode names (`jaxarch.data.emoji`)
a folder           of pictures at any depth. Their texts: the column `text` of a `metadata.csv` in the folder, whose
                   column `file_name` names the pictures; or a `.txt` beside each picture, of the same name; or else
                   the pictures' names, "red-apple.png" as "red apple"
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from jaxarch.data.emoji import emoji_source
from jaxarch.data.image_files import FOLDER_SIZE, Wanted, pictures_in, read_files, short_name
from jaxarch.data.images import stratified
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

METADATA = "metadata.csv"


class Captioned(NamedTuple):
    """All pictures of a source with their texts.

    labels, classes: emoji are of groups, a folder's pictures of the one class that the folder is.
    is_held_out: a fraction of each class, at random.
    """

    pixels: UInt8[np.ndarray, "pictures height width channels"]
    texts: tuple[str, ...]
    labels: Int32[np.ndarray, " pictures"]
    classes: tuple[str, ...]
    is_held_out: Bool[np.ndarray, " pictures"]
    checksum: int
    name: str


def load_captioned(
    path: str = "emoji",
    *,
    size: int = 0,
    gray: bool = False,
    alpha: bool = False,
    held_out: float = 0.2,
    split_seed: int = 0,
    strict: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Captioned:
    """Read pictures and texts; the options are those of `load_images`. Raises ConfigError."""
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} is not a fraction between 0 and 1; 0.2 holds out a fifth.")
    wanted = Wanted(size, gray, alpha, cache_folder() if cache is None else cache)
    if path == "emoji":
        source, texts = emoji_source(wanted, say)
        pixels, labels, classes, _, checksum = source
        name = path
    else:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise ConfigError(f"--data {path} is no folder; give emoji, or a folder of pictures and their texts.")
        name, files = short_name(root), pictures_in(root)
        if not files:
            raise ConfigError(f"--data {path} holds no pictures; give emoji, or a folder of pictures and their texts.")
        found = _texts(root, files)
        pixels, read, checksum = read_files(files, wanted._replace(size=size or FOLDER_SIZE), strict, say)
        texts = tuple(text for text, kept in zip(found, read, strict=True) if kept)
        labels, classes = np.zeros(len(texts), np.int32), (name,)
    is_held_out = stratified(labels, held_out, split_seed)
    if not is_held_out.any():
        raise ConfigError(f"--data {path} has one picture; give more, so that some can be held out.")
    say(
        f"{path}: {len(texts):,} pictures of {' x '.join(map(str, pixels.shape[1:]))}, each with a text; "
        f"{is_held_out.sum():,} are held out"
    )
    return Captioned(pixels, texts, labels, classes, is_held_out, checksum, name)


def _texts(root: Path, files: list[Path]) -> list[str]:
    if (root / METADATA).exists():
        return _of_table(root, files)
    beside = [file.with_suffix(".txt") for file in files]
    try:
        if any(path.exists() for path in beside):
            return [" ".join(path.read_text(encoding="utf-8").split()) for path in beside]
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing: some pictures of {root} have a text beside them.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"a text of {root} is not UTF-8: {error.reason}.") from None
    return [" ".join(file.stem.replace("-", " ").replace("_", " ").split()) for file in files]


def _of_table(root: Path, files: list[Path]) -> list[str]:
    path = root / METADATA
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            table = {row.get("file_name"): row.get("text") for row in csv.DictReader(lines)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    texts = []
    for file in files:
        text = table.get(file.relative_to(root).as_posix())
        if text is None:
            raise ConfigError(
                f"{path} has no text for {file.relative_to(root)}; it needs the columns file_name and text, and a row "
                "for each picture."
            )
        texts.append(text)
    return texts
