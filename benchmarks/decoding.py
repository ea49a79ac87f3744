"""How fast does a GPT write with its cache, beside Hugging Face's `generate` of a GPT-2 of the same size?

    python -m benchmarks.decoding --output results
    python -m benchmarks.decoding --batch 16 --peer
    python -m benchmarks.decoding --layers 12 --heads 12 --dim 768 --vocab 50257 --new 64 --peer --precision bf16

Greedy, 256 new tokens after a prompt of 16, random weights. The peer needs PyTorch and transformers. In bf16 weights
and computation are bfloat16 on both sides.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from benchmarks.measuring import Peer, alternating, quartiles, ratio, write
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.transformer.decoder import decoder, gpt2
from jaxarch.transformer.decoding import Prompts, generate
from jaxarch.transformer.training import PRECISIONS


@dataclasses.dataclass(frozen=True)
class Arguments:
    layers: int = 6
    heads: int = 6
    dim: int = 384
    vocab: int = 65
    batch: int = 1
    prompt: int = 16
    """tokens of the prompt"""
    new: int = 256
    """tokens written"""
    precision: Literal["f32", "bf16"] = "f32"
    peer: bool = False
    """beside Hugging Face"""
    torch_python: Path | None = None
    """interpreter that has PyTorch and transformers (default: this one)"""
    rounds: int = 5
    output: Path = Path("results")


def ours(arguments: Arguments) -> Callable[[], float]:
    """Seconds of one call."""
    config = gpt2(arguments.layers, arguments.heads, arguments.dim)
    dtype = PRECISIONS[arguments.precision]
    model = decoder(config, arguments.vocab, arguments.prompt + arguments.new, dtype)
    tokens = jax.random.randint(jax.random.key(1), (arguments.batch, arguments.prompt), 0, arguments.vocab, jnp.int32)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(model.init)(jax.random.key(0), tokens))
    prompts = Prompts(tokens, jnp.full(arguments.batch, arguments.prompt, jnp.int32))

    def measure() -> float:
        start = time.perf_counter()
        generate(model, variables, prompts, arguments.new, jax.random.key(0)).block_until_ready()
        return time.perf_counter() - start

    return measure


def main() -> None:
    with exits("decoding"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.decoding", __doc__ or "", sys.argv[1:])
        backend.prepare()
        measures = {"jaxarch": ours(arguments)}
        peer = None
        if arguments.peer:
            sizes = (arguments.layers, arguments.heads, arguments.dim, arguments.vocab)
            lengths = (arguments.batch, arguments.prompt, arguments.new)
            peer = Peer(arguments.torch_python, "hugging_face", *sizes, *lengths, arguments.precision)
            measures[peer.description] = peer.measure
        seconds = alternating(measures, arguments.rounds)
        if peer is not None:
            peer.close()
        records = []
        for name, values in seconds.items():
            record = {"implementation": name, "pass": "decode", "length": arguments.prompt + arguments.new}
            record |= {"layers": arguments.layers, "dim": arguments.dim, "precision": arguments.precision}
            record |= {"batch": arguments.batch, "vocab": arguments.vocab, "seconds": quartiles(values)}
            if name != "jaxarch":
                record["speed_of_ours"] = ratio(seconds["jaxarch"], values)
            records.append(record)
            speed = f"  ours is {record['speed_of_ours']['median']:.2f}x as fast" if name != "jaxarch" else ""
            per_token = record["seconds"]["median"] / arguments.new
            print(f"{1e3 * per_token:8.2f} ms a token of {arguments.batch} rows  {name}{speed}")
        name = f"decoding-{arguments.batch}" + ("-bf16" if arguments.precision == "bf16" else "")
        write(arguments.output, name, records)


if __name__ == "__main__":
    main()
