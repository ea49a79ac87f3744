"""Text of a sound, by a model of `speech.py`: in windows, after a prefix that says what is wanted, token by token.

A sound longer than the model's window (30 s for published ones) is cut where it is quietest in the last sixth of each
window, and every piece is transcribed on its own. Timestamps are not asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.spectrogram import HOP, RATE, fitted, log_mel
from jaxarch.transformer.speech import Whisper


class Markers(NamedTuple):
    """The tokens that frame a transcription (Radford et al. 2022, fig. 1, below), and those that must not be in one.

    languages, tasks: pairs of a name, as "en" and "transcribe", and its token; empty for a model of English alone.
    no_timestamps: says that none are wanted; None where a model knows none. All tokens after it are times.
    suppressed, suppressed_first: never chosen, and not as the first one.
    """

    start: int
    end: int
    languages: tuple[tuple[str, int], ...] = ()
    tasks: tuple[tuple[str, int], ...] = ()
    no_timestamps: int | None = None
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    def prefix(self, language: str | None, task: str) -> tuple[int, ...]:
        """What a transcription begins with. Raises ConfigError where the model does not know the language or task."""
        tokens = [self.start]
        if language is not None:
            tokens.append(_named(self.languages, language, "language"))
        if self.tasks:
            tokens.append(_named(self.tasks, task, "task"))
        elif task != "transcribe":
            raise ConfigError(f"the model knows no tasks; it can transcribe, but not {task}.")
        return tuple(tokens) if self.no_timestamps is None else (*tokens, self.no_timestamps)

    def is_text(self, token: int) -> bool:
        """Neither a marker nor a time."""
        special = {self.start, self.end, *dict(self.languages).values(), *dict(self.tasks).values()}
        return token not in special and (self.no_timestamps is None or token < self.no_timestamps)


def _named(known: Sequence[tuple[str, int]], name: str, kind: str) -> int:
    if name not in dict(known):
        names = ", ".join(dict(known)) or "none"
        raise ConfigError(f"the model does not know the {kind} {name}; it knows {names}.")
    return dict(known)[name]


def named_markers(tokenizer: Tokenizer) -> Markers:
    """The markers that a tokeniser has under Whisper's names. Raises ConfigError where it has no start and no end."""
    added = json.loads(tokenizer.to_json()).get("added_tokens", [])
    tokens = {token["content"][2:-2]: token["id"] for token in added if re.fullmatch(r"<\|.+\|>", token["content"])}
    if not {"startoftranscript", "endoftext"} <= tokens.keys():
        raise ConfigError("the tokeniser has no <|startoftranscript|> and <|endoftext|> to frame a transcription with.")
    return Markers(
        tokens["startoftranscript"],
        tokens["endoftext"],
        tuple((name, token) for name, token in tokens.items() if re.fullmatch("[a-z]{2,3}", name)),
        tuple((name, tokens[name]) for name in ("transcribe", "translate") if name in tokens),
        tokens.get("notimestamps"),
    )


# --- a sound ------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What was said between two times, in seconds."""

    begin: float
    end: float
    text: str


class Transcript(NamedTuple):
    """language: the one asked for or else heard; None where the model knows none."""

    text: str
    language: str | None
    parts: tuple[Part, ...]


