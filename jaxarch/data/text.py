"""Text as examples for a language model: documents to a cache of tokens on disk, to windows.

Documents are encoded once, piece by piece, into two flat files of tokens, the training part and the held-out
part, which are mapped into memory: a corpus may be larger than memory. `corpus.py` says what a document is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int32, Integer

from jaxarch.data.cache import cached
from jaxarch.data.corpus import Corpus, Piece, Split, open_corpus
from jaxarch.data.tokenization import Bytes, Tokenizer, characters_of, load_tokenizer, train_bpe
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    import grain

BATCH_CHARACTERS = 1 << 20  # what is encoded at a time, on all cores
BPE_SAMPLE_BYTES = 32_000_000  # of text to learn a vocabulary from, in pieces spread over the corpus
FORMAT = 2  # of the cache: raised when the same data are written differently


class Tokens(NamedTuple):
    """Next-token prediction: `targets[i]` follows `inputs[i]` and counts `weights[i]` in the loss."""

    inputs: Int32[Array | np.ndarray, "*batch length"]
    targets: Int32[Array | np.ndarray, "*batch length"]
    weights: Float32[Array | np.ndarray, "*batch length"]


class TextData(NamedTuple):
    """What an experiment learns from.

    train: single examples by number, without end (see `examples`).
    validation: the tokens of the held-out part, mapped from disk; `windows` cuts them into examples.
    characters_per_token: characters over tokens of the held-out part, exactly; a loss in nats a token is
        `loss / log(2) / characters_per_token` bits a character.
    counts: of both parts, the tokens, characters and the checksum of the tokens: what tells one text from another.
    """

    tokenizer: Tokenizer
    train: grain.MapDataset[Tokens]
    validation: Integer[np.ndarray, " tokens"]
    characters_per_token: float
    counts: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the tokeniser, and into `data.json` the counts."""
        self.tokenizer.save(folder)
        (folder / "data.json").write_text(json.dumps(self.counts, indent=2) + "\n")


