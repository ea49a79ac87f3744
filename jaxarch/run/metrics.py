"""From sums on the device to numbers in the log: means, statistics over replicas, files, curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from jaxarch.run import processes
from jaxarch.run.program import NEVER, Member, Sums
from jaxarch.run.protocol import ConfigError, Mean, Metrics

Values = dict[str, Float[np.ndarray, " members"]]  # NaN where a metric has no value


def divide(metrics: Metrics | dict[str, Sums]) -> Values:
    """Each metric of every member; NaN where its weight is 0, and the metric left out where all are."""
    values = {}
    for name, metric in jax.device_get(metrics).items():
        total, weight = metric[:2] if isinstance(metric, Mean | Sums) else (metric, np.ones_like(metric))
        total, weight = np.atleast_1d(np.asarray(total, np.float64)), np.atleast_1d(np.asarray(weight, np.float64))
        if weight.any():
            values[name] = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight != 0)
    return values


def divergences(sums: dict[str, Sums]) -> dict[int, tuple[int, str]]:
    """The members that went wrong: number -> (first step, metric) that was not finite."""
    first: dict[int, tuple[int, str]] = {}
    for name, sum_ in jax.device_get(sums).items():
        for member, step in enumerate(np.atleast_1d(sum_.bad)):
            if step != NEVER and (member not in first or step < first[member][0]):
                first[member] = (int(step), name)
    return first


def interquartile_mean(values: Shaped[np.ndarray, "... n"]) -> Float[np.ndarray | np.generic, "..."]:
    """The mean of the middle half (Agarwal et al. 2021, sec. 4.3), along the last axis."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def interval(values: Float[np.ndarray, " n"], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the interquartile mean (Agarwal et al. 2021, sec. 4.1)."""
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.percentile(np.asarray(interquartile_mean(drawn), float), [2.5, 97.5])
    return float(low), float(high)


def lines(values: Values, members: Sequence[Member], dead: Iterable[int] = ()) -> list[dict[str, Any]]:
    """One line of the log for each point of the sweep (one in all where there is none).

    A single member's metrics stand by name. Of several replicas the mean stands by name, then the
    interquartile mean, its 95 % interval and every replica's own value. Dead members count as missing.
    """
    points: list[dict[str, float]] = []
    for member in members:
        if member.point not in points:
            points.append(member.point)
    out, gone = [], set(dead)
    for point in points:
        at = [i for i, member in enumerate(members) if member.point == point]
        line: dict[str, Any] = {"sweep": point} if point else {}
        for name, value in values.items():
            alive = np.array([value[i] for i in at if i not in gone and math.isfinite(value[i])])
            if not len(alive):
                continue
            line[name] = float(alive.mean())
            if len(at) > 1:
                line[f"{name}/iqm"] = float(interquartile_mean(alive))
                line[f"{name}/low"], line[f"{name}/high"] = interval(alive)
                line[f"{name}/replicas"] = [
                    float(value[i]) if i not in gone and math.isfinite(value[i]) else None for i in at
                ]
        if len(at) > 1:
            line["alive"] = len(set(at) - gone)
        out.append(line)
    return out


def ordered(values: Values, monitor: str) -> Values:
    """The monitored metric first, then its kin (`train/loss` beside `val/loss`), then the others."""
    name = better(monitor)[0]
    kin = name.split("/")[-1]
    return dict(sorted(values.items(), key=lambda item: (item[0] != name, item[0].split("/")[-1] != kin, item[0])))


def better(monitor: str) -> tuple[str, float]:
    """The metric's name and the sign that makes smaller better: `-eval/return` -> (`eval/return`, -1)."""
    return (monitor[1:], -1.0) if monitor.startswith("-") else (monitor, 1.0)


