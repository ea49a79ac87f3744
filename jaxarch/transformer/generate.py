"""Text from a finished run of a decoder; its data is not needed.

python -m jaxarch.transformer.generate runs/gpt/demo --prompt "The "
python -m jaxarch.transformer.generate runs/gpt/demo --tokens 500 --temperature 0.7 --top-k 40 --count 3
python -m jaxarch.transformer.generate runs/gpt/demo --tokens 50 --beams 4 --count 2
python -m jaxarch.transformer.generate runs/gpt/demo --draft runs/gpt/small --temperature 0
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jaxtyping import Array, Int, Key, PyTree

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.beams import Beams, search
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.decoding import (
    Processor,
    Prompts,
    Sampler,
    distribution,
    generate,
    left_pad,
    repetition_penalty,
    sampling,
)
from jaxarch.transformer.finished import restored
from jaxarch.transformer.speculation import generate_speculatively


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/gpt/demo"""
    prompt: tuple[str, ...] = ("\n",)
    """what to continue; several are continued at once"""
    tokens: int = 256
    """how many new ones"""
    count: int = 1
    """continuations of each prompt"""
    temperature: float | None = None
    """0 takes the most probable token (default: 0.8)"""
    top_k: int = 0
    """draw from the k most probable (0: all)"""
    top_p: float = 1.0
    """draw from the fewest that reach this probability together"""
    min_p: float = 0.0
    """draw from those at least this probable, relative to the most probable"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that the text holds already less probable"""
    beams: int = 0
    """instead of drawing follow so many texts at once, and write the best of them, or the --count best"""
    length_penalty: float = 1.0
    """of beams: above 0 favours long texts, below 0 short ones"""
    draft: Path | None = None
    """run of a smaller model with the same tokeniser: it guesses, the other judges; the same text, sooner"""
    drafted: int = 4
    """tokens guessed at a time"""
    seed: int = 0
    step: str = "newest"
    """checkpoint: newest, best or a number"""


Write = Callable[[Prompts, int, Key[Array, ""]], Int[Array, "batch new_tokens"]]