def load_text(
    path: str | None = None,
    *,
    tokenizer: Tokenizer | str = "char",
    vocab_size: int = 4096,
    length: int,
    held_out: float = 0.1,
    split: Split = "auto",
    field: str = "text",
    cache: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> TextData:
    """Read text, split it, and give it as tokens.

    path: a file, a folder or a glob; None: `pydoc_data.topics`.
    tokenizer: `char`, `byte`, `bpe` (trained on the training part), a tokenizer.json, or one already made.
    vocab_size: of `bpe`.
    length: tokens of an example.
    held_out: the fraction for validation. It does not depend on the seed.
    split: `document` holds out whole documents, chosen by their number, so that documents added at the end
        leave the others where they are; `tail` holds out the end of the text. `auto`: documents of JSONL and
        of many files, the tail of one text (or of so few that not even two would be held out).
    field: of a JSONL object, holds the text.
    cache: folder for the encoded tokens (default: `cache_folder()`). An entry is used again while the files'
        names, sizes and times of change, the tokeniser and the split are the same.
    seed: of the order of training examples.
    say: given one line before work that may take minutes, and one about what was read.

    Raises ConfigError where the data cannot be used: one line that says what would do.
    """
    if length < 1:
        raise ConfigError(f"--length {length} is not a number of tokens; give 1 or more.")
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out {held_out} is not a fraction between 0 and 1; 0.1 holds out a tenth.")
    cache = cache_folder() if cache is None else cache
    corpus = open_corpus(path, field, split, held_out)
    if isinstance(tokenizer, str):
        tokenizer = _tokenizer(tokenizer, corpus, vocab_size, cache, say)

    def encode(folder: Path) -> None:
        say(f"encoding {corpus.bytes / 1e6:,.1f} MB of text, once; the tokens are kept in {cache}")
        _encode(corpus, tokenizer, folder)

    definition = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    folder = cached(cache, {"format": FORMAT, "tokens": corpus.fingerprint, "tokenizer": definition}, encode)
    counts = json.loads((folder / "counts.json").read_text())
    train, validation = counts["train"]["tokens"], counts["validation"]["tokens"]
    if validation < 2:
        raise ConfigError(
            f"the validation part of {corpus.name} has {validation} tokens; give more text, "
            f"a larger --held-out than {held_out}, or --split tail."
        )
    if train < length + 1:
        raise ConfigError(
            f"the training part of {corpus.name} has {train} tokens, fewer than --length {length} + 1; "
            "give more text or a smaller --length."
        )
    characters = counts["train"]["characters"] + counts["validation"]["characters"]
    say(
        f"{corpus.name}: {characters:,} characters, documents: {counts['documents']:,}; "
        f"{tokenizer.vocab:,} in the vocabulary; {train:,} tokens to learn from, {validation:,} held out "
        f"(split by {corpus.split})"
    )
    return TextData(
        tokenizer,
        train=examples(_map(folder / "train.bin", tokenizer), length, seed),
        validation=_map(folder / "validation.bin", tokenizer),
        characters_per_token=counts["validation"]["characters"] / validation,
        counts=counts,
    )


def examples(tokens: Integer[np.ndarray, " tokens"], length: int, seed: int) -> grain.MapDataset[Tokens]:
    """Training examples by number, without end; each depends on its number and the seed alone.

    Each epoch lays the tokens in a ring, cuts it from a random place on into windows of `length` targets, and
    gives the windows in a new random order. So every token is a target exactly once an epoch: the last window
    may reach into the first, and what it repeats has weight 0.

    tokens: more than `length` of them.
    """
    import grain
    from grain.experimental import index_shuffle

    count = -(-len(tokens) // length)
    whole = np.ones(length, np.float32)
    last = (np.arange(length) < len(tokens) - (count - 1) * length).astype(np.float32)
    whole.flags.writeable = last.flags.writeable = False  # examples share them

    @lru_cache(maxsize=4)
    def epoch_seeds(epoch: int) -> tuple[int, int]:
        cut, order = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
        return int(cut) % len(tokens), int(order) % 2**32

    def example(index: int) -> Tokens:
        epoch, place = divmod(index, count)
        cut, order = epoch_seeds(epoch)
        window = index_shuffle(place, max_index=count - 1, seed=order, rounds=4)
        start = (cut + window * length) % len(tokens)
        piece = tokens[start : start + length + 1].astype(np.int32)
        if len(piece) <= length:
            piece = np.concatenate([piece, tokens[: length + 1 - len(piece)]], dtype=np.int32)
        return Tokens(piece[:-1], piece[1:], last if window == count - 1 else whole)

    return grain.MapDataset.range(sys.maxsize).map(example)


def windows(tokens: Integer[np.ndarray, " tokens"], length: int) -> Tokens:
    """All tokens as `[windows, length]`: each but the first is a target once; padding has weight 0."""
    targets = len(tokens) - 1
    shape = (-(-targets // length), length)
    padded = np.zeros((2, shape[0] * length), np.int32)
    padded[0, :targets], padded[1, :targets] = tokens[:-1], tokens[1:]
    weights = (np.arange(shape[0] * length) < targets).astype(np.float32)
    return Tokens(padded[0].reshape(shape), padded[1].reshape(shape), weights.reshape(shape))


def _tokenizer(name: str, corpus: Corpus, vocab_size: int, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    """The tokeniser of that name or file; what it learns from the corpus is learned once and cached."""
    if name == "byte":
        return Bytes()
    if name not in ("char", "bpe"):
        return load_tokenizer(Path(name).expanduser())

    def learn(folder: Path) -> None:
        if name == "char":
            characters_of(_joined(corpus)).save(folder)
        else:
            size = min(corpus.bytes, BPE_SAMPLE_BYTES)
            say(f"learning {vocab_size} byte-pair tokens from {size / 1e6:,.1f} MB of text, once")
            every = -(-corpus.bytes // BPE_SAMPLE_BYTES)
            texts = (piece.text for piece in corpus.pieces() if not piece.held_out)
            train_bpe(itertools.islice(texts, 0, None, every), vocab_size).save(folder)

    made_by: dict = {"format": FORMAT, "tokenizer": name, "corpus": corpus.fingerprint}
    if name == "bpe":
        import tokenizers

        made_by |= {"vocab_size": vocab_size, "tokenizers": tokenizers.__version__}
    return load_tokenizer(cached(cache, made_by, learn))


def _joined(corpus: Corpus) -> Iterator[str]:
    """All text, with the newlines that `_encode` puts between documents."""
    last = None
    for piece in corpus.pieces():
        if last not in (None, piece.document):
            yield "\n"
        last = piece.document
        yield piece.text


@dataclass
class _Part:
    """One side of the split while it is written."""

    file: BinaryIO
    document: int | None = None
    tokens: int = 0
    characters: int = 0
    crc32: int = 0

    def write(self, tokens: np.ndarray, characters: int) -> None:
        data = tokens.tobytes()
        self.file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.tokens += len(tokens)
        self.characters += characters


def _encode(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `train.bin`, `validation.bin` and `counts.json`.

    Between documents stands the tokeniser's end of document (no character) or else a newline (one character).
    """
    dtype = _dtype(tokenizer)
    documents, last = 0, None
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        parts = _Part(train), _Part(validation)
        for batch in _batches(corpus.pieces()):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, tokens in zip(batch, encoded, strict=True):
                part = parts[piece.held_out]
                if part.document is not None and part.document != piece.document:
                    if tokenizer.end is None:
                        part.write(tokenizer.encode("\n").astype(dtype), characters=1)
                    else:
                        part.write(np.array([tokenizer.end], dtype), characters=0)
                documents += piece.document != last
                part.document = last = piece.document
                part.write(tokens.astype(dtype), len(piece.text))
    counts = {
        name: {"tokens": part.tokens, "characters": part.characters, "crc32": part.crc32}
        for name, part in zip(("train", "validation"), parts, strict=True)
    }
    (folder / "counts.json").write_text(json.dumps(counts | {"documents": documents}))


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The same pieces in groups of about BATCH_CHARACTERS."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab <= 2**16 else "<u4")


def _map(file: Path, tokenizer: Tokenizer) -> np.ndarray:
    # A view as a plain array: slices of np.memmap itself cost several times more.
    return np.asarray(np.memmap(file, _dtype(tokenizer), mode="r"))
