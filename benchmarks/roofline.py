"""What do the machine's products and streams reach, and from which intensity on do operations, not bytes, bound them?

    python -m benchmarks.roofline --output results
    python -m benchmarks.roofline --sizes 256 1024 --dtypes float32

Products of square matrices by size, and a stream over 256 MiB. The peaks are the best of all tries; runs hold their MFU
against them from then on. Writes roofline.json and a plot (Williams et al. 2009, fig. 1).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.measuring import quartiles, write
from jaxarch.run import backend, peaks
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Arguments:
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """of the matrices"""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    repeats: int = 50
    """at most"""
    cell_seconds: float = 1.5
    """for the repeats of a size; one is always made"""
    output: Path = Path("results")

    def __post_init__(self) -> None:
        for name in ("sizes", "dtypes"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} names none.")
        if min(self.sizes) < 1:
            raise ConfigError(f"--sizes {min(self.sizes)} is below 1.")
        if self.repeats < 1:
            raise ConfigError(f"--repeats {self.repeats} is below 1.")


def record(name: str, length: int, operations: int, bytes_: int, seconds: list[float]) -> dict[str, Any]:
    """bytes_: what must be read and written at the least."""
    return {
        "implementation": name, "pass": "forward", "length": length, "seconds": quartiles(seconds),
        "fastest": min(seconds), "flops": operations, "bytes": bytes_, "intensity": operations / bytes_,
        "rate": operations / quartiles(seconds)["median"],
    }  # fmt: skip


def measured(arguments: Arguments) -> list[dict[str, Any]]:
    """Size by size, so that types are compared in the same minute; the stream last."""

    def seconds(call: Callable[[], Any]) -> list[float]:
        return peaks.repeated(call, arguments.cell_seconds, arguments.repeats)

    records = [
        record(dtype, n, 2 * n**3, 3 * n**2 * BYTES[dtype], seconds(peaks.product(n, dtype)))
        for n in sorted(arguments.sizes)
        for dtype in arguments.dtypes
    ]
    adds = peaks.STREAM_BYTES // 8  # one for four bytes read and four written
    return [*records, record("stream", peaks.STREAM, adds, peaks.STREAM_BYTES, seconds(peaks.stream()))]


def roofs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each type the peak, the bandwidth, and the intensity at which the two bounds meet."""
    bandwidth = max(r["bytes"] / r["fastest"] for r in records if r["implementation"] == "stream")
    rates: dict[str, float] = {}
    for r in records:
        if r["implementation"] != "stream":
            rates[r["implementation"]] = max(r["flops"] / r["fastest"], rates.get(r["implementation"], 0.0))
    return [
        {"implementation": dtype, "pass": "forward", "quantity": "roofline", "flops": rate, "bandwidth": bandwidth}
        | {"ridge": rate / bandwidth}
        for dtype, rate in rates.items()
    ]


def lines(records: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    out = [f"{'':10}{'length':>12}{'median ms':>12}{'quartiles':>18}{'GFLOP/s':>10}{'FLOP/byte':>11}"]
    for r in records:
        q25, median, q75 = (1e3 * r["seconds"][name] for name in ("q25", "median", "q75"))
        out.append(
            f"{r['implementation']:10}{r['length']:12,}{median:12.3f}{f'{q25:.3f}-{q75:.3f}':>18}"
            f"{r['rate'] / 1e9:10.1f}{r['intensity']:11.3g}"
        )
    for fit in found:
        peak, bandwidth = fit["flops"] / 1e9, fit["bandwidth"] / 1e9
        out.append(
            f"{fit['implementation']}: peak {peak:.4g} GFLOP/s, bandwidth {bandwidth:.3g} GB/s; "
            f"bound by operations from {fit['ridge']:.3g} FLOP a byte on"
        )
    return out


def draw(records: list[dict[str, Any]], found: list[dict[str, Any]], picture: Path) -> None:
    """Rate against intensity, both axes logarithmic: what is measured under the bound of each type."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    intensities = [r["intensity"] for r in records]
    grid = np.geomspace(min(intensities) / 2, 2 * max(*intensities, *(fit["ridge"] for fit in found)), 200)
    for fit in found:
        (bound,) = axes.plot(grid, np.minimum(fit["flops"], fit["bandwidth"] * grid), label=fit["implementation"])
        own = [r for r in records if r["implementation"] == fit["implementation"]]
        axes.plot([r["intensity"] for r in own], [r["rate"] for r in own], "o", color=bound.get_color(), markersize=4)
        axes.axvline(fit["ridge"], color=bound.get_color(), linewidth=0.8, linestyle=":")
        for r in own:
            place = {"xytext": (3, -10), "textcoords": "offset points", "size": 7, "color": bound.get_color()}
            axes.annotate(str(r["length"]), (r["intensity"], r["rate"]), **place)
    streams = [r for r in records if r["implementation"] == "stream"]
    axes.plot([r["intensity"] for r in streams], [r["rate"] for r in streams], "ks", markersize=4, label="stream")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def main() -> None:
    with exits("roofline"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.roofline", __doc__ or "", sys.argv[1:])
        backend.prepare()
        records = measured(arguments)
        found = roofs(records)
        for line in lines(records, found):
            print(line)
        for fit in found:
            peaks.keep(fit["implementation"], fit["flops"])
            peaks.keep("bytes", fit["bandwidth"])
        write(arguments.output, "roofline", records, found)
        draw(records, found, arguments.output / "roofline.png")


if __name__ == "__main__":
    main()
