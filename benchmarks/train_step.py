"""How fast is a GPT's training step, beside nanoGPT's on the same machine in the same minutes?

    python -m benchmarks.train_step --size small --output results
    python -m benchmarks.train_step --size large --precision bf16 --nanogpt ../nanoGPT --torch-python python3.11

Sizes: small is L4 H4 E128 T64 B12 (nanoGPT's setting for CPU), large L6 H6 E384 T256 B16; vocabulary 65,
no dropout, gradient clipped, AdamW. nanoGPT is a checkout of its repository and needs PyTorch.
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
import numpy as np

from benchmarks.measuring import Peer, alternating, quartiles, ratio, write
from jaxarch.data.text import Tokens
from jaxarch.run import Experiment, backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.program import Carry, Member, Programs
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.training import PRECISIONS, Hypers, OptimConfig, make_init, make_step, next_token

VOCAB = 65


@dataclasses.dataclass(frozen=True)
class Arguments:
    size: Literal["small", "large"] = "small"
    precision: Literal["f32", "bf16"] = "f32"
    nanogpt: Path | None = None
    """checkout of nanoGPT"""
    torch_python: Path | None = None
    """interpreter that has PyTorch (default: this one)"""
    modes: tuple[str, ...] = ("eager", "compile")
    """of nanoGPT"""
    scan: int = 1
    """our steps a dispatch"""
    steps: int = 0
    """steps a measurement (0: about two seconds)"""
    rounds: int = 5
    output: Path = Path("results")


SIZES = {"small": (4, 4, 128, 64, 12), "large": (6, 6, 384, 256, 16)}


def ours(size: str, precision: str, steps: int, scan: int) -> Callable[[], float]:
    """Seconds of one of our steps."""
    layers, heads, dim, length, batch = SIZES[size]
    model = decoder(ModelConfig(layers, heads, dim), VOCAB, length, PRECISIONS[precision])
    optim = OptimConfig()
    init = make_init(model, (jnp.zeros((1, length), jnp.int32),), optim)
    step = make_step(next_token(model), optim, 10_000)
    experiment = Experiment(init, step, lambda state, key: {}, hypers=Hypers())
    programs = Programs(experiment, [Member(0, {})])
    tokens = np.random.default_rng(0).integers(0, VOCAB, (scan, batch, length + 1), np.int32)
    batches = Tokens(tokens[..., :-1], tokens[..., 1:], np.ones((scan, batch, length), np.float32))
    carry = Carry(programs.init(), programs.sums(jax.tree.map(lambda leaf: leaf[0], batches)))

    def measure() -> float:
        nonlocal carry
        start = time.perf_counter()
        for index in range(0, steps, scan):
            carry = programs.steps(carry, batches, index)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    return measure


def main() -> None:
    with exits("train_step"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.train_step", __doc__ or "", sys.argv[1:])
        backend.prepare()
        steps = arguments.steps or (48 if arguments.size == "small" else 1)
        layers, heads, dim, length, batch = SIZES[arguments.size]
        measures = {"jaxarch": ours(arguments.size, arguments.precision, steps, arguments.scan)}
        peers = []
        for mode in arguments.modes if arguments.nanogpt else ():
            sizes = (layers, heads, dim, length, batch, VOCAB)
            peer = Peer(arguments.torch_python, "nanogpt", arguments.nanogpt, *sizes, arguments.precision, mode, steps)
            measures[peer.description] = peer.measure
            peers.append(peer)
        seconds = alternating(measures, arguments.rounds)
        for peer in peers:
            peer.close()
        records = []
        for name, values in seconds.items():
            record = {"implementation": name, "pass": "train_step", "length": length, "seconds": quartiles(values)}
            record |= {"size": arguments.size, "precision": arguments.precision, "scan": arguments.scan}
            if name != "jaxarch":
                record["speed_of_ours"] = ratio(seconds["jaxarch"], values)
            records.append(record)
            speed = f"  ours is {record['speed_of_ours']['median']:.2f}x as fast" if name != "jaxarch" else ""
            print(f"{1e3 * record['seconds']['median']:9.1f} ms  {name}{speed}")
        write(arguments.output, f"train_step-{arguments.size}-{arguments.precision}", records)


if __name__ == "__main__":
    main()
