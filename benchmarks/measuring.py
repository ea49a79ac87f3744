"""What every benchmark shares: alternating rounds, quartiles, peers in their own interpreter, one JSON file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxarch.run import backend
from jaxarch.run.protocol import ConfigError

Measure = Callable[[], float]  # one measurement, in seconds


def alternating(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Each measure in turn, `rounds` times over, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if round_:
                seconds[name].append(value)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    q25, median, q75 = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q25": float(q25), "q75": float(q75)}


def ratio(ours: list[float], peer: list[float]) -> dict[str, float]:
    """How many times as fast ours is, round by round."""
    return quartiles([theirs / own for own, theirs in zip(ours, peer, strict=True)])


def report_steps(
    output: Path, name: str, about: dict[str, Any], seconds: Mapping[str, list[float]], taken: int
) -> None:
    """Prints and writes the environment steps a second of ours, under "jaxarch", and of the "peer".

    about: what each record says of how it was measured.
    taken: environment steps of a measurement.
    """
    records: list[dict[str, Any]] = []
    for implementation, values in seconds.items():
        speed = quartiles([taken / value for value in values])
        print(f"{speed['median']:12,.0f} steps/s  {implementation}")
        measured = {"seconds": quartiles(values), "steps_per_second": speed}
        records.append({"implementation": implementation, **about, **measured})
    faster = ratio(seconds["jaxarch"], seconds["peer"])
    records[0]["speed_over_peer"] = faster
    print(f"ours is {faster['median']:.2f}x as fast [{faster['q25']:.2f}, {faster['q75']:.2f}]")
    write(output, name, records)


def write(output: Path, name: str, records: list[dict[str, Any]], fits: list[dict[str, Any]] | None = None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    content = {"environment": backend.environment(), "records": records, "fits": fits or []}
    (output / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {output / f'{name}.json'}")


class Peer:
    """A worker of `benchmarks/peers.py`, kept warm between measurements; `measure` is one of them.

    said: what it says of itself before the first one.
    """

    def __init__(self, python: Path | None, *arguments: object):
        script = Path(__file__).with_name("peers.py")
        self.start([str(python or sys.executable), str(script), *map(str, arguments)])

    def start(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.said = self._answer()
        self.description = self.said["description"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"the peer did not start: {' '.join(map(str, self._process.args))}")  # type: ignore[arg-type]
        return json.loads(line)

    def measure(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("measure\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
