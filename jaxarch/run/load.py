"""Finished and unfinished runs, taken up again: in a notebook by `load`, or by `python -m jaxarch.run`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jaxarch.run.checkpoint import Checkpoints, Damaged
from jaxarch.run.command import Options, first_batch, from_json
from jaxarch.run.program import Carry, Programs, members
from jaxarch.run.protocol import ConfigError, Experiment, State


class Loaded(NamedTuple):
    experiment: Experiment
    config: Any
    state: State


class Opened(NamedTuple):
    """All of a run: its programs, the step at which `carry` was saved, and what was loaded."""

    programs: Programs
    loaded: Loaded
    step: int


def load(run: str | Path, step: int | str = "newest") -> Loaded:
    """`experiment, config, state = load("runs/gpt/demo")`.

    step: "newest", "best" (by the experiment's `monitor`) or the number of a saved step. What only the newest keeps (a
        replay) is, of another, as at a run's beginning.
    The state of a run of several replicas has them along the leading axis of every array.
    Raises ConfigError where there is no such run or checkpoint, or it is damaged.
    """
    return open_run(Path(run), step).loaded


def open_run(run: Path, step: int | str = "newest") -> Opened:
    saved = saved_config(run)
    module = imported(saved["module"])
    config = from_json(module.Config(), saved["config"])
    options = from_json(Options(), saved["options"])
    experiment = module.experiment(config)
    programs = Programs(experiment, members(experiment.hypers, options.sweep, options.seed, options.replicas))
    shapes = Carry(programs.state_shape, jax.eval_shape(lambda: programs.sums(first_batch(experiment))))
    checkpoints = Checkpoints(run / "checkpoints", read_only=True, newest_only=experiment.newest_only)
    number, carry = restored(checkpoints, run, step, shapes, lambda: Carry(programs.init(), {}))
    return Opened(programs, Loaded(experiment, config, carry.state), number)


def saved_config(run: Path) -> dict[str, Any]:
    """The run's `config.json`. Raises ConfigError."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{run} is not a run: it has no config.json.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}.") from None


def chosen(checkpoints: Checkpoints, run: Path, step: int | str) -> int:
    """The number of the step that is meant by "newest", "best" or itself. Raises ConfigError."""
    there = checkpoints.steps()
    if not there:
        raise ConfigError(f"{run} has no checkpoint yet.")
    number = {"newest": there[-1], "best": checkpoints.best()}.get(str(step), step)
    if number not in there:
        raise ConfigError(f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, there))}.")
    return int(number)


def restored(
    checkpoints: Checkpoints, run: Path, step: int | str, shapes: Carry, beginning: Callable[[], Carry]
) -> tuple[int, Carry]:
    if step == "newest":
        found = checkpoints.newest(shapes, lambda text: print(f"{run}: {text}", file=sys.stderr), beginning)
        if found is not None:
            return found[0], found[1]
    number = chosen(checkpoints, run, step)
    try:
        return number, checkpoints.restore(number, shapes, beginning)[0]
    except Damaged as damage:
        raise ConfigError(f"the checkpoint of step {number} in {run} is damaged: {damage}.") from None


def raw_state(run: Path, step: str = "newest") -> dict[str, Any]:
    """The state's fields as they were saved, nested dictionaries of NumPy arrays, without the run's code or data.

    step: newest (then of the newest checkpoint that is whole), best or a number.
    Raises ConfigError.
    """
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    number = chosen(checkpoints, run, int(step) if step.isdigit() else step)
    found = None
    try:
        if step == "newest":
            found = checkpoints.newest_raw(lambda text: print(f"{run}: {text}", file=sys.stderr))
        return (found or checkpoints.raw(number))["state"]
    except Damaged as damage:
        raise ConfigError(f"the checkpoint of step {number} in {run} is damaged ({damage}).") from None


def imported(module: str) -> ModuleType:
    """The experiment's module: by its name, or by its path where it was run as a file."""
    if not module.endswith(".py"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(f"the run's module {module} needs {error.name}, which is not installed.") from None
            raise ConfigError(f"the run's module {module} is not found; start in the folder that holds it.") from None
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    if spec is None or spec.loader is None or not Path(module).exists():
        raise ConfigError(f"the run's module {module} is no longer there.")
    found = importlib.util.module_from_spec(spec)
    sys.modules[found.__name__] = found
    spec.loader.exec_module(found)
    return found
