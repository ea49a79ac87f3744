"""One measurement of attention, in a process of its own: started by `benchmarks.attention`, not by hand.

Reads a cell as JSON from its argument and prints what it measured. A process has but one peak of memory, and what one
cell leaves behind must not be another's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Pass = Literal["forward", "forward_backward"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured.

    implementation: dense, blockwise or blocks of `jaxarch.attention`; jax_nn, torch_sdpa: peers; projections, layer:
        what else a layer of width heads * dim computes: its four projections; these and a feed-forward layer of
        four times the width.
    """

    implementation: str
    length: int
    pass_: Pass
    batch: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str
    causal: bool
    window: int | None
    repeats: int
    seconds: float  # for the repeats; one is always made


def resident(field: str) -> int:
    """Bytes of this process, VmRSS or VmHWM (the most since the last reset); 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def reset_peak() -> None:
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")


def repeated(call: Callable[[], Any], repeats: int, budget: float = math.inf) -> list[float]:
    """Seconds of each call: `repeats` of them, fewer once `budget` seconds are spent, but one at least."""
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < budget):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(cell: Cell) -> dict[str, Any]:
    from jaxarch.run import backend

    backend.prepare()
    import jax
    import jax.numpy as jnp

    from jaxarch.attention import attention

    dtype, wide = jnp.dtype(cell.dtype), cell.heads * cell.dim
    shapes = [(cell.batch, cell.length, heads, cell.dim) for heads in (cell.heads, cell.kv_heads, cell.kv_heads)]

    def peer(q, k, v):
        window = None if cell.window is None else (cell.window - 1, 0 if cell.causal else cell.window - 1)
        return jax.nn.dot_product_attention(q, k, v, is_causal=cell.causal, local_window_size=window)

    def own(q, k, v):
        return attention(q, k, v, causal=cell.causal, window=cell.window, implementation=cell.implementation)  # type: ignore[arg-type]

    def layer(x, *matrices):
        for matrix in matrices:
            x = x @ matrix  # one after another: the same products as a layer's
        return x

    function = {"jax_nn": peer}.get(cell.implementation, own)
    if cell.implementation in ("projections", "layer"):
        kv = cell.kv_heads * cell.dim
        pairs = [(wide, wide), (wide, kv), (kv, kv), (kv, wide)]
        pairs += [(wide, 4 * wide), (4 * wide, wide)] if cell.implementation == "layer" else []
        shapes, function = [(cell.batch * cell.length, wide), *pairs], layer

    def both(*inputs):
        out, pullback = jax.vjp(function, *inputs)
        return out, pullback(out)

    program = both if cell.pass_ == "forward_backward" else function
    abstract = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    start = time.perf_counter()
    compiled = jax.jit(program).lower(*abstract).compile()
    compile_seconds = time.perf_counter() - start
    memory, before = compiled.memory_analysis(), resident("VmRSS")
    inputs = [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]
    reset_peak()
    jax.block_until_ready(compiled(*inputs))
    peak = resident("VmHWM") - before
    seconds = repeated(lambda: jax.block_until_ready(compiled(*inputs)), cell.repeats, cell.seconds)
    predicted = None
    if memory is not None:
        predicted = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "seconds": seconds, "compile_seconds": compile_seconds, "peak_bytes": peak, "predicted_bytes": predicted,
        "versions": f"jax {jax.__version__}",
    }  # fmt: skip


def torch_sdpa(cell: Cell) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    before = resident("VmRSS")
    heads = (cell.heads, cell.kv_heads, cell.kv_heads)
    backward = cell.pass_ == "forward_backward"
    q, k, v = (
        torch.randn(cell.batch, count, cell.length, cell.dim, dtype=dtype, requires_grad=backward) for count in heads
    )

    def call() -> None:
        with torch.set_grad_enabled(backward):
            grouped = cell.heads != cell.kv_heads
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=cell.causal, enable_gqa=grouped)
            if backward:
                for x in (q, k, v):
                    x.grad = None
                out.backward(out.detach())

    reset_peak()
    call()
    peak = resident("VmHWM") - before
    return {
        "seconds": repeated(call, cell.repeats, cell.seconds), "compile_seconds": 0.0, "peak_bytes": peak,
        "predicted_bytes": None, "versions": f"torch {torch.__version__}",
    }  # fmt: skip


if __name__ == "__main__":
    asked = Cell(**json.loads(sys.argv[1]))
    print(json.dumps((torch_sdpa if asked.implementation == "torch_sdpa" else ours)(asked)))