def complete(
    write: Write, length: int, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int, key: Key[Array, ""]
) -> list[str]:
    """Each prompt with its continuation, which ends where the tokeniser's end of a document is drawn.

    A text that outgrows the length goes on from its last half, as often as that is needed.
    Raises ConfigError where a prompt is empty or holds a character that the tokeniser does not know.

    write: continues prompts by a number of tokens, with a key.
    length: of the model.
    """
    texts = [list(map(int, tokenizer.encode(prompt))) for prompt in prompts]
    done = [False] * len(texts)
    left = new_tokens
    while left > 0 and not all(done):
        keep = max(length // 2, 1)
        longest = max(map(len, texts))
        context = [text if longest < length else text[-keep:] for text in texts]
        count = min(left, 1 + length - max(map(len, context)))
        written = write(left_pad(context), count, jax.random.fold_in(key, left))
        for number, row in enumerate(np.asarray(written)):
            row = until(tokenizer.end, row)
            if not done[number]:
                texts[number] += map(int, row)
            done[number] |= len(row) < count
        left -= count
    return [tokenizer.decode(text) for text in texts]


def drawing(
    model: Decoder,
    variables: PyTree,
    sampler: Sampler,
    stop_token: int | None = None,
    processors: tuple[Processor, ...] = (),
) -> Write:
    """Token by token, by `decoding.generate`."""

    def write(prompts: Prompts, count: int, key: Key[Array, ""]) -> Int[Array, "batch new_tokens"]:
        return generate(model, variables, prompts, count, key, sampler, stop_token, processors)

    return write


def until(end: int | None, tokens: np.ndarray) -> np.ndarray:
    """The tokens before the first end of a document."""
    stops = np.flatnonzero(tokens == end) if end is not None else []
    return tokens[: stops[0]] if len(stops) else tokens


def processors_of(arguments: Arguments) -> tuple[Processor, ...]:
    return () if arguments.repetition_penalty == 1 else (repetition_penalty(arguments.repetition_penalty),)


def best(arguments: Arguments, model: Decoder, variables: PyTree, tokenizer: Tokenizer) -> list[str]:
    """The best texts of a beam search from each prompt. Raises ConfigError where they do not fit the model's length."""
    beams = Beams(arguments.beams, arguments.count, arguments.length_penalty)
    texts = []
    for prompt in arguments.prompt:
        start = [int(token) for token in tokenizer.encode(prompt)]
        room = 1 + model.length - len(start)
        if arguments.tokens > room:
            raise ConfigError(f"--beams needs room for all {arguments.tokens} --tokens; after {prompt!r} it is {room}.")
        options = beams, tokenizer.end, processors_of(arguments)
        found = search(model, variables, left_pad([start]), arguments.tokens, *options)
        texts += [
            tokenizer.decode([*start, *map(int, until(tokenizer.end, row))]) for row in np.asarray(found.tokens[0])
        ]
    return texts


def writer(arguments: Arguments, model: Decoder, variables: PyTree, tokenizer: Tokenizer) -> tuple[Write, int]:
    """How the command's tokens are drawn, and the length that the models have in common."""
    temperature = 0.8 if arguments.temperature is None else arguments.temperature
    choice = temperature, arguments.top_k, arguments.top_p, arguments.min_p
    rest = tokenizer.end, processors_of(arguments)
    if arguments.draft is None:
        return drawing(model, variables, sampling(*choice), *rest), model.length
    draft, draft_variables, draft_tokenizer = decoder_of(arguments.draft)
    if draft_tokenizer.to_json() != tokenizer.to_json():
        raise ConfigError(f"the tokeniser of --draft {arguments.draft} is not that of {arguments.run}.")
    models = model, variables, draft, draft_variables
    drawn_from = distribution(*choice)

    def write(prompts: Prompts, count: int, key: Array) -> Array:
        return generate_speculatively(*models, prompts, count, key, arguments.drafted, drawn_from, *rest).tokens

    return write, min(model.length, draft.length)


def checked(arguments: Arguments) -> None:
    """Raises ConfigError for options that contradict each other."""
    if arguments.tokens < 1 or arguments.count < 1:
        raise ConfigError("--tokens and --count must be 1 at least.")
    repetition_penalty(arguments.repetition_penalty)
    if not arguments.beams and arguments.length_penalty != 1:
        raise ConfigError("--length-penalty is of --beams; --beams 4 is usual.")
    if not arguments.draft and arguments.drafted != 4:
        raise ConfigError("--drafted is of --draft, the run that guesses.")
    if not arguments.beams:
        return
    Beams(arguments.beams, arguments.count)
    if arguments.draft:
        raise ConfigError("--beams and --draft exclude each other: a draft's guesses are judged one text at a time.")
    drawing = arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p
    if drawing != (None, 0, 1.0, 0.0):
        raise ConfigError("--beams draws nothing; leave out --temperature, --top-k, --top-p and --min-p.")


def decoder_of(run: Path, step: str = "newest") -> tuple[Decoder, PyTree, Tokenizer]:
    """The run's model, its variables and its tokeniser. Raises ConfigError."""
    model, params, tokenizer = restored(run, step)
    if not isinstance(model, Decoder) or tokenizer is None:
        raise ConfigError(f"{run} is not the run of a decoder; there is nothing to generate from.")
    return model, {"params": params}, tokenizer


def main() -> None:
    with exits("generate"):
        program = "python -m jaxarch.transformer.generate"
        arguments = parsed_or_usage(Arguments, program, __doc__ or "", sys.argv[1:])
        checked(arguments)
        backend.prepare()
        model, variables, tokenizer = decoder_of(arguments.run, arguments.step)
        if arguments.beams:
            texts = best(arguments, model, variables, tokenizer)
        else:
            prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.count)]
            write, length = writer(arguments, model, variables, tokenizer)
            texts = complete(write, length, tokenizer, prompts, arguments.tokens, jax.random.key(arguments.seed))
        print("\n---\n".join(text.strip("\n") for text in texts))


if __name__ == "__main__":
    main()
