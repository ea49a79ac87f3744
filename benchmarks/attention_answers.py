"""What the profiler's cells say: exponents, crossovers, the longest length, a table, plots, what became slower."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attention_cell import EXACT, PEERS, REST, repeated
from benchmarks.fitting import exponent, local_slopes, terms
from jaxarch.attention.cost import crossover
from jaxarch.run.protocol import ConfigError

Records = list[dict[str, Any]]
Terms = tuple[float, float, float]  # of a + b n + c n^2


def overhead() -> float:
    """What a call of a compiled program costs that does next to nothing."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(8)
    nothing = jax.jit(lambda x: x + 1)
    return float(np.median(repeated(lambda: nothing(x).block_until_ready(), 51)))


def validated(records: Records, peak: float) -> None:
    """Marks what no machine with this peak can have done: a clock, not a product, was measured."""
    for record in records:
        if record["seconds"]:
            record["rate"] = record["flops"] / record["seconds"]["median"]
            # The products tried need not be the best, and the peak is that of one device.
            record["invalid"] = record["rate"] > 1.25 * peak * record.get("devices", 1)


def fits(records: Records, idle: float) -> Records:
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


def series(records: Records, name: str, pass_: str, quantity: str) -> Records:
    """The cells of one implementation and pass in which this quantity was measured."""
    own = [r for r in records if (r["implementation"], r["pass"]) == (name, pass_)]
    own = [r for r in own if r["seconds"] and not r["invalid"]]
    return own if quantity == "seconds" else [r for r in own if r["peak_bytes"] > 0]


def signs(a: float, b: float, c: float) -> tuple[list[float], list[bool]]:
    """Of a + b n + c n^2 for n > 0: where it changes its sign, and whether it is above 0 before, between and after."""
    roots = np.roots(np.trim_zeros([c, b, a], "f")) if any((a, b, c)) else np.array([])
    places = sorted({float(r.real) for r in roots if abs(r.imag) < 1e-9 * abs(r) and r.real > 0})
    inside = [(low + high) / 2 for low, high in itertools.pairwise([0.0, *places])]
    inside.append(2 * places[-1] if places else 1.0)
    return places, [a + b * n + c * n * n > 0 for n in inside]


def meetings(above: Terms, below: Terms) -> tuple[list[float], list[bool]]:
    """At which lengths two costs are the same, and whether the first is the larger before, between and after them."""
    a, b, c = (float(x) for x in np.subtract(above, below))
    return signs(a, b, c)


def where(places: list[float], larger: list[bool]) -> str:
    """In words: everywhere, nowhere, from, up to."""
    parts, ends = [], [0.0, *places, math.inf]
    for (start, end), yes in zip(itertools.pairwise(ends), larger, strict=True):
        if yes:
            low = f"from {start:,.0f}" if start > 0 else ""
            high = f"up to {end:,.0f}" if end < math.inf else ""
            parts.append(" ".join(filter(None, (low, high))) or "everywhere")
    return " and ".join(parts) or "nowhere"


def by_name(found: Records) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(fit["implementation"], fit["pass"], fit["quantity"]): fit for fit in found}