class Log:
    """`metrics.jsonl`, and a follower (TensorBoard, Weights & Biases) if one is asked for."""

    def __init__(self, folder: Path, follower: str | None = None):
        self.path = folder / "metrics.jsonl"
        self._follow = _follower(follower if processes.first() else None, folder)

    def keep_until(self, step: int) -> None:
        """Drops the lines after a checkpoint's step: the resumed run writes them again."""
        if self.path.exists() and processes.first():
            kept = [line for line in read(self.path) if line["step"] <= step]
            temporary = self.path.with_suffix(".partial")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)

    def write(
        self, step: int, seconds: float, lines: list[dict[str, Any]], speed: Mapping[str, float] | None = None
    ) -> None:
        """The metrics of a step, and before them in each line the speed, which no two runs share."""
        if not processes.first():
            return
        lines = [{**(speed or {}), **line} for line in lines]
        with self.path.open("a") as file:
            for line in lines:
                file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **line}) + "\n")
        for line in lines:
            self._follow(step, line)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def _follower(name: str | None, folder: Path):
    def scalars(line: dict[str, Any]) -> dict[str, float]:
        prefix = "".join(f"{key}={value}/" for key, value in line.get("sweep", {}).items())
        return {prefix + key: value for key, value in line.items() if isinstance(value, int | float)}

    try:
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def follow(step: int, line: dict[str, Any]) -> None:
                for key, value in scalars(line).items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return follow
        if name == "wandb":
            import wandb

            run = wandb.init(project=folder.parent.name, name=folder.name, dir=str(folder), resume="allow")
            return lambda step, line: run.log(scalars(line), step=step)
    except ImportError:
        raise ConfigError(f"--log {name} needs a package: pip install 'jaxarch[{name}]'.") from None
    return lambda step, line: None


STATISTICS = ("iqm", "low", "high", "replicas")  # of several replicas, behind a metric's name
MOST_NAMED = 12  # curves of a panel that its legend names


def draw(path: Path, picture: Path) -> None:
    """The curves of a `metrics.jsonl`: one panel a quantity (`train/loss` and `val/loss` share one).

    What stands deeper is a part of it: `train/grad_norm/embed` in the panel of `grad_norm`, on a logarithmic scale.
    """
    from matplotlib.figure import Figure

    log = read(path)
    skip = ("step", "seconds", "steps_per_second", "mfu", "alive", "sweep")
    names = list(dict.fromkeys(name for line in log for name in line if name not in skip))
    names = [name for name in names if name.count("/") < 2 or name.split("/")[-1] not in STATISTICS]
    quantities = list(dict.fromkeys(quantity(name) for name in names))
    if not quantities:
        return
    columns = min(3, len(quantities))
    rows = -(-len(quantities) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for i, title in enumerate(quantities):
        axes = figure.add_subplot(rows, columns, i + 1)
        own = [name for name in names if quantity(name) == title]
        parts = [name for name in own if name.count("/") > 1]
        for name in own:
            # Parts in the order of their names, from dark to bright; the whole in front of them.
            shade = {"color": viridis(parts.index(name) / len(parts)), "linewidth": 0.9} if name in parts else {}
            front = {"color": "black", "zorder": 3} if parts and name not in parts else {}
            _curves(axes, log, name, name if name not in parts else name.split("/", 2)[2], {**shade, **front})
        values = [line[name] for line in log for name in parts if name in line]
        if values and min(values) > 0:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        lines, labels = axes.get_legend_handles_labels()
        shown = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), MOST_NAMED)).round().astype(int))
        named = [lines[j] for j in shown], [labels[j] for j in shown]
        if parts:
            axes.legend(*named, fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axes.legend(*named, fontsize="small")
    figure.savefig(picture, dpi=110)


def quantity(name: str) -> str:
    """What a metric measures: `loss` of `train/loss`, `grad_norm` of `train/grad_norm/embed`."""
    parts = name.split("/")
    return parts[1] if len(parts) > 1 else name


def viridis(place: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](place)


def _curves(axes: Any, log: list[dict[str, Any]], name: str, label: str, style: dict[str, Any]) -> None:
    points = list(dict.fromkeys(tuple(line.get("sweep", {}).items()) for line in log))
    for point in points:
        own = [line for line in log if name in line and tuple(line.get("sweep", {}).items()) == point]
        if not own:
            continue
        steps = [line["step"] for line in own]
        marker = "o" if len(own) < 25 else None
        options = {"linewidth": 1.2, "marker": marker, "markersize": 3, **style}
        at = [label, *(f"{key}={value:g}" for key, value in point)]
        (curve,) = axes.plot(steps, [line[name] for line in own], label=" ".join(at), **options)
        if f"{name}/low" in own[0]:
            low, high = ([line.get(f"{name}/{end}", math.nan) for line in own] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=curve.get_color(), alpha=0.2)


def summary(line: dict[str, Any], most: int = 4) -> str:
    """The first metrics of a line as text, four figures each."""
    parts = [f"{key}={value:g}" for key, value in line.get("sweep", {}).items()]
    parts += [f"{name} {line[name]:.4g}" for name in line if name.count("/") == 1][:most]
    return "  ".join(parts)
