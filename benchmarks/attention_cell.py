"""The measurements of one implementation at one length, in a process of its own: started by `benchmarks.attention`.

Reads a cell as JSON from its argument and prints a line of JSON for each pass. A process has but one peak of memory,
and what one cell leaves behind must not be another's; so the passes come in the order of what they need.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

Pass = Literal["decode", "forward", "forward_backward"]

EXACT = ("dense", "blocks", "blockwise", "window", "ring")
LINEAR = ("linear", "gated_linear", "delta_rule")
PEERS = ("jax_nn", "torch_sdpa")
REST = ("projections", "layer")  # what else a layer computes; grows with the length


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured.

    implementation: EXACT and LINEAR are those of `jaxarch.attention`, PEERS are others'; REST: a layer's four
        projections, alone and with its feed-forward layer; step: a step of an experiment.
    """

    implementation: str
    length: int
    passes: tuple[Pass, ...]
    batch: int
    heads: int
    kv_heads: int
    dim: int
    hidden: int
    gated: bool
    dtype: str
    causal: bool
    window: int | None
    devices: int
    repeats: int
    seconds: float  # for the repeats of a pass; one is always made
    experiment: str = ""  # module and options, for a step


def resident(field: str) -> int:
    """Bytes of this process, VmRSS or VmHWM (the most since the last reset); 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def reset_peak() -> None:
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def settled() -> int:
    """What the process holds once all that it does not use is given back; from here on its peak is counted."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another allocator than glibc's
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    return resident("VmRSS")


def repeated(call: Callable[[], Any], repeats: int, budget: float = math.inf) -> list[float]:
    """Seconds of each call: `repeats` of them, fewer once `budget` seconds are spent, but one at least."""
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) < budget):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(cell: Cell) -> Iterator[dict[str, Any]]:
    from jaxarch.run import backend

    backend.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_enable_compilation_cache", False)  # to time compiling, not reading
    programs, seconds = {}, {}
    for pass_ in cell.passes:
        start = time.perf_counter()
        program, shapes = program_of(cell, pass_)
        programs[pass_] = backend.compiled(jax.jit(program).trace(*shapes))[0], shapes
        seconds[pass_] = time.perf_counter() - start
    for pass_, (compiled, shapes) in programs.items():
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape.shape, np.float32).astype(shape.dtype) for shape in shapes]
        if cell.implementation in LINEAR and len(arrays) > 3:
            arrays[3] = -abs(arrays[3])  # log decays, at most 0
        inputs = [jnp.asarray(array) for array in arrays]
        size = sum(array.nbytes for array in arrays)
        del arrays
        jax.block_until_ready(compiled(*inputs))  # what is made once, at the first call, is no part of the cost
        before = settled()
        jax.block_until_ready(compiled(*inputs))
        allocator = jax.devices()[0].memory_stats() or {}
        peak = allocator.get("peak_bytes_in_use", resident("VmHWM") - before + size)
        memory = compiled.memory_analysis()
        planned = None
        if memory is not None:
            planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        yield {
            "pass": pass_, "compile_seconds": seconds[pass_], "peak_bytes": peak, "planned_bytes": planned,
            "seconds": repeated(lambda: jax.block_until_ready(compiled(*inputs)), cell.repeats, cell.seconds),  # noqa: B023
        }  # fmt: skip


