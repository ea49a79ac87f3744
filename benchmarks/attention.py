"""What does attention cost as the length grows, and where does it overtake the rest of a layer?

    python -m benchmarks.attention --output results
    python -m benchmarks.attention --config llama3-8b --dtype bfloat16
    python -m benchmarks.attention --lengths 1024 4096 16384 --implementations blockwise torch_sdpa
    python -m benchmarks.attention --experiment 'experiments.gpt --model.layers 6'
    python -m benchmarks.attention --compare results/attention.json --output results/new

Each implementation at each length is timed in a process of its own, which also says its peak of memory, beside the
predicted one. From these come exponents with a 95 % interval, the length at which attention passes the projections
and the rest of a layer, and the longest length that fits. Writes attention.json, attention.csv and two plots. Peers:
jax_nn, and torch_sdpa where PyTorch is installed. A rate above the machine's own peak is marked INVALID.

With --experiment: a training step of that experiment at each length, and the share of it that attention takes.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.attention_answers import (
    SETTINGS,
    answers,
    compared,
    draw,
    earlier,
    fits,
    overhead,
    shares,
    table,
    validated,
)
from benchmarks.attention_cell import EXACT, LINEAR, PEERS, REST, Cell, Pass, configured
from benchmarks.measuring import quartiles, write
from jaxarch.attention.cost import Shape, flops, linear_flops, peak_bytes, projection_flops, visible_pairs
from jaxarch.run import peaks
from jaxarch.run.command import exits, parsed_or_usage, value_of
from jaxarch.run.protocol import ConfigError, RunError, check_least

PASSES: dict[str, tuple[Pass, ...]] = {
    "forward": ("forward",),
    "forward_backward": ("forward_backward",),
    "both": ("forward", "forward_backward"),
    "decode": ("decode",),
    "all": ("decode", "forward", "forward_backward"),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    config: Literal["gpt2", "llama3-8b", "vit-b", "whisper-base"] | None = None
    """the layer of a known model: sets lengths, heads, widths and the mask, unless they are said"""
    experiment: str = ""
    """module of an experiment and its options: profiles its training step"""
    implementations: tuple[str, ...] = ("dense", "blockwise", "gated_linear", "jax_nn", "torch_sdpa")
    """exact: dense, blocks, blockwise, window, ring; linear in the length: linear (with elu + 1), gated_linear,
    delta_rule; peers: jax_nn, torch_sdpa"""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    passes: Literal["forward", "forward_backward", "both", "decode", "all"] = "both"
    """decode: one query over a cache of the length"""
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    """heads of keys and values (0: as many as heads)"""
    dim: int = 64
    """width of a head"""
    hidden: int = 0
    """width of the feed-forward layer (0: four times that of all heads)"""
    gated: bool = False
    """the feed-forward layer has a gate (SwiGLU): three matrices"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    causal: bool = True
    window: int = 0
    """sliding window (0: none)"""
    devices: int = 1
    """for ring, which cuts the length over so many"""
    repeats: int = 7
    cell_seconds: float = 0.6
    """for the repeats of a cell; one is always made"""
    budget: float = 0.0
    """seconds after which no further cell is begun (0: no limit)"""
    gibibytes: float = 2.0
    """memory for which the longest length is told; what would take more is left out"""
    compare: Path | None = None
    """an earlier attention.json; exit code 1 where a cell is slower beyond the noise"""
    output: Path = Path("results")

    def __post_init__(self) -> None:
        known = {*EXACT, *LINEAR, *PEERS}
        wrong = [name for name in self.implementations if name not in known]
        if wrong:
            raise ConfigError(f"--implementations {wrong[0]}: there are {', '.join(sorted(known))}.")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("--lengths must be 1 at least.")
        check_least(self, ("batch", "heads", "dim", "devices", "repeats"), 1)
        check_least(self, ("kv_heads", "hidden", "window", "cell_seconds", "budget"), 0)
        if self.gibibytes <= 0:
            raise ConfigError(f"--gibibytes {self.gibibytes:g} is not above 0.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(f"--kv-heads {self.kv_heads} does not divide --heads {self.heads}.")
        if "window" in self.implementations and not self.window:
            raise ConfigError("--implementations window needs --window, for example --window 256.")
        if "blocks" in self.implementations and not self.causal:
            raise ConfigError("--implementations blocks is for --causal True.")
        parts = self.devices * (2 if self.causal and self.devices > 1 else 1)
        if "ring" in self.implementations and any(length % parts for length in self.lengths):
            raise ConfigError(
                f"--implementations ring over --devices {self.devices}: give --lengths that {parts} divides."
            )
        if self.compare is not None and not self.compare.is_file():
            raise ConfigError(f"--compare {self.compare}: there is no such file.")
        if self.compare is not None and self.compare.resolve() == (self.output / "attention.json").resolve():
            raise ConfigError(f"--compare {self.compare}: this run would write there; choose another --output.")


# Radford et al. 2019; Llama 3, 2024, table 3; Dosovitskiy et al. 2021, table 1, at resolutions of 224 to 1,024;
# Radford et al. 2022, table 1: the encoder, 1,500 frames for 30 seconds.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"heads": 12, "dim": 64, "lengths": (256, 512, 1024, 2048, 4096)},
    "llama3-8b": {
        "heads": 32, "kv_heads": 8, "dim": 128, "hidden": 14336, "gated": True, "lengths": (256, 512, 1024, 2048),
    },
    "vit-b": {"heads": 12, "dim": 64, "causal": False, "lengths": (197, 577, 1025, 2305, 4097)},
    "whisper-base": {"heads": 8, "dim": 64, "causal": False, "lengths": (375, 750, 1500, 3000, 6000)},
}  # fmt: skip


