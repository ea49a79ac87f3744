"""Pairs of a source and its target: texts to tokens of fixed lengths.

    numbers      numbers below a million and their words, by the package num2words
    names        names of countries, regions, languages, scripts and currencies, by the package pycountry
    one file     tab-separated text: a source and its target on each line; further columns are left out
    two files    line i of the second is the target of line i of the first; their names apart by a comma

All pairs are held in memory.
"""

from __future__ import annotations

import gettext
import importlib
import itertools
import json
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxarch.data.tokenization import Bytes, Tokenizer, characters_of, load_tokenizer, train_bpe
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    import grain

MILLION = 10**6
SMALL = 1000  # numbers below it are all learned from or held out; few of them would be drawn
NUMBERS = 30_000  # drawn of the others
MOST_HELD_OUT = 0.1  # of all pairs

Texts = list[tuple[str, str]]
Encoded = list[tuple[np.ndarray, np.ndarray]]


class Specials(NamedTuple):
    """Tokens that stand for no text.

    pad: fills up what is shorter than its row, and is nowhere else in a source.
    begin: what a target's first token follows.
    end: the last token of every source and target.
    """

    pad: int
    begin: int
    end: int


class Pairs(NamedTuple):
    """Next-token prediction of targets whose sources are known.

    source: ends with `end`; then padding.
    inputs, targets: `targets[i]` follows `inputs[: i + 1]`, which begin with `begin`, and counts `weights[i]` in the
        loss: 1, or 0 for padding.
    """

    source: Int32[Array | np.ndarray, "*batch source_length"]
    inputs: Int32[Array | np.ndarray, "*batch length"]
    targets: Int32[Array | np.ndarray, "*batch length"]
    weights: Float32[Array | np.ndarray, "*batch length"]


