"""How fast is an encoder's forward pass, beside the same BERT of `transformers` in the same minutes?

    python -m benchmarks.encoder --output results
    python -m benchmarks.encoder --padded --peers sdpa eager --torch-python python3.11

By default MiniLM's sizes, L6 H12 E384 with a vocabulary of 30,522, and 32 texts of 128 tokens, in float32.
The peer needs PyTorch and transformers; it runs in `torch.inference_mode` with as many threads as cores.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from benchmarks.measuring import Peer, alternating, quartiles, ratio, write
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.transformer.encoder import EncoderConfig, encoder, forward_flops
from jaxarch.transformer.training import PRECISIONS

LAYERS, HEADS, DIM, VOCAB, POSITIONS = 6, 12, 384, 30522, 512


@dataclasses.dataclass(frozen=True)
class Arguments:
    batch: int = 32
    length: int = 128
    precision: Literal["f32", "bf16"] = "f32"
    padded: bool = False
    """texts of half the length to all of it, and a mask; otherwise all of it and none"""
    peers: tuple[Literal["sdpa", "eager"], ...] = ("sdpa", "eager")
    """the peer's attention; no names: no peer"""
    torch_python: Path | None = None
    """interpreter that has PyTorch (default: this one)"""
    calls: int = 4
    """a measurement"""
    rounds: int = 7
    output: Path = Path("results")


def ours(arguments: Arguments) -> Callable[[], float]:
    """Seconds of one of our forward passes."""
    model = encoder(EncoderConfig(LAYERS, HEADS, DIM), VOCAB, POSITIONS, PRECISIONS[arguments.precision])
    params = jax.jit(model.init)(jax.random.key(0), *model.inputs())["params"]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (arguments.batch, arguments.length), np.int32)
    lengths = np.linspace(arguments.length // 2, arguments.length, arguments.batch).astype(int)
    mask = (np.arange(arguments.length) < lengths[:, None]).astype(np.int32) if arguments.padded else None
    apply = jax.jit(lambda params, tokens, mask: model.apply({"params": params}, tokens, None, mask))
    forward, _ = backend.compiled(apply.trace(params, tokens, mask))

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(arguments.calls):
            out = forward(params, tokens, mask)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / arguments.calls

    return measure


def main() -> None:
    with exits("encoder"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.encoder", __doc__ or "", sys.argv[1:])
        backend.prepare()
        measures = {"jaxarch": ours(arguments)}
        peers = []
        for attention in arguments.peers:
            sizes = (LAYERS, HEADS, DIM, VOCAB, arguments.batch, arguments.length, arguments.precision)
            peer = Peer(arguments.torch_python, "bert", *sizes, int(arguments.padded), attention, arguments.calls)
            measures[peer.description] = peer.measure
            peers.append(peer)
        seconds = alternating(measures, arguments.rounds)
        for peer in peers:
            peer.close()
        operations = forward_flops(EncoderConfig(LAYERS, HEADS, DIM), VOCAB, arguments.batch, arguments.length)
        records = []
        for name, values in seconds.items():
            record = {"implementation": name, "pass": "forward", "length": arguments.length}
            record |= {"batch": arguments.batch, "precision": arguments.precision, "padded": arguments.padded}
            record |= {"seconds": quartiles(values), "flops": operations}
            if name != "jaxarch":
                record["speed_of_ours"] = ratio(seconds["jaxarch"], values)
            records.append(record)
            speed = f"  ours is {record['speed_of_ours']['median']:.2f}x as fast" if name != "jaxarch" else ""
            print(f"{1e3 * record['seconds']['median']:9.1f} ms  {name}{speed}")
        write(arguments.output, f"encoder-{arguments.precision}{'-padded' if arguments.padded else ''}", records)


if __name__ == "__main__":
    main()
