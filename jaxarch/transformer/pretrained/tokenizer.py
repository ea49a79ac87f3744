"""The tokenisers of `jaxarch.data.tokenization` as files of the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from jaxarch.data.tokenization import FILE, Bytes, Characters, Subwords, Tokenizer, load_tokenizer
from jaxarch.run.command import write_json


def load(folder: Path) -> Tokenizer | None:
    """The folder's `tokenizer.json`; None where there is none. Raises ConfigError where it is not one."""
    return load_tokenizer(folder) if (folder / FILE).exists() else None


def save(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes `tokenizer.json`, and what makes `transformers` take it as it stands."""
    as_subwords(tokenizer).save(folder)
    end = None if tokenizer.end is None else tokenizer.decode([tokenizer.end])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
    write_json(folder / "tokenizer_config.json", settings)


def as_subwords(tokenizer: Tokenizer) -> Subwords:
    """The same tokens under the same numbers, by the `tokenizers` library.

    Characters become words of one letter, and one that is not among them stays an error. Bytes become
    byte-level BPE without merges.
    """
    if isinstance(tokenizer, Subwords):
        return tokenizer
    if isinstance(tokenizer, Characters):
        library = Library(models.WordLevel({character: i for i, character in enumerate(tokenizer.characters)}, "[UNK]"))
        splitter, decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    elif isinstance(tokenizer, Bytes):
        library = Library(models.BPE({letter: byte for byte, letter in enumerate(_byte_letters())}, []))
        splitter, decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    else:
        raise TypeError(f"{type(tokenizer).__name__} is not a tokeniser of jaxarch.data.tokenization")
    library.pre_tokenizer = splitter  # type: ignore[reportAttributeAccessIssue]
    library.decoder = decoder  # type: ignore[reportAttributeAccessIssue]
    return Subwords(library.to_str())


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where Latin-1 prints it, else one from U+0100 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
