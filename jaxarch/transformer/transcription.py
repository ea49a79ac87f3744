"""Text of a sound, by a model of `speech.py`: in windows, after a prefix that says what is wanted, token by token.

A sound longer than the model's window (30 s for published ones) is cut where it is quietest in the last sixth of each
window, and every piece is transcribed on its own. Timestamps are not asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree

from jaxarch.attention.cache import Cache, take_rows
from jaxarch.data.tokenization import Tokenizer
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.beams import Beams, beam_search
from jaxarch.transformer.decoding import Processor, Prompts, Text, decode, greedy
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
    beams: Beams | None = None,
    batch: int = 8,
) -> Transcript:
    """What is said in a sound.

    samples: at 16 kHz, as `read_wav(path, RATE)` gives them.
    language: as "en"; None: the one that the model finds most probable in the first window.
    task: transcribe, or translate (into English).
    new_tokens: the most that a window may have; None: half the model's length, as in the paper's code.
    beams: of a beam search; None: each token is the most probable one.
    batch: windows at a time.
    Raises ConfigError where the model does not know the language or the task, or the tokens do not fit its length.
    """
    spans, most = windows(samples, 2 * model.source * HOP), model.length // 2 if new_tokens is None else new_tokens
    encode = _encoder(model)  # pyright: ignore[reportArgumentType]
    variables, found, texts = {"params": params}, language, []
    for first in range(0, len(spans), batch):
        pieces = [samples[begin:end] for begin, end in spans[first : first + batch]]
        empty = [samples[:0]] * (min(batch, len(spans)) - len(pieces))  # the last batch is as large as the others
        filled = np.stack([fitted(piece, 2 * model.source * HOP) for piece in (*pieces, *empty)])
        memory = encode(variables, filled)
        if found is None and markers.languages:
            found = heard_language(model, variables, memory[:1], markers)[0]
        prefix = markers.prefix(found, task)
        tokens = written(model, variables, memory, prefix, most, markers, beams)
        for row in np.asarray(tokens)[: len(pieces)].tolist():
            texts.append(tokenizer.decode([token for token in row if markers.is_text(token)]))
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


# --- tokens -------------------------------------------------------------------------------------


def heard_language(
    model: Whisper, variables: PyTree, memory: Float[Array, "batch source dim"], markers: Markers
) -> list[str]:
    """The most probable language of each sound, by the token that would follow the start (sec. 2.3)."""
    names, tokens = zip(*markers.languages, strict=True)
    logits = _first_logits(model)(  # pyright: ignore[reportArgumentType]
        variables, memory, jnp.int32(markers.start)
    )
    return [names[number] for number in np.asarray(logits)[:, list(tokens)].argmax(axis=1)]


def written(
    model: Whisper,
    variables: PyTree,
    memory: Float[Array, "batch source dim"],
    prefix: Sequence[int],
    new_tokens: int,
    markers: Markers,
    beams: Beams | None = None,
) -> Int[Array, "batch new_tokens"]:
    """The tokens after the prefix, up to the end, which fills the rest.

    memory: of `model.encode`.
    beams: of a beam search; None: each token is the most probable one that is not suppressed.
    Raises ConfigError where prefix and new tokens do not fit the model's length.
    """
    if new_tokens < 1:
        raise ConfigError(f"{new_tokens} new tokens are too few; ask for 1 at least.")
    if len(prefix) + new_tokens - 1 > model.length:
        raise ConfigError(
            f"a prefix of {len(prefix)} tokens and {new_tokens} new ones do not fit the model's length {model.length}; "
            f"{model.length - len(prefix) + 1} would."
        )
    # Linen modules do have a hash, by their fields, which their type does not tell.
    program = _writer(model, new_tokens, markers, beams)  # pyright: ignore[reportArgumentType]
    return program(variables, memory, jnp.asarray(prefix, jnp.int32))


@lru_cache
def suppressing(always: tuple[int, ...], first: tuple[int, ...] = ()) -> Processor:
    """Rules tokens out: some always, and some as the first new one."""

    def processor(text: Text, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        numbers = np.arange(logits.shape[1])
        out = np.isin(numbers, always) | ((text.length == text.prompt) & np.isin(numbers, first))
        return jnp.where(out, -jnp.inf, logits)

    return processor


@lru_cache(maxsize=8)
def _encoder(model: Whisper) -> Callable:
    def run(variables: PyTree, samples: Array) -> Array:
        return cast(Array, model.apply(variables, log_mel(samples, model.config.bands), method="encode"))

    return jax.jit(run)


@lru_cache(maxsize=8)
def _first_logits(model: Whisper) -> Callable:
    def run(variables: PyTree, memory: Array, token: Array) -> Array:
        tokens = jnp.full((memory.shape[0], 1), token)
        return cast(Array, model.apply(variables, tokens, memory, method="decode"))[:, 0]

    return jax.jit(run)


@lru_cache(maxsize=8)
def _writer(model: Whisper, new_tokens: int, markers: Markers, beams: Beams | None) -> Callable:
    processors = (suppressing(markers.suppressed, markers.suppressed_first),)

    def run(variables: PyTree, memory: Array, prefix: Array) -> Array:
        batch, length = memory.shape[0], prefix.shape[0]
        prompts = Prompts(jnp.tile(prefix, (batch, 1)), jnp.full(batch, length))
        cache = model.empty_cache(length, jnp.zeros(batch, jnp.int32))
        logits, cache = cast(Any, model.apply(variables, prompts.tokens, memory, cache=cache, method="decode"))
        # The sound's keys and values stay out of the cache, whose rows a search copies with each token.
        width = 1 if beams is None else beams.width
        ready = take_rows(cache.memory, jnp.repeat(jnp.arange(batch), width))

        def step(tokens: Array, cache: Cache) -> tuple[Array, Cache]:
            cache = cache._replace(memory=ready)
            logits, cache = cast(Any, model.apply(variables, tokens, cache=cache, method="decode"))
            return logits, cache._replace(memory=None)

        begun = step, logits[:, -1], cache._replace(memory=None), prompts, new_tokens
        if beams is None:
            return decode(*begun, jax.random.key(0), greedy, markers.end, processors)
        return beam_search(*begun, beams, markers.end, processors).tokens[:, 0]

    return jax.jit(run)