def cell(arguments: Arguments, name: str, length: int, passes: tuple[Pass, ...]) -> Cell:
    return Cell(
        implementation=name, length=length, passes=passes, batch=arguments.batch, heads=arguments.heads,
        kv_heads=arguments.kv_heads or arguments.heads, dim=arguments.dim, gated=arguments.gated,
        hidden=arguments.hidden or 4 * arguments.heads * arguments.dim, dtype=arguments.dtype,
        causal=arguments.causal, window=arguments.window or None, devices=arguments.devices,
        repeats=arguments.repeats, seconds=arguments.cell_seconds, experiment=arguments.experiment,
    )  # fmt: skip


def cells(arguments: Arguments) -> list[Cell]:
    """Length by length, so that what is compared is measured in the same minute."""
    passes = PASSES[arguments.passes]
    if arguments.experiment:
        attention = attention_of(arguments)
        training: tuple[Pass, ...] = ("forward_backward",)
        return [
            cell(asked, name, length, training)
            for length in sorted(set(arguments.lengths))
            for asked, name in ((arguments, "step"), (attention, "auto"))
        ]
    names = [name for name in arguments.implementations if name != "torch_sdpa" or torch_fits(arguments)]
    if len(names) < len(arguments.implementations):
        print("torch_sdpa is left out: " + ("it has no --window" if arguments.window else "PyTorch is not installed"))
    whole: tuple[Pass, ...] = tuple(
        pass_ for pass_ in passes if pass_ != "decode"
    )  # blocks, window and ring are for whole sequences
    rest = sorted(set(arguments.lengths))[-3:]
    asked = [
        cell(arguments, name, length, whole if name in ("blocks", "window", "ring") else passes)
        for length in sorted(set(arguments.lengths))
        for name in (*names, *(REST if length in rest else ()))
    ]
    return [one for one in asked if one.passes]


def torch_fits(arguments: Arguments) -> bool:
    return importlib.util.find_spec("torch") is not None and not arguments.window


def attention_of(arguments: Arguments) -> Arguments:
    """The attention of one layer of the experiment that is profiled."""
    _, config = configured(arguments.experiment)
    model = config.model
    parts = getattr(getattr(config, "optim", None), "accumulate", 1)
    precision = {"f32": "float32", "bf16": "bfloat16"}[getattr(config, "precision", "f32")]
    return dataclasses.replace(
        arguments, heads=model.heads, kv_heads=model.kv_heads, dim=model.head_dim,
        batch=config.batch_size // parts, dtype=precision, causal=getattr(model, "causal", True),
    )  # fmt: skip


def shape_of(cell: Cell) -> Shape:
    size = 2 if cell.dtype == "bfloat16" else 4
    return Shape(cell.batch, cell.length, cell.heads, cell.kv_heads, cell.dim, cell.dim, size)


def predicted(cell: Cell, pass_: Pass) -> int | None:
    """Bytes at the peak by formula, where there is one."""
    name = {"jax_nn": "dense"}.get(cell.implementation, cell.implementation)
    if name not in ("dense", "blocks", "blockwise", "window") or pass_ == "decode":
        return None
    return peak_bytes(name, shape_of(cell), pass_, cell.causal, cell.window)


def work(cell: Cell, pass_: Pass) -> int:
    """Operations that the task needs, whatever an implementation does beyond them."""
    times = 3 if pass_ == "forward_backward" else 1
    length = 1 if pass_ == "decode" else cell.length
    if cell.implementation in REST:
        wide = cell.heads * cell.dim
        feed_forward = 2 * cell.batch * length * (3 if cell.gated else 2) * wide * cell.hidden
        projections = projection_flops(cell.batch, length, wide, cell.heads, cell.kv_heads, cell.dim)
        return times * (projections + (feed_forward if cell.implementation == "layer" else 0))
    if cell.implementation in LINEAR:
        # Of the recurrence, the least that any of its forms computes.
        return times * linear_flops(cell.batch, length, cell.heads, cell.kv_heads, cell.dim, cell.dim, chunk=1)
    if cell.implementation == "step":
        return 0
    pairs = min(cell.window or cell.length, cell.length)
    if pass_ != "decode":
        pairs = visible_pairs(cell.length, cell.length, causal=cell.causal, window=cell.window)
    return times * flops(pairs, cell.batch, cell.heads, cell.dim, cell.dim)


