"""A finished run, used again.

python -m jaxarch.run evaluate RUN      its metrics, computed anew
python -m jaxarch.run report RUN        its samples and pictures, made anew
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.console import Console
from jaxarch.run.load import open_run
from jaxarch.run.loop import report
from jaxarch.run.metrics import divide, lines, ordered, summary


@dataclasses.dataclass(frozen=True)
class Arguments:
    command: Annotated[Literal["evaluate", "report"], tyro.conf.Positional]
    """what to do"""
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/gpt/demo"""
    step: str = "newest"
    """checkpoint: newest, best or a number"""


def main() -> None:
    with exits("jaxarch.run"):
        arguments = parsed_or_usage(Arguments, "python -m jaxarch.run", __doc__ or "", sys.argv[1:])
        backend.prepare()
        step = int(arguments.step) if arguments.step.isdigit() else arguments.step
        programs, loaded, number = open_run(arguments.run, step)
        console = Console()
        if arguments.command == "evaluate":
            values = divide(programs.evaluate(loaded.state, number))
            if not values:
                command = f"python -m jaxarch.run report {arguments.run}"
                console.line(f"all that this experiment measures is in its report: {command}")
                return
        elif loaded.experiment.report is None:
            console.line("this experiment reports nothing beyond its metrics")
            return
        else:
            values = report(programs, loaded.state, number, arguments.run)
            console.line(f"written to {arguments.run / 'samples' / f'{number:07d}'}")
        for line in lines(ordered(values, loaded.experiment.monitor), programs.members):
            console.line(f"step {number}  {summary(line, most=len(line))}")


if __name__ == "__main__":
    main()
