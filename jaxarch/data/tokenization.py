"""Tokenisers: text to token numbers and back.

    characters   one token a character; the vocabulary is the characters of the data, in code point order
    bytes        one token a byte of UTF-8: 256 of them, nothing to learn
    subwords     a `tokenizers.Tokenizer`: byte-level BPE trained on the data, or the user's own file

Each saves itself as one `tokenizer.json`, so that a run can generate and resume without its data.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxarch.run.protocol import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

FILE = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
# What a tokeniser of the user's may call the token that separates documents.
END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
CODE_POINTS = 0x110000


class Tokenizer(ABC):
    """The one interface: `vocab`, `end`, `encode`, `decode`, `save`; `load_tokenizer` is its inverse."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """The number of tokens: those that `encode` returns are in [0, vocab)."""

    @property
    def end(self) -> int | None:
        """The token written between documents; None: documents are joined by a newline."""
        return None

    @property
    def mask(self) -> int | None:
        """The token that stands for one that is missing, where there is one."""
        return None

    @abstractmethod
    def encode(self, text: str) -> Int32[np.ndarray, " length"]:
        """The tokens of a text, without any token added at its beginning or end."""

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        """The tokens of each text: `encode`, but on all cores where the tokeniser can."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of some tokens. Bytes that are not UTF-8 (a character cut in two) become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """All that the tokeniser is: equal tokenisers give equal text."""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into an existing folder."""
        (folder / FILE).write_text(self.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class Characters(Tokenizer):
    """Token i is the character `characters[i]`."""

    characters: str

    @property
    def vocab(self) -> int:
        return len(self.characters)

    @cached_property
    def _numbers(self) -> Int32[np.ndarray, " code_points"]:
        """The token of each code point, -1 where there is none."""
        numbers = np.full(CODE_POINTS, -1, np.int32)
        numbers[_code_points(self.characters)] = np.arange(self.vocab)
        return numbers

    def encode(self, text: str) -> Int32[np.ndarray, " length"]:
        """Raises ConfigError for a character outside the vocabulary: a model has never met it."""
        tokens = self._numbers[_code_points(text)]
        unknown = tokens < 0
        if unknown.any():
            character = text[int(unknown.argmax())]
            raise ConfigError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the {self.vocab} that "
                "the tokeniser knows; leave it out, or train with --tokenizer byte, which knows them all."
            )
        return tokens

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return "".join(self.characters[token] for token in tokens)

    def to_json(self) -> str:
        return json.dumps({"type": "characters", "characters": self.characters})


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """Token i is the byte i of the text's UTF-8."""

    @property
    def vocab(self) -> int:
        return 256

    def encode(self, text: str) -> Int32[np.ndarray, " length"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "bytes"})


class Framed(NamedTuple):
    """Texts as an encoder reads them: framed by special tokens, padded to the right.

    types: which text of a pair a token is of. mask: 1 for tokens, 0 for padding.
    """

    tokens: Int32[np.ndarray, "batch length"]
    types: Int32[np.ndarray, "batch length"]
    mask: Int32[np.ndarray, "batch length"]


class Subwords(Tokenizer):
    """A tokeniser of the `tokenizers` library, given as the text of its `tokenizer.json`."""

    def __init__(self, definition: str):
        """Raises ValueError where `definition` is not such a file."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        # Files made for classifiers cut and pad every text, silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Not the number of entries: a file may leave numbers out.
        self._vocab = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        self._end, self._mask, self._pad = map(self._first, (END_NAMES, MASK_NAMES, PAD_NAMES))

    def _first(self, names: Sequence[str]) -> int | None:
        """The number of the first of these names that is a token."""
        numbers = (self._tokenizer.token_to_id(name) for name in names)
        return next((number for number in numbers if number is not None), None)

    @property
    def vocab(self) -> int:
        return self._vocab

    @property
    def end(self) -> int | None:
        return self._end

    @property
    def mask(self) -> int | None:
        return self._mask

    def encode(self, text: str) -> Int32[np.ndarray, " length"]:
        """Raises ConfigError for what a tokeniser without a token for the unknown has never met."""
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # tokenizers raises no other kind
            raise ConfigError(f"the tokeniser cannot read {text[:40]!r}: {error}.") from None

    def encode_batch(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def frame(self, texts: Sequence[str | tuple[str, str]], length: int) -> Framed:
        """Texts or pairs of texts with the special tokens that the file frames them with, as [CLS] and [SEP].

        length: the most tokens of one, special ones among them; what is longer loses its end, of a pair the longer one
            first. The rows are as long as the longest of them.
        Raises ConfigError where that leaves no room for a text.
        """
        framing = self._framing
        special = framing.num_special_tokens_to_add(any(isinstance(text, tuple) for text in texts))
        if length <= special:
            raise ConfigError(f"a length of {length} leaves no room beside {special} special tokens; 128 would do.")
        framing.enable_truncation(length)
        encodings = framing.encode_batch(list(texts))
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        tokens = np.full((len(encodings), longest), self._pad or 0, np.int32)
        types, mask = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, encoding in enumerate(encodings):
            own = slice(len(encoding.ids))
            tokens[row, own], types[row, own], mask[row, own] = encoding.ids, encoding.type_ids, 1
        return Framed(tokens, types, mask)

    @cached_property
    def _framing(self) -> Library:
        """One of its own, for the library's tokenisers carry the length at which they cut as a state."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.to_json())

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def characters_of(texts: Iterable[str]) -> Characters:
    """The tokeniser whose vocabulary is the characters that appear in the texts."""
    appears = np.zeros(CODE_POINTS, bool)
    for text in texts:
        appears[_code_points(text)] = True
    return Characters("".join(map(chr, np.flatnonzero(appears))))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Subwords:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), trained on the texts.

    The vocabulary is the end-of-document token, the 256 bytes, and the most frequent merges: `vocab_size` in
    all, or fewer where the texts have no more pairs to merge. The same texts give the same vocabulary.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: bytes and the end of a document are 257; 4096 would do."
        )
    from tokenizers import Tokenizer as Trainable
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
    trainable.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trainable.train_from_iterator(texts, trainer)
    return Subwords(trainable.to_str())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder: written by `save` or by the `tokenizers` library.

    Raises ConfigError where it cannot be read.
    """
    file = path / FILE if path.is_dir() else path
    try:
        definition = file.read_text(encoding="utf-8")
        content = json.loads(definition)
        if content.get("type") == "characters":
            return Characters(content["characters"])
        if content.get("type") == "bytes":
            return Bytes()
        return Subwords(definition)
    except OSError as error:
        raise ConfigError(
            f"cannot read --tokenizer {file}: {error.strerror}; char, byte, bpe or a tokenizer.json would do."
        ) from error
    except (ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{file} is not a tokenizer.json ({reason}); name one that the tokenizers library saved."
        ) from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