def program_of(cell: Cell, pass_: Pass) -> tuple[Callable, list[Any]]:
    """The function that a pass calls and the shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    function, shapes = forward_of(cell, pass_)

    def both(*inputs):
        out, pullback = jax.vjp(function, *inputs)
        return out, pullback(out)

    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(cell.dtype)) for shape in shapes]
    return both if pass_ == "forward_backward" else function, arguments


def forward_of(cell: Cell, pass_: Pass) -> tuple[Callable, list[tuple[int, ...]]]:
    if cell.implementation in REST:
        wide, kv = cell.heads * cell.dim, cell.kv_heads * cell.dim
        pairs = [(wide, wide), (wide, kv), (kv, wide), (wide, wide)]
        if cell.implementation == "layer":
            pairs += [(wide, cell.hidden), (cell.hidden, wide), (wide, cell.hidden)][: 3 if cell.gated else 2]

        def layer(x, *matrices):
            for matrix in matrices:
                x = x @ matrix  # one after another: the same products as a layer's
            return x

        return layer, [(cell.batch * (1 if pass_ == "decode" else cell.length), wide), *pairs]
    queries = 1 if pass_ == "decode" else cell.length
    shapes = [(cell.batch, queries, cell.heads, cell.dim)]
    shapes += [(cell.batch, cell.length, cell.kv_heads, cell.dim)] * 2
    if cell.implementation in LINEAR:
        return linear(cell, pass_, shapes)
    return (peer if cell.implementation == "jax_nn" else exact)(cell, pass_), shapes


def peer(cell: Cell, pass_: Pass) -> Callable:
    import jax

    causal = cell.causal and pass_ != "decode"
    window = None if cell.window is None else (cell.window - 1, 0 if cell.causal else cell.window - 1)
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=window)


def exact(cell: Cell, pass_: Pass) -> Callable:
    import jax
    from jax.sharding import PartitionSpec

    from jaxarch.attention import attention

    options: dict[str, Any] = {"causal": cell.causal, "window": cell.window, "implementation": cell.implementation}
    if pass_ == "decode":
        options["q_offset"] = cell.length - 1
    if cell.implementation != "ring":
        return lambda q, k, v: attention(q, k, v, **options)
    mesh = jax.make_mesh((cell.devices,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
    part = PartitionSpec(None, "ring")
    own = lambda q, k, v: attention(q, k, v, **options, axis="ring")  # noqa: E731
    return jax.shard_map(own, mesh=mesh, in_specs=(part, part, part), out_specs=part)


def linear(cell: Cell, pass_: Pass, shapes: list[tuple[int, ...]]) -> tuple[Callable, list[tuple[int, ...]]]:
    """One step from a state while decoding, else the chunked form."""
    import jax
    import jax.numpy as jnp

    from jaxarch.attention import linear as family

    if pass_ == "decode":
        shapes = [(cell.batch, 1, *shape[2:]) for shape in shapes]
    length, form = shapes[1][1], "recurrent" if pass_ == "decode" else "chunked"
    one_gate = (cell.batch, length, cell.kv_heads, 1)
    state = [(cell.batch, cell.kv_heads, cell.dim, cell.dim)] if pass_ == "decode" else []

    def plain(q, k, v, values=None):
        before = None if values is None else family.LinearState(values, values[..., 0], None)
        return family.linear_attention(q, k, v, causal=cell.causal, state=before, form=form)[0]  # type: ignore[arg-type]

    def gated(q, k, v, log_decay, state=None):
        return family.gated_linear_attention(q, k, v, log_decay, form=form, state=state)[0]  # type: ignore[arg-type]

    def delta(q, k, v, beta, state=None):
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        return family.delta_rule(q, k, v, jax.nn.sigmoid(beta), form=form, state=state)[0]  # type: ignore[arg-type]

    return {
        "linear": (plain, [*shapes, *state]),
        "gated_linear": (gated, [*shapes, one_gate, *state]),
        "delta_rule": (delta, [*shapes, one_gate[:3], *state]),
    }[cell.implementation]


def torch_sdpa(cell: Cell) -> Iterator[dict[str, Any]]:
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    for pass_ in cell.passes:
        backward = pass_ == "forward_backward"
        sizes = [(cell.heads, 1 if pass_ == "decode" else cell.length), *[(cell.kv_heads, cell.length)] * 2]
        q, k, v = (torch.randn(cell.batch, *size, cell.dim, dtype=dtype, requires_grad=backward) for size in sizes)
        causal, grouped = cell.causal and pass_ != "decode", cell.heads != cell.kv_heads

        def call(q=q, k=k, v=v, backward=backward, causal=causal, grouped=grouped) -> None:
            with torch.set_grad_enabled(backward):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
                if backward:
                    for x in (q, k, v):
                        x.grad = None
                    out.backward(out.detach())

        call()
        size, before = sum(x.nbytes for x in (q, k, v)), settled()
        call()
        peak = resident("VmHWM") - before + size * (2 if backward else 1)  # the gradients of the first call are there
        yield {
            "pass": pass_, "compile_seconds": 0.0, "peak_bytes": peak, "planned_bytes": None,
            "seconds": repeated(call, cell.repeats, cell.seconds),
        }  # fmt: skip


def step(cell: Cell) -> Iterator[dict[str, Any]]:
    """A training step of an experiment at this length, as its run would compile it."""
    from jaxarch.run import backend

    backend.prepare()
    import jax

    from jaxarch.run.loop import batches
    from jaxarch.run.program import Carry, Member, Programs

    module, config = configured(cell.experiment, cell.length)
    experiment = module.experiment(config)
    programs = Programs(experiment, [Member(0, {})])
    batch = batches(experiment, 0, 1)
    carry = Carry(programs.init(), programs.sums(jax.tree.map(lambda leaf: leaf[0], batch)))
    before, index = settled(), 0

    def call() -> None:
        nonlocal carry, index
        carry = programs.steps(carry, batch, index)
        jax.block_until_ready(carry)
        index += 1

    call()
    yield {
        "pass": "forward_backward", "compile_seconds": programs.compile_seconds, "planned_bytes": None,
        "peak_bytes": resident("VmHWM") - before, "seconds": repeated(call, cell.repeats, 4 * cell.seconds),
    }  # fmt: skip


@functools.cache
def configured(experiment: str, length: int | None = None) -> tuple[Any, Any]:
    """The module of an experiment and its configuration from `experiments.gpt llama --model.layers 2`.

    Raises ConfigError where there is none, or it is not a Transformer's.
    """
    import shlex

    from jaxarch.run.command import parse
    from jaxarch.run.protocol import ConfigError

    try:
        name, *options = shlex.split(experiment)
    except ValueError:
        raise ConfigError(f"--experiment {experiment!r}: say a module and its options, in matching quotes.") from None
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"--experiment {name}: there is no such module; say for example experiments.gpt.") from None
    if not hasattr(module, "Config") or not hasattr(module, "experiment"):
        raise ConfigError(f"--experiment {name}: it is no experiment, which has a Config and an experiment(config).")
    config, *_ = parse(name, "", module.Config, getattr(module, "PRESETS", {}), options)
    model = getattr(config, "model", None)
    lacking = [field for field in ("heads", "kv_heads", "dim", "head_dim", "layers") if not hasattr(model, field)]
    if not hasattr(config, "length") or lacking:
        raise ConfigError(f"--experiment {name}: its Config has no --length and --model.heads; it has no attention.")
    return module, config if length is None else dataclasses.replace(config, length=length)


def main() -> None:
    given = json.loads(sys.argv[1])
    cell = Cell(**given | {"passes": tuple(given["passes"])})
    for found in {"torch_sdpa": torch_sdpa, "step": step}.get(cell.implementation, ours)(cell):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
