"""What does attention cost as the length grows, and where does it overtake the rest of a layer?

    python -m benchmarks.attention --output results
    python -m benchmarks.attention --lengths 1024 4096 16384 --implementations blockwise torch_sdpa
    python -m benchmarks.attention --compare results/attention.json

Each cell (implementation, length, pass) is timed in a process of its own, which also says its peak of memory beside the
compiler's figure. From the cells come exponents with a 95 % interval, the length at which attention passes the
projections and the rest of a layer, and the longest length that fits. Writes attention.json, attention.csv and two
plots. Peers: jax_nn, and torch_sdpa where PyTorch is installed. A rate above the machine's own peak is marked INVALID.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.attention_cell import Cell, repeated
from benchmarks.fitting import exponent, local_slopes, terms
from benchmarks.measuring import quartiles, write
from jaxarch.attention.cost import crossover, flops, visible_pairs
from jaxarch.run import peaks
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError, RunError

REST = ("projections", "layer")  # what else a layer computes; grows with the length
PASSES = {"forward": ("forward",), "forward_backward": ("forward_backward",), "both": ("forward", "forward_backward")}


@dataclasses.dataclass(frozen=True)
class Arguments:
    implementations: tuple[str, ...] = ("dense", "blockwise", "jax_nn", "torch_sdpa")
    """dense, blockwise or blocks; peers: jax_nn, torch_sdpa"""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    passes: Literal["forward", "forward_backward", "both"] = "both"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    """heads of keys and values (0: as many as heads)"""
    dim: int = 64
    """width of a head"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    causal: bool = True
    window: int = 0
    """sliding window (0: none)"""
    repeats: int = 7
    cell_seconds: float = 0.6
    """for the repeats of a cell; one is always made"""
    gibibytes: float = 2.0
    """memory for which the longest length is told"""
    compare: Path | None = None
    """an earlier attention.json; exit code 1 where a cell is slower beyond the noise"""
    output: Path = Path("results")

    def __post_init__(self) -> None:
        known = {"dense", "blockwise", "blocks", "jax_nn", "torch_sdpa"}
        wrong = [name for name in self.implementations if name not in known]
        if wrong:
            raise ConfigError(f"--implementations {wrong[0]}: there are {', '.join(sorted(known))}.")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("--lengths must be 1 at least.")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(f"--kv-heads {self.kv_heads} does not divide --heads {self.heads}.")
        if self.compare is not None and not self.compare.exists():
            raise ConfigError(f"--compare {self.compare}: there is no such file.")


def cells(arguments: Arguments) -> list[Cell]:
    """Length by length, so that what is compared is measured in the same minute."""
    names = [
        name
        for name in arguments.implementations
        if name != "torch_sdpa" or (importlib.util.find_spec("torch") and not arguments.window)
    ]
    rest = sorted(arguments.lengths)[-3:]
    shape = {
        "batch": arguments.batch, "heads": arguments.heads, "kv_heads": arguments.kv_heads or arguments.heads,
        "dim": arguments.dim, "dtype": arguments.dtype, "causal": arguments.causal,
        "window": arguments.window or None, "repeats": arguments.repeats, "seconds": arguments.cell_seconds,
    }  # fmt: skip
    return [
        Cell(implementation=name, length=length, pass_=pass_, **shape)  # type: ignore[arg-type]
        for length in sorted(arguments.lengths)
        for pass_ in PASSES[arguments.passes]
        for name in (*names, *(REST if length in rest else ()))
    ]