class PairData(NamedTuple):
    """What an experiment learns from.

    train: single examples by number, shuffled anew each epoch, without end.
    validation: all held-out pairs; texts: the same as they are written.
    counts: of both parts the pairs and the checksum of their tokens, which tells one data set from another.
    """

    tokenizer: Tokenizer
    specials: Specials
    train: grain.MapDataset[Pairs]
    validation: Pairs
    texts: Texts
    counts: dict[str, Any]

    @property
    def vocab(self) -> int:
        """The tokeniser's tokens and the special ones."""
        return self.tokenizer.vocab + len(self.specials)

    def save(self, folder: Path) -> None:
        """Writes the tokeniser, and into `data.json` the counts."""
        self.tokenizer.save(folder)
        (folder / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n")

    def text(self, tokens: Sequence[int] | np.ndarray | Array) -> str:
        """What a row of tokens says before its first `end`; special tokens among them say nothing."""
        row = [int(token) for token in tokens]
        row = row[: row.index(self.specials.end)] if self.specials.end in row else row
        return self.tokenizer.decode([token for token in row if token < self.tokenizer.vocab])


def load_pairs(
    data: str = "numbers",
    *,
    target: str | None = None,
    language: str = "de",
    tokenizer: Tokenizer | str = "char",
    vocab_size: int = 4096,
    length: int = 128,
    held_out: int = 2000,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> PairData:
    """Read pairs, hold some out, and give them as tokens.

    data: `numbers`, `names`, a file, or two files and a comma between them.
    target: the file of the targets, where `data` is that of the sources.
    language: that numbers and names are translated into, as de.
    tokenizer: `char`, `byte`, `bpe` (trained on the training part), a tokenizer.json, or one already made. It reads
        sources and targets alike; the special tokens have the three numbers after its own.
    vocab_size: of `bpe`.
    length: the most tokens of a source or a target with its end. Longer pairs are left out, and `say` is told.
    held_out: pairs for validation, but at most a tenth of all. Which ones does not depend on the seed, and a source
        that is among them is not learned from.
    seed: of the order of training examples.
    say: given one line about what was read.

    Raises ConfigError where the data cannot be used: one line that says what would do.
    """
    if length < 2:
        raise ConfigError(f"--length {length} holds no text and its end; give 2 or more.")
    if held_out < 1:
        raise ConfigError(f"--held-out {held_out} is below 1.")
    texts = _texts(data, target, language)
    train, validation = _split(texts, held_out)
    if not train or not validation:
        raise ConfigError(f"{data} has {len(texts)} pairs; give more, so that some are learned from and some held out.")
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer(tokenizer, vocab_size, texts, train)
    specials = Specials(tokenizer.vocab, tokenizer.vocab + 1, tokenizer.vocab + 2)
    encoded = _encoded(train, tokenizer), _encoded(validation, tokenizer)
    rows = [[pair for pair in part if _size(pair) <= length] for part in encoded]
    dropped = len(texts) - sum(map(len, rows))
    if not rows[0] or not rows[1]:
        longest = max(map(_size, itertools.chain(*encoded)))
        part = "to learn from" if not rows[0] else "held out"
        raise ConfigError(f"no pair {part} fits --length {length}; --length {longest} would hold all.")
    source_length = 1 + max(len(source) for part in rows for source, _ in part)
    target_length = 1 + max(len(target) for part in rows for _, target in part)
    parts = [padded(part, specials, source_length, target_length) for part in rows]
    say(
        f"{data}: {len(rows[0]):,} pairs to learn from, {len(rows[1]):,} held out; {tokenizer.vocab:,} tokens in the "
        f"vocabulary; at most {source_length} of a source, {target_length} of a target"
        + (f"; {dropped:,} pairs of more than {length} left out" if dropped else "")
    )
    counts = {
        name: {"pairs": len(part.source), "crc32": zlib.crc32(b"".join(array.tobytes() for array in part))}
        for name, part in zip(("train", "validation"), parts, strict=True)
    }
    kept = [pair for pair, tokens in zip(validation, encoded[1], strict=True) if _size(tokens) <= length]
    return PairData(tokenizer, specials, examples(parts[0], seed), parts[1], kept, counts)


def padded(
    pairs: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
    specials: Specials,
    source_length: int,
    target_length: int,
) -> Pairs:
    """Sources and targets of unequal length, without special tokens, as arrays of `[pairs, length]`.

    Raises ValueError where one of them and its end do not fit.
    """
    source = np.full((len(pairs), source_length), specials.pad, np.int32)
    inputs, targets = np.full((2, len(pairs), target_length), specials.pad, np.int32)
    weights = np.zeros((len(pairs), target_length), np.float32)
    for row, (one, other) in enumerate(pairs):
        if len(one) >= source_length or len(other) >= target_length:
            raise ValueError(
                f"a source of {len(one)} and a target of {len(other)} tokens and their ends do not fit "
                f"{source_length} and {target_length}."
            )
        source[row, : len(one) + 1] = [*one, specials.end]
        inputs[row, : len(other) + 1] = [specials.begin, *other]
        targets[row, : len(other) + 1] = [*other, specials.end]
        weights[row, : len(other) + 1] = 1
    return Pairs(source, inputs, targets, weights)


def examples(pairs: Pairs, seed: int) -> grain.MapDataset[Pairs]:
    """Single examples by number, shuffled anew each epoch, without end."""
    import grain

    rows = grain.MapDataset.range(len(pairs.source)).seed(seed).shuffle().repeat()
    return rows.map(lambda row: Pairs(*(array[row] for array in pairs)))


def _split(texts: Texts, held_out: int) -> tuple[Texts, Texts]:
    """Those to learn from, and those held out with all their source's targets."""
    sources = sorted({source for source, _ in texts})
    number = min(held_out, max(1, int(len(sources) * MOST_HELD_OUT)))
    chosen = set(random.Random(0).sample(sources, number)) if len(sources) > 1 else set()
    return [pair for pair in texts if pair[0] not in chosen], [pair for pair in texts if pair[0] in chosen]


def _tokenizer(name: str, vocab_size: int, texts: Texts, train: Texts) -> Tokenizer:
    if name == "byte":
        return Bytes()
    if name == "char":
        return characters_of(text for pair in texts for text in pair)
    if name == "bpe":
        return train_bpe((text for pair in train for text in pair), vocab_size)
    return load_tokenizer(Path(name).expanduser())


def _encoded(texts: Texts, tokenizer: Tokenizer) -> Encoded:
    sources = tokenizer.encode_batch([source for source, _ in texts])
    return list(zip(sources, tokenizer.encode_batch([target for _, target in texts]), strict=True))


def _size(pair: tuple[np.ndarray, np.ndarray]) -> int:
    """Tokens of the longer side with its end."""
    return 1 + max(map(len, pair))


# --- where pairs come from ----------------------------------------------------------------------


def _texts(data: str, target: str | None, language: str) -> Texts:
    if target is not None:
        return read_two(Path(data).expanduser(), Path(target).expanduser())
    if data == "numbers":
        return number_pairs(language)
    if data == "names":
        return name_pairs(language)
    path = Path(data).expanduser()
    if "," in data and not path.exists():
        one, _, other = data.partition(",")
        return read_two(Path(one.strip()).expanduser(), Path(other.strip()).expanduser())
    return read_table(path)


def number_pairs(language: str = "de") -> Texts:
    """Numbers below a million in digits and in words: all below a thousand, of the others a draw, always the same."""
    words = _package("num2words").num2words
    numbers = [*range(SMALL), *random.Random(0).sample(range(SMALL, MILLION), NUMBERS)]
    try:
        return [(str(number), words(number, lang=language)) for number in numbers]
    except NotImplementedError:
        raise ConfigError(f"num2words has no --language {language}; de, fr or es would do.") from None


def name_pairs(language: str = "de") -> Texts:
    """English names of countries, regions, languages, scripts and currencies that pycountry translates, in order.

    Those that are the same in both languages, three of four in German, are left out.
    """
    pycountry = _package("pycountry")
    sources = {
        "iso3166-1": pycountry.countries,
        "iso3166-2": pycountry.subdivisions,
        "iso3166-3": pycountry.historic_countries,
        "iso639-3": pycountry.languages,
        "iso639-5": pycountry.language_families,
        "iso15924": pycountry.scripts,
        "iso4217": pycountry.currencies,
    }
    pairs = {}
    for domain, entries in sources.items():
        try:
            catalogue = gettext.translation(domain, pycountry.LOCALES_DIR, [language])
        except OSError:
            continue
        for entry in entries:
            for field in ("name", "official_name", "common_name"):
                english = getattr(entry, field, None)
                # A text that the catalogue lacks comes back as it is.
                if english and (translated := catalogue.gettext(english)) != english:
                    pairs[english, translated] = None
    if not pairs:
        raise ConfigError(f"pycountry has no --language {language}; de, fr or es would do.")
    return list(pairs)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{name} is not installed; it comes with the extra: pip install 'jaxarch[data]', or --data FILE."
        ) from None


def read_table(path: Path) -> Texts:
    """Of each line the text before the first tab and that before the next. Raises ConfigError."""
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) < 2:
            raise ConfigError(
                f"{path} line {number} has no tab; give a source, a tab and a target, or two files: --data a.txt,b.txt."
            )
        for column, side in zip(columns, ("source", "target"), strict=False):
            if not column:
                raise ConfigError(f"{path} line {number} has no {side}; leave the line out.")
        pairs.append((columns[0], columns[1]))
    return pairs


def read_two(source: Path, target: Path) -> Texts:
    """Line by line. Raises ConfigError where a line is empty or has none that stands opposite."""
    sides = _lines(source), _lines(target)
    for path, lines in zip((source, target), sides, strict=True):
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise ConfigError(f"{path} line {number} is empty; leave it out of both files.")
    shorter, longer = sorted(zip((source, target), sides, strict=True), key=lambda side: len(side[1]))
    if len(shorter[1]) < len(longer[1]):
        raise ConfigError(
            f"{longer[0]} line {len(shorter[1]) + 1} has no partner: {shorter[0]} ends with line {len(shorter[1])}; "
            "give files whose lines belong together."
        )
    return [(one.strip(), other.strip()) for one, other in zip(*sides, strict=True)]


def _lines(path: Path) -> list[str]:
    """Not by `splitlines`, for which a form feed or a U+2028 would end a line too."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"--data {path} does not exist; numbers, names, a tab-separated file or two files a.txt,b.txt would do."
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read --data {path}: {error.strerror}; give text that you may read.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, offset = error.object[error.start], error.start + len(content) - len(error.object)
        raise ConfigError(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, for example with iconv."
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ConfigError(f"--data {path} is empty; give pairs to learn from.")
    return lines