def measured(cell: Cell) -> Iterator[dict[str, Any]]:
    """The record of each pass. One that fails (out of memory, say) has no seconds, but a reason."""
    command = [sys.executable, "-m", "benchmarks.attention_cell", json.dumps(dataclasses.asdict(cell))]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # so that the last line is the error
    if cell.implementation == "ring":  # of use on CPU alone; a GPU's devices are there
        environment["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cell.devices}"
        )
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # an experiment says things too
    found = {result["pass"]: result for result in map(json.loads, lines)}
    lines = done.stderr.strip().splitlines()
    reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
    for pass_ in cell.passes:
        record = {"implementation": cell.implementation, "length": cell.length, "pass": pass_}
        record |= {name: getattr(cell, name) for name in SETTINGS}
        record |= {"flops": work(cell, pass_), "predicted_bytes": predicted(cell, pass_)}
        record |= {"devices": cell.devices if cell.implementation == "ring" else 1}
        if pass_ not in found:
            yield record | {"seconds": None, "reason": reason}
            continue
        result = found[pass_]
        record["predicted_bytes"] = record["predicted_bytes"] or result["planned_bytes"]
        yield record | result | {"samples": result["seconds"], "seconds": quartiles(result["seconds"])}


def measure_all(arguments: Arguments, todo: list[Cell]) -> list[dict[str, Any]]:
    """The records of all cells that fit the memory and are begun within the budget; a line on those left out."""
    start, records, late = time.perf_counter(), [], 0
    for number, cell in enumerate(todo):
        if sys.stdout.isatty():
            print(f"\r{number + 1} of {len(todo)} cells", end="", flush=True)
        sizes = {pass_: (predicted(cell, pass_) or 0) / 2**30 for pass_ in cell.passes}
        fitting = tuple(pass_ for pass_ in cell.passes if sizes[pass_] <= arguments.gibibytes)
        for pass_ in set(cell.passes) - set(fitting):
            what = f"{cell.implementation}, {pass_}, {cell.length:,}"
            print(f"{what}: left out, would take {sizes[pass_]:.1f} GiB; see --gibibytes")
        if arguments.budget and time.perf_counter() - start > arguments.budget:
            late += len(fitting)
        elif fitting:
            records += measured(dataclasses.replace(cell, passes=fitting))
    if sys.stdout.isatty():
        print("\r", end="")
    if late:
        print(f"{late} cells were not begun within --budget {arguments.budget:g}")
    return records


def main() -> None:
    with exits("attention"):
        given = sys.argv[1:]
        name = value_of(given, "--config")
        default = dataclasses.replace(Arguments(), **CONFIGS.get(name or "", {}))
        if value_of(given, "--experiment"):
            default = dataclasses.replace(default, lengths=(64, 128, 256, 512, 1024))
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.attention", __doc__ or "", given, default)
        old = earlier(arguments.compare) if arguments.compare else None
        start = time.perf_counter()
        records = measure_all(arguments, cells(arguments))
        validated(records, peaks.flops(arguments.dtype))
        found = fits(records, overhead())
        if arguments.experiment:
            _, config = configured(arguments.experiment)
            said = shares(attention_of(arguments), config, found, records)
        else:
            said = answers(arguments, found, records)
        for line in [*table(records), "", *said]:
            print(line)
        for r in records:
            if not r["seconds"]:
                print(f"{r['implementation']}, {r['pass']}, {r['length']}: failed: {r['reason']}")
        write(arguments.output, "attention", records, found)
        with (arguments.output / "attention.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(
                ["implementation", "pass", "length", "median", "q25", "q75", "peak_bytes", "predicted_bytes", "flops"]
            )
            for r in records:
                quarters = [r["seconds"][key] for key in ("median", "q25", "q75")] if r["seconds"] else [""] * 3
                rest = r.get("peak_bytes"), r["predicted_bytes"], r["flops"]
                rows.writerow([r["implementation"], r["pass"], r["length"], *quarters, *rest])
        if any(r["seconds"] for r in records):
            draw(records, found, arguments.output)
        print(f"{len(records)} cells in {time.perf_counter() - start:.0f} s")
        if records and not any(r["seconds"] for r in records):
            raise RunError("every cell failed; the first: " + records[0]["reason"])
        slower = compared(records, old) if old else []
        if slower:
            raise RunError("slower than before: " + "; ".join(slower) + ".")


if __name__ == "__main__":
    main()