def measured(cell: Cell) -> dict[str, Any]:
    """The record of a cell. One that fails (out of memory, say) has no seconds, but a reason."""
    command = [sys.executable, "-m", "benchmarks.attention_cell", json.dumps(dataclasses.asdict(cell))]
    done = subprocess.run(command, capture_output=True, text=True)
    record = {"implementation": cell.implementation, "length": cell.length, "pass": cell.pass_, "flops": work(cell)}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return record | {"seconds": None, "reason": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    result = json.loads(done.stdout.splitlines()[-1])
    return record | result | {"samples": result["seconds"], "seconds": quartiles(result["seconds"])}


def work(cell: Cell) -> int:
    """Operations that the task needs, whatever an implementation does beyond them."""
    if cell.implementation in REST:
        wide, kv = cell.heads * cell.dim, cell.kv_heads * cell.dim
        sizes = wide * (wide + kv) + kv * (kv + wide)
        sizes += 8 * wide * wide if cell.implementation == "layer" else 0
        return 2 * cell.batch * cell.length * sizes * (3 if cell.pass_ == "forward_backward" else 1)
    pairs = visible_pairs(cell.length, cell.length, causal=cell.causal, window=cell.window)
    return flops(pairs, cell.batch, cell.heads, cell.dim, cell.dim, cell.pass_)


def overhead() -> float:
    """What a call of a compiled program costs that does next to nothing."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(8)
    nothing = jax.jit(lambda x: x + 1)
    return float(np.median(repeated(lambda: nothing(x).block_until_ready(), 51)))


def validated(records: list[dict[str, Any]], peak: float) -> None:
    """Marks what no machine with this peak can have done: a clock, not a product, was measured."""
    for record in records:
        if record["seconds"]:
            record["rate"] = record["flops"] / record["seconds"]["median"]
            record["invalid"] = record["rate"] > 1.25 * peak  # the products tried need not be the best


def fits(records: list[dict[str, Any]], idle: float) -> list[dict[str, Any]]:
    out = []
    for name, pass_ in dict.fromkeys((r["implementation"], r["pass"]) for r in records):
        for quantity in ("seconds", "bytes"):
            own = series(records, name, pass_, quantity)
            lengths = [r["length"] for r in own]
            costs = [r["samples"] if quantity == "seconds" else [float(r["peak_bytes"])] for r in own]
            found = exponent(lengths, costs, idle if quantity == "seconds" else 0.0)
            if found is not None:
                medians = [float(np.median(c)) for c in costs]
                fit = {"implementation": name, "pass": pass_, "quantity": quantity, **found._asdict()}
                out.append(fit | {"terms": list(terms(lengths, medians)), "slopes": local_slopes(lengths, medians)})
    return out


def series(records: list[dict[str, Any]], name: str, pass_: str, quantity: str) -> list[dict[str, Any]]:
    """The cells of one implementation and pass in which this quantity was measured."""
    own = [r for r in records if (r["implementation"], r["pass"]) == (name, pass_)]
    own = [r for r in own if r["seconds"] and not r["invalid"]]
    return own if quantity == "seconds" else [r for r in own if r["peak_bytes"] > 0]


def largest(a: float, b: float, c: float) -> float | None:
    """The length from which on a + b n + c n^2 is above 0; None: it never is."""
    if c > 0:
        root = b * b - 4 * a * c
        return (-b + root**0.5) / (2 * c) if root > 0 else 0.0
    return -a / b if b > 0 else None


def answers(arguments: Arguments, found: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, a line for each implementation and pass, and one for who is fastest."""
    out = []
    by = {(fit["implementation"], fit["pass"], fit["quantity"]): fit for fit in found}
    theory = crossover(arguments.heads * arguments.dim, arguments.causal)
    for name, pass_ in dict.fromkeys((r["implementation"], r["pass"]) for r in records):
        fit, memory = by.get((name, pass_, "seconds")), by.get((name, pass_, "bytes"))
        if name in REST or fit is None:
            continue
        said = [f"exponent {fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"]
        if memory is not None:
            a, b, c = memory["terms"]
            said.append(f"of memory {memory['exponent']:.2f} [{memory['low']:.2f}, {memory['high']:.2f}]")
            limit = largest(a - arguments.gibibytes * 2**30, b, c)
            said += [f"longest in {arguments.gibibytes:g} GiB: {limit:,.0f}"] if limit else []
        for rest, factor in (("projections", 1), ("layer", 3)):
            other = by.get((rest, pass_, "seconds"))
            if other is not None:
                a, b, c = np.subtract(fit["terms"], other["terms"])
                n = largest(a, b, c)
                words = "its projections" if rest == "projections" else "the rest of the layer"
                where = f"from {n:,.0f}" if n is not None and n > 0 else "nowhere" if n is None else "everywhere"
                said.append(f"above {words} {where} (by operations {factor * theory:,})")
        out.append(f"{name}, {pass_}: {'; '.join(said)}")
    for pass_ in PASSES[arguments.passes]:
        good = [r for r in records if r["pass"] == pass_ and r["implementation"] not in REST]
        good = [r for r in good if r["seconds"] and not r["invalid"]]
        ranked = sorted(good, key=lambda r: (r["length"], r["seconds"]["median"]))
        best = {r["length"]: r["implementation"] for r in reversed(ranked)}
        out.append(f"fastest, {pass_}: " + ", ".join(f"{n:,} {best[n]}" for n in sorted(best)))
    return out


def table(records: list[dict[str, Any]]) -> list[str]:
    lengths = sorted({r["length"] for r in records})
    rows = [f"{'ms (MiB)':32}" + "".join(f"{n:>18,}" for n in lengths)]
    for name, pass_ in dict.fromkeys((r["implementation"], r["pass"]) for r in records):
        row = f"{name + ', ' + pass_:32}"
        for n in lengths:
            found = [r for r in records if (r["implementation"], r["pass"], r["length"]) == (name, pass_, n)]
            text = ""
            if found:
                text = "failed"
                if found[0]["seconds"]:
                    text = f"{1e3 * found[0]['seconds']['median']:.1f} ({found[0]['peak_bytes'] / 2**20:.0f})"
                    text += " INVALID" if found[0]["invalid"] else ""
            row += f"{text:>18}"
        rows.append(row)
    return rows


def compared(records: list[dict[str, Any]], old: Path) -> list[str]:
    """The cells whose lower quartile lies above the old upper quartile by a tenth and more."""
    try:
        before = {(r["implementation"], r["pass"], r["length"]): r for r in json.loads(old.read_text())["records"]}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ConfigError(f"--compare {old} is not what this benchmark writes.") from None
    out = []
    for r in records:
        was = before.get((r["implementation"], r["pass"], r["length"]))
        if was and was["seconds"] and r["seconds"] and r["seconds"]["q25"] > 1.1 * was["seconds"]["q75"]:
            ratio = r["seconds"]["median"] / was["seconds"]["median"]
            out.append(f"{r['implementation']}, {r['pass']}, {r['length']}: {ratio:.2f} times the seconds")
    return out


def draw(records: list[dict[str, Any]], found: list[dict[str, Any]], folder: Path) -> None:
    """Time and memory against length, both axes logarithmic, with the fitted lines and slopes of 1 and 2."""
    from matplotlib.figure import Figure

    for quantity, label in (("seconds", "seconds"), ("bytes", "bytes at the peak")):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        passes = list(dict.fromkeys(r["pass"] for r in records))
        for place, pass_ in enumerate(passes):
            axes = figure.add_subplot(1, len(passes), place + 1)
            lengths, costs = [], []
            for name in dict.fromkeys(r["implementation"] for r in records):
                own = series(records, name, pass_, quantity)
                if not own:
                    continue
                n = np.array([r["length"] for r in own], float)
                y = [r["seconds"]["median"] if quantity == "seconds" else r["peak_bytes"] for r in own]
                fit = [f for f in found if (f["implementation"], f["pass"], f["quantity"]) == (name, pass_, quantity)]
                text = f"{name} {fit[0]['exponent']:.2f}" if fit else name
                lengths, costs = [*lengths, *n], [*costs, *y]
                (points,) = axes.plot(n, y, "s:" if name in REST else "o", label=text, markersize=4)
                if fit:
                    a, b, c = fit[0]["terms"]
                    grid = np.geomspace(n[0], n[-1], 60)
                    axes.plot(grid, a + b * grid + c * grid**2, color=points.get_color(), linewidth=1)
            corner = min(lengths), min(costs)
            for slope in (1, 2):
                grid = np.array([corner[0], max(lengths)])
                line = corner[1] * (grid / corner[0]) ** slope
                axes.plot(grid, line, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
            axes.set(xscale="log", yscale="log", xlabel="length", ylabel=label, title=pass_)
            axes.legend(fontsize="small", title="implementation, exponent", title_fontsize="small")
            axes.grid(alpha=0.3)
        figure.savefig(folder / f"attention-{quantity}.png", dpi=110)


def main() -> None:
    with exits("attention"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.attention", __doc__ or "", sys.argv[1:])
        old = arguments.compare
        start, records = time.perf_counter(), []
        todo = cells(arguments)
        for number, cell in enumerate(todo):
            records.append(measured(cell))
            if sys.stdout.isatty():
                print(f"\r{number + 1} of {len(todo)} cells", end="", flush=True)
        if sys.stdout.isatty():
            print("\r", end="")
        validated(records, peaks.flops(arguments.dtype))
        found = fits(records, overhead())
        slower = compared(records, old) if old else []
        for line in [*table(records), "", *answers(arguments, found, records)]:
            print(line)
        for r in records:
            if not r["seconds"]:
                print(f"{r['implementation']}, {r['pass']}, {r['length']} failed: {r['reason']}")
        write(arguments.output, "attention", records, found)
        with (arguments.output / "attention.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["implementation", "pass", "length", "median_seconds", "q25", "q75", "peak_bytes", "flops"])
            for r in records:
                if r["seconds"]:
                    times = [r["seconds"][key] for key in ("median", "q25", "q75")]
                    rows.writerow([r["implementation"], r["pass"], r["length"], *times, r["peak_bytes"], r["flops"]])
        draw(records, found, arguments.output)
        print(f"{len(records)} cells in {time.perf_counter() - start:.0f} s")
        if slower:
            raise RunError(f"slower than {old}: {'; '.join(slower)}")


if __name__ == "__main__":
    main()