def transcribe(
    model: Whisper,
    params: PyTree,
    tokenizer: Tokenizer,
    samples: Float32[np.ndarray, " samples"],
    markers: Markers,
    language: str | None = None,
    task: str = "transcribe",
    new_tokens: int | None = None,
    batch: int = 8,
) -> Transcript:
    """What is said in a sound, each token being the most probable one.

    samples: at 16 kHz, as `read_wav(path, RATE)` gives them.
    language: as "en"; None: the one that the model finds most probable in the first window.
    task: transcribe, or translate (into English).
    new_tokens: the most that a window may have; None: half the model's length, as in the paper's code.
    batch: windows at a time.
    Raises ConfigError where the model does not know the language or the task, or the tokens do not fit its length.
    """
    spans = windows(samples, 2 * model.source * HOP)
    variables = {"params": params}
    encode, found, texts = _encoder(model), language, []
    for first in range(0, len(spans), batch):
        pieces = [samples[begin:end] for begin, end in spans[first : first + batch]]
        empty = [samples[:0]] * (min(batch, len(spans)) - len(pieces))  # the last batch is as large as the others
        filled = np.stack([fitted(piece, 2 * model.source * HOP) for piece in (*pieces, *empty)])
        memory = encode(variables, filled)
        if found is None and markers.languages:
            found = heard_language(model, variables, memory[:1], markers)[0]
        prefix = markers.prefix(found, task)
        tokens = written(model, variables, memory, prefix, new_tokens or model.length // 2, markers)
        texts += [_text(row, tokenizer, markers) for row in np.asarray(tokens)[: len(pieces)]]
    parts = tuple(Part(begin / RATE, end / RATE, text) for (begin, end), text in zip(spans, texts, strict=True))
    return Transcript("".join(texts).strip(), found, parts)


def windows(samples: Float32[np.ndarray, " samples"], length: int) -> list[tuple[int, int]]:
    """Begin and end of pieces that are no longer than `length` and together are the sound.

    Each but the last ends in the middle of the quietest fiftieth of its last sixth, so that few words are cut.
    """
    search = length // 6
    block = max(search // 50, 1)
    spans, begin = [], 0
    while len(samples) - begin > length:
        last = samples[begin + length - search // block * block : begin + length]
        energies = np.square(last.reshape(-1, block)).sum(axis=1)
        quietest = len(energies) - 1 - int(energies[::-1].argmin())  # of equals the last
        end = begin + length - (len(energies) - quietest) * block + block // 2
        spans.append((begin, end))
        begin = end
    return [*spans, (begin, len(samples))]


def _text(tokens: Int[np.ndarray, " length"], tokenizer: Tokenizer, markers: Markers) -> str:
    row = tokens.tolist()
    row = row[: row.index(markers.end)] if markers.end in row else row
    return tokenizer.decode([token for token in row if markers.is_text(token)])


# --- tokens -------------------------------------------------------------------------------------


def heard_language(
    model: Whisper, variables: PyTree, memory: Float[Array, "batch source dim"], markers: Markers
) -> list[str]:
    """The most probable language of each sound, by the token that would follow the start (sec. 2.3)."""
    names, tokens = zip(*markers.languages, strict=True)
    logits = _first_logits(model)(variables, memory, jnp.int32(markers.start))
    return [names[number] for number in np.asarray(logits)[:, list(tokens)].argmax(axis=1)]


def written(
    model: Whisper,
    variables: PyTree,
    memory: Float[Array, "batch source dim"],
    prefix: Sequence[int],
    new_tokens: int,
    markers: Markers,
) -> Int[Array, "batch new_tokens"]:
    """The tokens after the prefix, each the most probable one that is not suppressed; after the end, the end.

    memory: of `model.encode`. Raises ConfigError where prefix and new tokens do not fit the model's length.
    """
    if new_tokens < 1:
        raise ConfigError(f"{new_tokens} new tokens are too few; ask for 1 at least.")
    if len(prefix) + new_tokens - 1 > model.length:
        raise ConfigError(
            f"a prefix of {len(prefix)} tokens and {new_tokens} new ones do not fit the model's length {model.length}; "
            f"{model.length - len(prefix) + 1} would."
        )
    return _writer(model, new_tokens, markers)(variables, memory, jnp.asarray(prefix, jnp.int32))


@lru_cache(maxsize=8)
def _encoder(model: Whisper) -> Callable:
    def run(variables: PyTree, samples: Array) -> Array:
        return model.apply(variables, log_mel(samples, model.config.bands), method="encode")

    return jax.jit(run)


@lru_cache(maxsize=8)
def _first_logits(model: Whisper) -> Callable:
    def run(variables: PyTree, memory: Array, token: Array) -> Array:
        return model.apply(variables, jnp.full((memory.shape[0], 1), token), memory, method="decode")[:, 0]

    return jax.jit(run)


@lru_cache(maxsize=8)
def _writer(model: Whisper, new_tokens: int, markers: Markers) -> Callable:
    numbers = np.arange(model.vocab)
    never = np.where(np.isin(numbers, markers.suppressed), -np.inf, 0).astype(np.float32)
    not_first = np.where(np.isin(numbers, markers.suppressed_first), -np.inf, never)

    def run(variables: PyTree, memory: Array, prefix: Array) -> Array:
        batch, length = memory.shape[0], prefix.shape[0]
        cache = model.empty_cache(length + new_tokens - 1, jnp.zeros(batch, jnp.int32))
        logits, cache = model.apply(variables, jnp.tile(prefix, (batch, 1)), memory, cache=cache, method="decode")
        first = jnp.argmax(logits[:, -1] + not_first, axis=-1)
        chosen = jnp.full((batch, new_tokens), markers.end, first.dtype).at[:, 0].set(first)

        def advance(carry: tuple) -> tuple:
            number, chosen, done, cache = carry
            last = jax.lax.dynamic_slice_in_dim(chosen, number - 1, 1, axis=1)
            logits, cache = model.apply(variables, last, cache=cache, method="decode")
            tokens = jnp.where(done, markers.end, jnp.argmax(logits[:, -1] + never, axis=-1))
            chosen = jax.lax.dynamic_update_index_in_dim(chosen, tokens, number, axis=1)
            return number + 1, chosen, done | (tokens == markers.end), cache

        carry = (jnp.int32(1), chosen, first == markers.end, cache)
        return jax.lax.while_loop(lambda carry: (carry[0] < new_tokens) & ~carry[2].all(), advance, carry)[1]

    return jax.jit(run)
