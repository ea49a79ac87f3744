"""Text from a finished run of a decoder; its data is not needed.

python -m jaxarch.transformer.generate runs/gpt/demo --prompt "The "
python -m jaxarch.transformer.generate runs/gpt/demo --tokens 500 --temperature 0.7 --top-k 40 --count 3
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jaxtyping import Array, Key, PyTree

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.decoding import Sampler, generate, left_pad, sampling
from jaxarch.transformer.finished import restored


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
    temperature: float = 0.8
    """0 takes the most probable token"""
    top_k: int = 0
    """draw from the k most probable (0: all)"""
    top_p: float = 1.0
    """draw from the fewest that reach this probability together"""
    min_p: float = 0.0
    """draw from those at least this probable, relative to the most probable"""
    seed: int = 0
    step: str = "newest"
    """checkpoint: newest, best or a number"""


def complete(
    model: Decoder,
    params: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    key: Key[Array, ""],
    sampler: Sampler,
) -> list[str]:
    """Each prompt with its continuation, which ends where the tokeniser's end of a document is drawn.

    A text that outgrows the model's length goes on from its last half, as often as that is needed.
    Raises ConfigError where a prompt is empty or holds a character that the tokeniser does not know.
    """
    texts = [list(map(int, tokenizer.encode(prompt))) for prompt in prompts]
    done = [False] * len(texts)
    left = new_tokens
    while left > 0 and not all(done):
        keep = max(model.length // 2, 1)
        longest = max(map(len, texts))
        context = [text if longest < model.length else text[-keep:] for text in texts]
        count = min(left, 1 + model.length - max(map(len, context)))
        span_key = jax.random.fold_in(key, left)
        written = generate(model, {"params": params}, left_pad(context), count, span_key, sampler, tokenizer.end)
        for number, row in enumerate(np.asarray(written)):
            stops = np.flatnonzero(row == tokenizer.end) if tokenizer.end is not None else []
            row = row[: stops[0]] if len(stops) else row
            if not done[number]:
                texts[number] += map(int, row)
            done[number] |= len(stops) > 0
        left -= count
    return [tokenizer.decode(text) for text in texts]


def main() -> None:
    with exits("generate"):
        program = "python -m jaxarch.transformer.generate"
        arguments = parsed_or_usage(Arguments, program, __doc__ or "", sys.argv[1:])
        if arguments.tokens < 1 or arguments.count < 1:
            raise ConfigError("--tokens and --count must be 1 at least.")
        sampler = sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
        backend.prepare()
        model, params, tokenizer = restored(arguments.run, arguments.step)
        if not isinstance(model, Decoder) or tokenizer is None:
            raise ConfigError(f"{arguments.run} is not the run of a decoder; there is nothing to generate from.")
        prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.count)]
        texts = complete(model, params, tokenizer, prompts, arguments.tokens, jax.random.key(arguments.seed), sampler)
        print("\n---\n".join(text.strip("\n") for text in texts))


if __name__ == "__main__":
    main()
