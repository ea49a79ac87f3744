"""How much faster are many seeds in one program than as many runs one after another, start and compiling included?

    python -m benchmarks.replicas --output results
    python -m benchmarks.replicas --experiment experiments.gan_toy --seeds 8 --steps 2000 --scan 200

Both are commands as a user would give them, `--replicas N` once and `--seed i` N times, each with its own start of
Python. `cold`: nothing compiled is at hand when each of the two ways begins, so that the first run of N compiles and
the others find its program. `warm`: all programs are kept from the rounds before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import quartiles, ratio, write
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import RunError, check_least


@dataclass(frozen=True)
class Arguments:
    experiment: str = "experiments.gan_toy"
    """module of the experiment"""
    seeds: int = 8
    """replicas, and runs one after another"""
    steps: int = 2000
    scan: int = 200
    """steps a dispatch, of both"""
    rounds: int = 2
    """of each way, by turns, after one that is cold"""
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("seeds", "steps", "scan", "rounds"), 1)


def main() -> None:
    with exits("replicas"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.replicas", __doc__ or "", sys.argv[1:])
        ways = {"replicas": together, "runs": one_by_one}
        with tempfile.TemporaryDirectory() as place:
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(arguments.rounds + 1):
                for name, way in ways.items():
                    seconds[name].append(way(arguments, Path(place) / name, number))
                    print(f"{'warm' if number else 'cold'}: {name} {seconds[name][-1]:.1f} s")
        records = []
        for what, rounds in (("cold", slice(0, 1)), ("warm", slice(1, None))):
            faster = ratio(seconds["replicas"][rounds], seconds["runs"][rounds])
            print(f"{what}: {arguments.seeds} seeds at once {faster['median']:.2f}x as fast as one after another")
            records += [
                {"implementation": name, "pass": what, "seeds": arguments.seeds, "seconds": quartiles(taken[rounds])}
                for name, taken in seconds.items()
            ]
            records[-2]["ratio"] = faster
        write(arguments.output, "replicas", records)


def together(arguments: Arguments, place: Path, number: int) -> float:
    return timed(lambda: run(arguments, place, f"all-{number}", "--replicas", arguments.seeds))


def one_by_one(arguments: Arguments, place: Path, number: int) -> float:
    def runs() -> None:
        for seed in range(arguments.seeds):
            run(arguments, place, f"{seed}-{number}", "--seed", seed)

    return timed(runs)


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(arguments: Arguments, place: Path, name: str, *options: object) -> None:
    """One run of the experiment in a process of its own. Each way has a cache of its own.

    Raises RunError with the last line that it says where it fails.
    """
    every = ["--steps", arguments.steps, "--scan", arguments.scan, "--eval-every", arguments.steps]
    command = [sys.executable, "-m", arguments.experiment, "--runs", place / "runs", "--name", name, *every, *options]
    environment = os.environ | {
        "JAXARCH_CACHE": str(place / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(place / "cache" / "xla"),
    }
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{arguments.experiment}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")


if __name__ == "__main__":
    main()