def answers(arguments: Any, found: Records, records: Records) -> list[str]:
    """What the numbers say, a line for each implementation and pass, and one for who is fastest."""
    out, by = [], by_name(found)
    theory = crossover(arguments.heads * arguments.dim, arguments.causal)
    for name, pass_ in dict.fromkeys((r["implementation"], r["pass"]) for r in records):
        fit, memory = by.get((name, pass_, "seconds")), by.get((name, pass_, "bytes"))
        if name in REST or fit is None:
            continue
        said = [f"exponent {interval(fit)}, {fit['slopes'][-1]:.2f} between the last two lengths"]
        if memory is not None:
            said.append(f"of memory {interval(memory)}")
        limit = longest(records, name, pass_, arguments.gibibytes * 2**30)
        said += [f"longest in {arguments.gibibytes:g} GiB: {limit:,.0f}"] if limit else []
        for rest, words, factor in (
            ("projections", "its projections", 1),
            ("layer", "the layer's other products", 3),
        ):
            other = by.get((rest, pass_, "seconds"))
            if other is not None and pass_ != "decode":
                place = where(*meetings(fit["terms"], other["terms"]))
                known = name in (*EXACT, *PEERS) and not (arguments.window or arguments.kv_heads or arguments.hidden)
                said.append(f"above {words} {place}" + (f" (by operations {factor * theory:,})" if known else ""))
        out.append(f"{name}, {pass_}: {'; '.join(said)}")
    for pass_ in dict.fromkeys(r["pass"] for r in records):
        good = [r for r in records if r["pass"] == pass_ and r["implementation"] in (*EXACT, *PEERS)]
        good = [r for r in good if r["seconds"] and not r["invalid"]]
        ranked = sorted(good, key=lambda r: (r["length"], r["seconds"]["median"]))
        best = {r["length"]: r["implementation"] for r in reversed(ranked)}
        if best:
            out.append(f"fastest exact one, {pass_}: " + ", ".join(f"{n:,} {best[n]}" for n in sorted(best)))
    return out


def interval(fit: dict[str, Any]) -> str:
    return f"{fit['exponent']:.2f} [{fit['low']:.2f}, {fit['high']:.2f}]"


def longest(records: Records, name: str, pass_: str, limit: float) -> float | None:
    """The longest length whose predicted bytes fit; by the measured ones where none are predicted."""
    own = [r for r in records if (r["implementation"], r["pass"]) == (name, pass_) and r["seconds"]]
    sizes = [(r["length"], r["predicted_bytes"] or r["peak_bytes"]) for r in own]
    if len(sizes) < 3:
        return None
    a, b, c = terms([n for n, _ in sizes], [float(size) for _, size in sizes])
    places, _ = signs(a - limit, b, c)
    return places[-1] if places else None


def shares(attention: Any, config: Any, found: Records, records: Records) -> list[str]:
    """Of a training step, length by length, what its attention takes, and from where on that is the larger part."""
    layers, out = config.model.layers, []
    parts = getattr(getattr(config, "optim", None), "accumulate", 1)
    times = {(r["implementation"], r["length"]): r["seconds"] for r in records}
    for length in sorted({r["length"] for r in records}):
        step, one = times.get(("step", length)), times.get(("auto", length))
        if step and one:
            whole, own = step["median"], layers * parts * one["median"]
            out.append(f"{length:,}: attention takes {100 * own / whole:.0f} % of the step's {1e3 * whole:.1f} ms")
    by = by_name(found)
    step, one = by.get(("step", "forward_backward", "seconds")), by.get(("auto", "forward_backward", "seconds"))
    if step and one:
        own = [layers * parts * term for term in one["terms"]]
        place = where(*meetings((2 * own[0], 2 * own[1], 2 * own[2]), step["terms"]))
        theory = crossover(config.model.dim, attention.causal)
        out.append(
            f"the step: exponent {interval(step)}; attention: {interval(one)}; attention is more than half of the step "
            f"{place} (by operations it passes its projections at {theory:,}, the rest of a layer at {3 * theory:,})"
        )
    return out


def table(records: Records) -> list[str]:
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


SETTINGS = ("batch", "heads", "kv_heads", "dim", "dtype", "causal", "window")


def earlier(path: Path) -> Records:
    """The records of an earlier attention.json. Raises ConfigError where it is none."""
    try:
        records = json.loads(path.read_text())["records"]
        assert records and {"implementation", "pass", "length", "seconds", *SETTINGS} <= set(records[0])
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError(f"--compare {path} is not what this benchmark writes.") from None
    return records


