"""What does the loop (reading data, logging, progress) cost over the bare compiled step?

    python -m benchmarks.loop --output results

The experiment stands as it is by default (`experiments.gpt`: L4 H4 E128 T64 B12); evaluations and checkpoints are
left out. Both take the same number of steps in turn, from the same program.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.measuring import alternating, quartiles, write
from jaxarch.run import backend
from jaxarch.run.checkpoint import Checkpoints
from jaxarch.run.command import exits, first_batch, parsed_or_usage
from jaxarch.run.console import Console
from jaxarch.run.load import imported
from jaxarch.run.loop import Plan, Reached, Run, batches
from jaxarch.run.metrics import Log
from jaxarch.run.program import Carry, Member, Programs


@dataclasses.dataclass(frozen=True)
class Arguments:
    experiment: str = "experiments.gpt"
    """module of the experiment"""
    steps: int = 200
    """steps a measurement"""
    rounds: int = 7
    output: Path = Path("results")


def main() -> None:
    with exits("loop"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.loop", __doc__ or "", sys.argv[1:])
        backend.prepare()
        module = imported(arguments.experiment)
        experiment = module.experiment(module.Config())._replace(report=None)
        programs = Programs(experiment, [Member(0, {})])
        carry = Carry(programs.init(), programs.sums(first_batch(experiment)))
        batch = jax.device_put(batches(experiment, 0, 1))
        temporary = tempfile.TemporaryDirectory()
        folder = Path(temporary.name)
        steps, taken = arguments.steps, 20  # from 20 on, since at 0 every run is evaluated

        def bare() -> float:
            nonlocal carry
            start = time.perf_counter()
            for index in range(steps):
                carry = programs.steps(carry, batch, index)
            jax.block_until_ready(carry)
            return (time.perf_counter() - start) / steps

        def looped() -> float:
            nonlocal carry, taken
            # As in a run of the default length: a line of the log every 20 steps.
            plan = Plan(10**9, taken + steps, 20, 10**9, 10**9, 1)
            reached = Reached(carry, taken, 0.0)
            run = Run(programs, plan, folder, Checkpoints(folder / "checkpoints"), Console(), Log(folder), reached)
            run.save = lambda: None
            start = time.perf_counter()
            run.train()
            jax.block_until_ready(run.carry)
            carry, taken = run.carry, taken + steps
            return (time.perf_counter() - start) / steps

        seconds = alternating({"looped": looped, "bare": bare}, arguments.rounds)
        overhead = quartiles([loop / step - 1 for loop, step in zip(seconds["looped"], seconds["bare"], strict=True)])
        records = [
            {"implementation": name, "pass": "train_step", "seconds": quartiles(values)}
            for name, values in seconds.items()
        ]
        records[0]["overhead"] = overhead
        for record in records:
            print(f"{1e3 * record['seconds']['median']:8.2f} ms a step  {record['implementation']}")
        print(f"overhead {100 * overhead['median']:.1f} % [{100 * overhead['q25']:.1f}, {100 * overhead['q75']:.1f}]")
        write(arguments.output, "loop", records)


if __name__ == "__main__":
    main()
