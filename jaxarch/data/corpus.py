"""Documents: files to stretches of text, each on one side of the split into training and validation.

Nothing here holds a file in memory.

    a .jsonl file      one document a line
    any other file     one document of UTF-8 text; a byte order mark is dropped, line ends become "\\n"
    a folder, a glob   all of its files in the order of their names
    no path            the manual of Python's own language, `pydoc_data.topics`: one document a topic
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from jaxarch.run.protocol import ConfigError

Split = Literal["auto", "document", "tail"]

PIECE_BYTES = 1 << 16  # what is read at a time


class Piece(NamedTuple):
    """A stretch of one document's text, all of it on one side of the split."""

    document: int
    held_out: bool
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents on disk and how they are split.

    name: for messages. files: in order; none: the default text. bytes: of all of them.
    """

    name: str
    files: tuple[Path, ...]
    field: str
    bytes: int
    split: Literal["document", "tail"]
    held_out: float
    fingerprint: dict

    def pieces(self) -> Iterator[Piece]:
        """The text in order, empty stretches left out; read anew at each call."""
        # The tail begins at a byte of the files laid end to end; under a split by document there is none.
        tail = int(self.bytes * (1 - self.held_out)) if self.split == "tail" else sys.maxsize
        for document, position, text in self._documents(tail):
            if text:
                by_number = self.split == "document" and _is_held_out(document, self.held_out)
                yield Piece(document, by_number or position >= tail, text)

    def _documents(self, tail: int) -> Iterator[tuple[int, int, str]]:
        """Document number, a position in bytes, text; a piece of text begins where the tail does."""
        if not self.files:
            position = 0
            for document, text in enumerate(_topics()):
                yield document, position, text
                position += len(text.encode())
            return
        numbers = itertools.count()
        start = 0
        for file in self.files:
            if file.suffix == ".jsonl":
                for position, text in _read_jsonl(file, self.field):
                    yield next(numbers), start + position, text
            else:
                document = next(numbers)
                for position, text in _read_text(file, tail - start):
                    yield document, start + position, text
            start += file.stat().st_size


def open_corpus(path: str | None, field: str, split: Split, held_out: float) -> Corpus:
    """Look at what `path` names, and settle how it is split; `load_text` describes the arguments.

    Raises ConfigError where there is nothing to read; `Corpus.pieces` raises it for what only reading tells.
    """
    if path is None:
        texts = _topics()
        files, several = (), True
        size = sum(len(text.encode()) for text in texts)
        source: object = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    else:
        try:
            files = _files(path)
            stats = [(str(file.resolve()), file.stat()) for file in files]
        except OSError as error:
            raise _unreadable(path, error) from error
        several = len(files) * held_out >= 2 or any(file.suffix == ".jsonl" for file in files)
        size = sum(stat.st_size for _, stat in stats)
        source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        if size == 0:
            raise ConfigError(f"--data {path} is empty; give text to learn from.")
    if split == "auto":
        split = "document" if several else "tail"
    # Equal while the pieces are the same.
    fingerprint = {"source": source, "field": field, "split": split, "held_out": held_out}
    return Corpus(path or "pydoc_data.topics", files, field, size, split, held_out, fingerprint)


def _is_held_out(document: int, fraction: float) -> bool:
    # Multiples of the golden ratio spread evenly over [0, 1) and have no period: of any ten documents about
    # one is held out, but not each tenth. From 3/4 on, that is a tenth of the default text's characters too.
    return (0.75 + document * (5**0.5 - 1) / 2) % 1 < fraction


def _files(path: str) -> tuple[Path, ...]:
    """The files that --data names, in order. Those of a folder at any depth, hidden ones left out."""
    root = Path(path).expanduser()
    if root.is_file():
        return (root,)
    if root.is_dir():
        found = [file for file in root.rglob("*") if "/." not in f"/{file.relative_to(root).as_posix()}"]
        hint = "give text files (.txt, .md, .jsonl, ...)"
    elif glob.has_magic(path):
        found = [Path(file) for file in glob.glob(str(root), recursive=True)]
        hint = "quote it, and let ** stand for folders at any depth"
    else:
        parent = root.parent
        near = difflib.get_close_matches(root.name, os.listdir(parent), 1, 0.4) if parent.is_dir() else []
        hint = f"the nearest name in {parent} is {near[0]}" if near else "give a file, a folder or a glob"
        if not parent.is_dir():
            hint = f"neither does the folder {parent}"
        raise ConfigError(f"--data {path} does not exist; {hint}.")
    files = tuple(sorted(file for file in found if file.is_file()))
    if not files:
        raise ConfigError(f"--data {path} holds no file; {hint}.")
    return files


def _topics() -> list[str]:
    """The default text. A paragraph stands only where it comes first: a fifth of the manual is repeated under
    other topics, and a held-out passage that was also learned from would flatter the score."""
    from pydoc_data.topics import topics

    known: set[str] = set()
    documents = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in known:
                kept.append(paragraph)
            if len(words) >= 40:  # shorter ones, such as headings, may come again
                known.add(words)
        documents.append("\n\n".join(kept))
    return documents


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as source:
            yield source
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(path: Path | str, error: OSError) -> ConfigError:
    return ConfigError(f"cannot read --data {path}: {error.strerror}; give text that you may read.")


def _not_utf8(file: Path, end: int, error: UnicodeDecodeError) -> ConfigError:
    """end: the position in the file up to which bytes were given to the decoder."""
    byte, offset = error.object[error.start], end - len(error.object) + error.start
    return ConfigError(
        f"{file} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, for example with iconv."
    )


def _read_text(file: Path, tail: int) -> Iterator[tuple[int, str]]:
    """Stretches of a text file and their positions in bytes; one begins at byte `tail`, if that is inside.

    The other cuts fall between a word and the space after it, where a byte-level BPE begins a new word
    anyway: its tokens are those of the whole text. In a script without spaces they fall anywhere.
    """
    word_end = re.compile(r".*\w(?=[ \n])", re.DOTALL)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    position, rest = 0, ""
    with _opened(file) as source:
        while True:
            chunk = source.read(min(PIECE_BYTES, tail - position) if position < tail else PIECE_BYTES)
            if (zero := chunk.find(0)) >= 0:
                raise ConfigError(
                    f"{file} is not text: byte 0x00 at offset {position + zero}; "
                    "name the text files alone, for example with a glob."
                )
            try:
                rest += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, position + len(chunk), error) from error
            whole = not chunk or position + len(chunk) == tail
            found = None if whole else word_end.match(rest)
            end = found.end() if found else len(rest)
            yield position, rest[:end]
            rest = rest[end:]
            if not chunk:
                return
            position += len(chunk)


def _read_jsonl(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """The text of each line and the line's position in bytes; blank lines are left out."""
    position = 0
    with _opened(file) as source:
        for number, line in enumerate(source, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, position + len(line), error) from error
            if text.strip():
                yield position, _field(text, field, f"{file} line {number}")
            position += len(line)


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ConfigError(f"{where} is not JSON: {reason}; give one object a line.") from error
    if not isinstance(record, dict):
        raise ConfigError(f'{where} is not a JSON object; give lines such as {{"{field}": "..."}}.')
    if field not in record:
        has = ", ".join(record) or "none"
        raise ConfigError(f"{where} has no field {field!r}; it has {has}: choose with --field.")
    if not isinstance(record[field], str):
        raise ConfigError(f"{where}: the field {field!r} is not a string; choose another with --field.")
    # JSON can escape half of a surrogate pair, which is no character and has no UTF-8.
    return re.sub("[\ud800-\udfff]", "\ufffd", record[field])