def compared(records: Records, old: Records) -> list[str]:
    """The cells that fail now, or whose lower quartile lies above the old upper quartile by a tenth and more."""

    def key(r: dict[str, Any]) -> tuple:
        return tuple(r[name] for name in ("implementation", "pass", "length", *SETTINGS))

    before, out = {key(r): r["seconds"] for r in old if r["seconds"]}, []
    for r in records:
        was, name = before.get(key(r)), f"{r['implementation']}, {r['pass']}, {r['length']}"
        if was and not r["seconds"]:
            out.append(f"{name}: failed")
        elif was and r["seconds"]["q25"] > 1.1 * was["q75"]:
            out.append(f"{name}: {r['seconds']['median'] / was['median']:.2f} times the seconds")
    if not any(key(r) in before for r in records):
        raise ConfigError("--compare: it has no cell of this run's lengths, heads, widths, type and mask.")
    return out


def draw(records: Records, found: Records, folder: Path) -> None:
    """Time and memory against length, both axes logarithmic, with the fitted lines and slopes of 1 and 2."""
    from matplotlib.figure import Figure

    by = by_name(found)
    for quantity, label in (("seconds", "seconds"), ("bytes", "bytes at the peak")):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        passes = list(dict.fromkeys(r["pass"] for r in records))
        for place, pass_ in enumerate(passes):
            axes = figure.add_subplot(1, len(passes), place + 1)
            lengths, costs, colors = [], [], {}
            for name in dict.fromkeys(r["implementation"] for r in records):
                own = series(records, name, pass_, quantity)
                if not own:
                    continue
                n = np.array([r["length"] for r in own], float)
                y = [r["seconds"]["median"] if quantity == "seconds" else r["peak_bytes"] for r in own]
                fit = by.get((name, pass_, quantity))
                text = f"{name} {fit['exponent']:.2f}" if fit else name
                lengths, costs = [*lengths, *n], [*costs, *y]
                (points,) = axes.plot(n, y, "s:" if name in REST else "o", label=text, markersize=4)
                colors[name] = points.get_color()
                if fit:
                    a, b, c = fit["terms"]
                    grid = np.geomspace(n[0], n[-1], 60)
                    axes.plot(grid, a + b * grid + c * grid**2, color=points.get_color(), linewidth=1)
            if not lengths:
                continue
            if quantity == "seconds":
                _mark_crossovers(axes, lengths, found, pass_, colors)
            corner = min(lengths), min(costs)
            for slope in (1, 2):
                grid = np.array([corner[0], max(lengths)])
                line = corner[1] * (grid / corner[0]) ** slope
                axes.plot(grid, line, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
            axes.set(xscale="log", yscale="log", xlabel="length", ylabel=label, title=pass_)
            axes.set_xticks(sorted(set(lengths)), [f"{n:,.0f}" for n in sorted(set(lengths))])
            axes.minorticks_off()
            axes.legend(fontsize="small", title="implementation, exponent", title_fontsize="small")
            axes.grid(alpha=0.3)
        figure.savefig(folder / f"attention-{quantity}.png", dpi=110)


def _mark_crossovers(axes: Any, lengths: list[float], found: Records, pass_: str, colors: dict[str, Any]) -> None:
    """A ring where a fitted cost meets that of the projections, and, with its length, that of the rest of a layer."""
    by = by_name(found)
    for name in colors:
        for rest in REST:
            fit, other = by.get((name, pass_, "seconds")), by.get((rest, pass_, "seconds"))
            if fit is None or other is None or name in REST:
                continue
            for n in meetings(fit["terms"], other["terms"])[0]:
                if min(lengths) <= n <= max(lengths):
                    a, b, c = other["terms"]
                    place = n, a + b * n + c * n * n
                    axes.plot(*place, "o", markersize=11, fillstyle="none", color=colors[name])
                    if rest == "layer":
                        shift = {"xytext": (8, -9), "textcoords": "offset points"}
                        axes.annotate(f"{n:,.0f}", place, fontsize=7, color=colors[name], **shift)
