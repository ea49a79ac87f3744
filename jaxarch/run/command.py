"""The command line that every experiment shares: options, the run's folder, errors, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import io
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
from jax.sharding import Mesh

from jaxarch.run import backend, processes
from jaxarch.run.checkpoint import Checkpoints, kept, reason
from jaxarch.run.console import Console, clock, heard, sparkline
from jaxarch.run.explain import explained
from jaxarch.run.loop import Plan, Reached, Run, Stopped, batches, plan
from jaxarch.run.mesh import check_axes, make_mesh, path_name
from jaxarch.run.mesh import parse as parse_mesh
from jaxarch.run.metrics import Log, draw, read, summary
from jaxarch.run.program import NEVER, Carry, Programs, members, shape_of
from jaxarch.run.protocol import ConfigError, Experiment, RunError, check_least, field_of, with_field

# On resume a run may be looked at and spread otherwise, but not be another; what is not said stays as it was.
SPREAD = {"mesh", "explain_mesh", "distributed", "coordinator", "processes", "process"}
OF_ONE_CALL = {"stop_at", "profile", "name", "runs", "resume", *SPREAD}
FREE_ON_RESUME = {"eval_every", "checkpoint_every", "whole_checkpoints", "scan", "log", *OF_ONE_CALL}


@dataclasses.dataclass(frozen=True)
class Options:
    stop_at: int | None = None
    """stop early, after this step, to be resumed; --steps stays the schedule's length"""
    seed: int = 0
    """seed of the parameters and of all noise; replica i has seed + i"""
    name: str | None = None
    """name of the run (default: the time)"""
    runs: Path = Path("runs")
    """folder of all runs"""
    resume: bool = False
    """go on with the run of this --name"""
    init_from: str | None = None
    """start with the weights of another run (its folder)"""
    eval_every: int = 0
    """steps between evaluations (0: ten a run)"""
    checkpoint_every: int = 0
    """steps between checkpoints (0: at each evaluation)"""
    whole_checkpoints: bool = False
    """keep a replay in all of them, should the newest be damaged, not in the newest alone"""
    scan: int = 1
    """steps a dispatch"""
    replicas: int = 1
    """seeds trained at once, logged as mean, interquartile mean and 95 % interval"""
    sweep: tuple[str, ...] = ()
    """field=a,b,c; repeat for the product; all points are trained at once"""
    log: Literal["tensorboard", "wandb"] | None = None
    """follow the run elsewhere too"""
    profile: bool = False
    """record ten steps for Perfetto"""
    mesh: str = ""
    """devices by axis, as data=2,fsdp=2,tensor=2,context=2,replica=2 (default: one device)"""
    explain_mesh: float | None = None
    """say how the run would be cut over --mesh, and whether a device of so many GB has room; nothing is run"""
    distributed: bool = False
    """one of several processes; Slurm, Open MPI, Kubernetes and Cloud TPUs say which"""
    coordinator: str | None = None
    """HOST:PORT of the first process, where no scheduler says so"""
    processes: int | None = None
    """how many there are"""
    process: int | None = None
    """number of this one, from 0"""

    def __post_init__(self) -> None:
        check_least(self, ("scan", "replicas"), 1)
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 0; 0 is the default.")
        if self.distributed and self.name is None:
            raise ConfigError("--distributed needs a --name, by which all processes know their run.")
        if self.explain_mesh is not None and not self.explain_mesh > 0:
            raise ConfigError(f"--explain-mesh {self.explain_mesh:g} is not a memory in GB; an H100 has 80.")
        if not self.distributed and (self.coordinator or self.processes or self.process is not None):
            raise ConfigError("--coordinator, --processes and --process are for --distributed.")
        if self.mesh:
            parse_mesh(self.mesh)  # here, before data is read
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise ConfigError(f"--name {self.name!r} cannot name a folder; use letters, digits, - and _.")


def main(experiment: Callable[[Any], Experiment], config: type, presets: Mapping[str, Any] | None = None) -> None:
    """Runs the experiment as the command line says, and exits: 0 done, 1 failed, 2 usage, 130 or 143 stopped.

    presets: named configurations, chosen by the first word of the command line.
    """
    module, description = described(experiment)
    program = Path(module).stem if module.endswith(".py") else module.rsplit(".", 1)[-1]
    with exits(program), heard("jaxarch.attention"):
        join(program, sys.argv[1:])
        with processes.agreed():
            config_, options, saved = parse(program, description, config, presets or {}, sys.argv[1:])
        run(program, module, experiment, config_, options, saved)


def described(experiment: Callable) -> tuple[str, str]:
    """The importable name of the experiment's module, also where it runs as `__main__`, and its docstring."""
    module = sys.modules[experiment.__module__]
    name = module.__name__
    if name == "__main__":
        spec = module.__spec__
        name = spec.name if spec else str(Path(module.__file__ or "").absolute())
    return name.removesuffix(".__main__"), module.__doc__ or ""


@contextlib.contextmanager
def exits(program: str) -> Iterator[None]:
    """Turns what a user can cause into one line and an exit code, for several processes as `processes` says."""

    def leave(message: str, code: int) -> None:
        if processes.first():
            print(f"{program}: {message}", file=sys.stderr, flush=True)
        sys.exit(code)

    def leave_alone(message: str, code: int) -> None:
        if processes.alone():
            leave(message, code)
        print(f"{program}: process {jax.process_index()}: {message}", file=sys.stderr)
        processes.end(code)

    try:
        yield
    except ConfigError as error:
        leave(str(error), 2)
    except processes.LocalError as error:
        leave_alone(str(error), 1)
    except RunError as error:
        leave(str(error), 1)
    except OSError as error:
        leave_alone(processes.said_by_system(error), 1)
    except KeyboardInterrupt:
        leave_alone("interrupted; the last checkpoint is kept.", 130)
    except Exception as error:
        if processes.alone():
            raise
        if processes.others_gone(error):
            leave_alone(f"another process is gone ({reason(error)}); the last checkpoint is kept.", 1)
        traceback.print_exc()
        processes.end(1)


def join(program: str, arguments: Sequence[str]) -> None:
    """Joins the other processes, if there are to be any: first of all, so that an error in one ends all of them.

    Raises ConfigError.
    """
    if "--distributed" not in arguments:
        return
    numbers: list[int | None] = []
    for name in ("--processes", "--process"):
        text = value_of(arguments, name)
        if text is not None and not text.isdecimal():
            raise ConfigError(f"{name} {text} is not a number of processes.")
        numbers.append(None if text is None else int(text))
    backend.prepare()
    processes.join(program, value_of(arguments, "--coordinator"), *numbers)


# --- the arguments ------------------------------------------------------------------------------


def parse(
    program: str, description: str, config: type, presets: Mapping[str, Any], arguments: Sequence[str]
) -> tuple[Any, Options, dict[str, Any] | None]:
    """The configuration, the options and, on resume, what `config.json` says.

    On resume the saved values are the defaults. Raises ConfigError.
    """
    default, defaults, saved, arguments = None, Options(), None, list(arguments)
    if arguments and arguments[0] in presets:
        default = presets[arguments.pop(0)]
    elif arguments and not arguments[0].startswith("-"):
        known = f"presets: {', '.join(presets)}" if presets else "it has no presets"
        raise ConfigError(f"unknown word {arguments[0]!r} before the options; {known}.")
    if "--resume" in arguments:
        saved = read_saved(program, Path(value_of(arguments, "--runs") or "runs"), value_of(arguments, "--name"))
        default = default or from_json(config(), saved["config"])
        options = {name: value for name, value in saved["options"].items() if name not in OF_ONE_CALL}
        defaults = from_json(defaults, options)
        if value_of(arguments, "--sweep") is not None:
            defaults = dataclasses.replace(defaults, sweep=())  # what is said again would be added to what is saved
    default = default if default is not None else config()
    check_names(arguments, [*flags(default), *flags(defaults), "--help"])
    if presets:
        description += "\n\nPresets, as the first word: " + ", ".join(presets)
    command = parsed(program, description, default, defaults, arguments)
    return command.config, command.options, saved


def parsed(program: str, description: str, config: Any, options: Options, arguments: list[str]) -> Any:
    import tyro

    fields = [
        ("config", Annotated[type(config), tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]),
        ("options", Annotated[Options, tyro.conf.arg(name=""), tyro.conf.UseAppendAction]),
    ]
    command = dataclasses.make_dataclass("Command", fields, frozen=True)
    return parsed_or_usage(
        command, f"python -m experiments.{program}", description, arguments, command(config, options)
    )


def parsed_or_usage(
    command: type, program: str, description: str, arguments: Sequence[str], default: Any = None
) -> Any:
    """An instance of the dataclass `command`, filled from the command line. Raises ConfigError."""
    import tyro

    said = io.StringIO()
    with contextlib.ExitStack() as quiet:
        if not {"-h", "--help"} & set(arguments):  # help is shown, an error becomes one line
            quiet.enter_context(contextlib.redirect_stdout(said))
            quiet.enter_context(contextlib.redirect_stderr(said))
        try:
            return tyro.cli(
                command,
                prog=program,
                description=description,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
                **({} if default is None else {"default": default}),
            )
        except SystemExit as exit_:
            if exit_.code:
                raise ConfigError(unboxed(said.getvalue())) from None
            raise


def unboxed(text: str) -> str:
    """The message of a parsing error on one line, without its frame and its title."""
    rows = [row.strip("│| ") for row in text.splitlines() if not row.startswith("╭")]
    parts = re.split(r"\n[─-]{5,}\n?", "\n".join(rows))
    message = parts[0] if "╭" in text or len(parts) == 1 else parts[1]
    return f"{' '.join(message.split())} (--help lists all options)"


def flags(config: Any, prefix: str = "--") -> list[str]:
    out = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        out += flags(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return out


def check_names(arguments: Sequence[str], known: Sequence[str]) -> None:
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            meant = f"did you mean {near[0]}?" if near else "there is none like it;"
            raise ConfigError(f"unknown option {argument.split('=')[0]}; {meant} --help lists all.")


def value_of(arguments: Sequence[str], name: str) -> str | None:
    for argument, following in itertools.pairwise([*arguments, ""]):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


# --- the run's folder ---------------------------------------------------------------------------


def to_json(config: Any) -> Any:
    if dataclasses.is_dataclass(config):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_json(default: Any, saved: Mapping[str, Any]) -> Any:
    """`default` with the saved values: the inverse of `to_json`. Unknown names are left out."""
    hints = get_type_hints(type(default))
    values = {
        field.name: revived(hints[field.name], saved[field.name], getattr(default, field.name))
        for field in dataclasses.fields(default)
        if field.name in saved
    }
    return dataclasses.replace(default, **values)


def revived(hint: Any, value: Any, now: Any) -> Any:
    """A value of JSON as one of this type. Of several dataclasses it is the one with these fields."""
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if isinstance(value, dict):
            fits = [kind for kind in classes if {field.name for field in dataclasses.fields(kind)} == set(value)]
            return revived((fits or classes)[0], value, now)
        if isinstance(value, list):
            return revived(next(kind for kind in kinds if get_origin(kind) is tuple), value, now)
        return Path(value) if Path in kinds and str not in kinds and isinstance(value, str) else value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_json(now if type(now) is hint else hint(), value)
    if isinstance(value, list):
        inner = kinds[0] if kinds else Any
        return tuple(revived(inner, item, None) for item in value)
    return Path(value) if hint is Path and value is not None else value


def read_saved(program: str, runs: Path, name: str | None) -> dict[str, Any]:
    """What `config.json` of the run to be resumed says. Raises ConfigError where there is no such run."""
    place = runs / program
    there = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    known = f"there are: {', '.join(there[-8:])}" if there else f"there are none in {place}"
    if name is None:
        raise ConfigError(f"--resume needs the --name of a run; {known}.")
    path = place / name / "config.json"
    if not path.exists():
        raise ConfigError(f"--resume: there is no run {path.parent}; {known}.")
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"--resume: {path} is damaged ({error}); start again under another --name.") from None
    return saved


def changes(now: Any, saved: Any, prefix: str = "--") -> list[str]:
    """The fields in which the configuration differs from the saved one, as `--option saved -> now`."""
    out = []
    for name, value in now.items():
        flag = prefix + name.replace("_", "-")
        if isinstance(value, dict) and isinstance(saved.get(name), dict):
            out += changes(value, saved[name], f"{flag}.")
        elif name not in saved or value != saved[name]:
            out.append(f"{flag} {saved.get(name)} -> {value}")
    return out


def prepare(program: str, module: str, config: Any, options: Options, saved: dict[str, Any] | None) -> Path:
    """The run's folder: made, or on resume checked against what is asked now. Raises ConfigError."""
    name = options.name or datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = options.runs / program / name
    if saved is None:
        if (folder / "config.json").exists():  # without one the run was killed before it began
            raise ConfigError(f"the run {folder} exists; go on with it by --resume, or choose another --name.")
        return folder
    if saved["module"] != module:
        raise ConfigError(f"--resume: {folder} is a run of {saved['module']}, not of {module}.")
    kept = {key: value for key, value in to_json(options).items() if key not in FREE_ON_RESUME}
    changed = changes(to_json(config), saved["config"]) + changes(kept, saved["options"])
    if changed:
        raise ConfigError(
            f"--resume: the run {folder} was begun with other values: {'; '.join(changed)}. "
            "Leave these options out, or begin a new run (--init-from takes its weights)."
        )
    return folder


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def keep_assets(experiment: Experiment, folder: Path) -> None:
    """Writes the experiment's assets (a tokeniser) into the run, or checks that they are still the same."""
    if experiment.assets is None:
        return
    place = folder / "assets"
    if not place.exists():
        partial = folder / "assets.partial"
        partial.mkdir(exist_ok=True)
        experiment.assets(partial)
        partial.rename(place)
        return
    for name in differing(experiment, place):
        raise ConfigError(f"--resume: the data has changed since the run began: {place / name} differs.")


def differing(experiment: Experiment, place: Path) -> list[Path]:
    """Which of the experiment's assets are not as they stand in the folder, by their names."""
    if experiment.assets is None:
        return []
    with tempfile.TemporaryDirectory() as temporary:
        experiment.assets(Path(temporary))
        names = sorted(path.relative_to(temporary) for path in Path(temporary).rglob("*") if path.is_file())

        def same(name: Path) -> bool:
            return (place / name).exists() and (place / name).read_bytes() == (Path(temporary) / name).read_bytes()

        return [name for name in names if not same(name)]


# --- the run ------------------------------------------------------------------------------------


def run(
    program: str,
    module: str,
    make: Callable[[Any], Experiment],
    config: Any,
    options: Options,
    saved: dict[str, Any] | None,
) -> None:
    """One run from its configuration to `result.json`. Raises ConfigError and RunError; exits on a signal."""
    with contextlib.ExitStack() as quiet:
        if not processes.first():
            quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
        _run(program, module, make, config, options, saved)


def _run(
    program: str,
    module: str,
    make: Callable[[Any], Experiment],
    config: Any,
    options: Options,
    saved: dict[str, Any] | None,
) -> None:
    console = Console()
    with processes.agreed():
        folder = prepare(program, module, config, options, saved)
        if config.steps < 1:
            raise ConfigError(f"--steps {config.steps} is below 1.")
        if config.steps >= NEVER:
            raise ConfigError(f"{config.steps} steps are too many to be counted; the most is {NEVER - 1}.")
        if options.stop_at is not None and not 0 < options.stop_at <= config.steps:
            raise ConfigError(f"--stop-at {options.stop_at} is not within the run's --steps {config.steps}.")
    check_same(config, options)
    if saved is not None and (folder / "result.json").exists():
        console.line(f"{folder} is finished")
        show(folder, console, json.loads((folder / "result.json").read_text()))
        return
    keeps_memory = backend.prepare()
    with processes.agreed():
        experiment = make(config)
        if experiment.batch_size < 1:
            raise ConfigError(f"--batch-size {experiment.batch_size} is below 1.")
        which = members(experiment.hypers, options.sweep, options.seed, options.replicas, experiment.check)
        mesh = mesh_of(options, experiment, len(which))
    programs = Programs(experiment, which, mesh)
    if programs.mesh is not None:  # traced now: what the mesh does not divide is refused before there is a folder
        programs.sums(first_batch(experiment))
    if options.explain_mesh is not None:
        for line in explained(programs, first_batch(experiment), options.explain_mesh):
            console.line(line)
        return
    begun = any((folder / "checkpoints").glob("[0-9]*"))
    weights = {} if options.init_from is None or begun else weights_of(Path(options.init_from), programs, console)
    schedule = plan(config.steps, options.stop_at, options.eval_every, options.checkpoint_every, options.scan)
    with processes.agreed():
        log = Log(folder, options.log)
        if saved is None and processes.first():
            folder.mkdir(parents=True, exist_ok=True)
            record = {"module": module, "config": to_json(config), "options": to_json(options)}
            write_json(folder / "config.json", {**record, "environment": backend.environment()})
        if processes.first():
            keep_assets(experiment, folder)
    with processes.agreed():
        if not processes.first():
            keep_assets(experiment, folder)
    checkpoints = Checkpoints(
        folder / "checkpoints", newest_only=experiment.newest_only, in_all=options.whole_checkpoints
    )
    reached = begin(programs, checkpoints, log, console, weights)
    parameters = count(programs.member_shape, experiment.weights)
    console.line(heading(program, folder, programs, parameters, reached.step, schedule, keeps_memory))
    running = Run(programs, schedule, folder, checkpoints, console, log, reached)
    again = f"python {'' if module.endswith('.py') else '-m '}{module} --name {folder.name} --resume"
    again += f" --runs {options.runs}" if options.runs != Path("runs") else ""
    try:
        running.train(options.profile)
        seconds, speed = running.clock.seconds(), running.speed()
        with processes.agreed():
            if processes.first():
                draw(log.path, folder / "curves.png")
        if running.step < schedule.steps:
            console.line(f"stopped after step {running.step} as asked; go on with: {again}")
            return
        result = {
            **(running.last[0] if len(running.last) == 1 else {"sweep": running.last}),
            "steps": running.step,
            "seconds": round(seconds, 3),
            **speed,
            "compile_seconds": round(programs.compile_seconds, 3),
            "parameters": parameters,
            "devices": len(jax.devices()),
        }
        with processes.agreed():
            if processes.first():
                write_json(folder / "result.json", result)
    except Stopped as stop:
        name = signal.Signals(stop.signal_number).name
        if processes.first():
            how = f"stopped by {name} after step {stop.step} and saved"
            print(f"{program}: {how}; go on with: {again}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)
    except OSError as error:
        raise processes.LocalError(
            f"{reason(error)}; {kept(checkpoints.steps())}. Mend it, then go on with: {again}"
        ) from error
    show(folder, console, result)


def check_same(config: Any, options: Options) -> None:
    """Raises ConfigError where the processes were given different values."""
    own = {"coordinator", "process"}
    given = to_json(config) | {key: value for key, value in to_json(options).items() if key not in own}
    first, *others = processes.each(given)
    for process, other in enumerate(others, 1):
        if changed := changes(other, first):
            raise ConfigError(f"process {process} was given other values than the first: {'; '.join(changed)}.")


def mesh_of(options: Options, experiment: Experiment, count: int) -> Mesh | None:
    """The mesh that is asked for. Raises ConfigError."""
    if not options.mesh:
        if options.distributed:
            raise ConfigError("--distributed needs a --mesh, which says how the work is cut over the devices.")
        return None
    sizes = parse_mesh(options.mesh)
    check_axes(experiment.layout, sizes, count)
    return make_mesh(sizes)


def begin(programs: Programs, checkpoints: Checkpoints, log: Log, console: Console, weights: dict[str, Any]) -> Reached:
    """The newest whole checkpoint, or the beginning. Raises RunError where there are only others."""
    sums = programs.sums(first_batch(programs.experiment))
    shapes = Carry(programs.state_shape, shape_of(sums))
    found = checkpoints.newest(shapes, console.line)
    if found is None and checkpoints.steps():
        raise RunError(
            f"from no checkpoint in {checkpoints.folder} can the run go on, and nothing was changed there. "
            "Begin again under another --name (--init-from takes weights), or remove them to begin this run anew."
        )
    if found is None:
        log.keep_until(-1)
        state = programs.init()
        for name, value in weights.items():
            state = with_field(state, name, value)
        if weights:
            state = programs.place(state)
        return Reached(Carry(state, sums), 0, 0.0)
    step, carry, info = found
    checkpoints.forget_after(step)
    log.keep_until(step)
    return Reached(carry, step, info["seconds"])


def first_batch(experiment: Experiment) -> Any:
    """The batch of step 0, None where the state holds its own world."""
    return None if experiment.data is None else jax.tree.map(lambda leaf: leaf[0], batches(experiment, 0, 1))


def weights_of(run: Path, programs: Programs, console: Console) -> dict[str, Any]:
    """The fields of the state that the weights of another run fill, the same for every member.

    Raises ConfigError naming what does not fit.
    """
    source = newest_state(run, console)
    for name in differing(programs.experiment, run / "assets"):
        if not name.name.startswith("data"):
            raise ConfigError(f"--init-from: {run / 'assets' / name} is not this run's; its weights mean other things.")
    if not programs.experiment.weights:
        raise ConfigError(f"--init-from {run}: this experiment begins with no weights.")
    first, *_ = programs.experiment.weights
    leading = () if programs.solo else (len(programs.members),)
    filled = {}
    for name in programs.experiment.weights:
        own = field_of(programs.member_shape, name)
        if not jax.tree.leaves(own):
            continue
        found = saved_field(source, name)
        given, wanted = flat(saved_field(source, first) if found is None else found), flat(own)
        wrong = [f"{key or name} is missing" for key in wanted if key not in given]
        wrong += [
            f"{key or name} is {list(given[key].shape)}, not {list(leaf.shape)}"
            for key, leaf in wanted.items()
            if key in given and given[key].shape != leaf.shape
        ]
        wrong += [f"{key or name} has no place" for key in given if key not in wanted]
        if wrong:
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ConfigError(f"--init-from: the weights do not fit: {'; '.join(wrong[:4])}{more}.")
        leaves = [
            jax.numpy.array(np.broadcast_to(given[key], leading + leaf.shape), leaf.dtype)
            for key, leaf in wanted.items()
        ]
        filled[name] = jax.tree.unflatten(jax.tree.structure(own), leaves)
    return filled


def newest_state(run: Path, console: Console) -> dict[str, Any]:
    """The newest state of a run that is whole, as nested dictionaries. Raises ConfigError."""
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"--init-from {run}: there is no run; name the folder that holds its config.json.")
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    found = checkpoints.newest_raw(lambda text: console.line(f"--init-from {run}: {text}"))
    if found is None:
        raise ConfigError(f"--init-from {run}: it has no checkpoint that is whole.")
    return found["state"]


def saved_field(source: Any, name: str) -> Any:
    """A field of a state, which may be one of a field, as `raw` gives it; None: there is none."""
    for part in name.split("."):
        source = source.get(part) if isinstance(source, dict) else None
    return source


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def count(state: Any, weights: tuple[str, ...]) -> int:
    """The numbers in the first of the weights; the others are averages of them, or an opponent's."""
    return sum(int(np.size(leaf)) for name in weights[:1] for leaf in jax.tree.leaves(field_of(state, name)))


def heading(
    program: str, folder: Path, programs: Programs, parameters: int, step: int, plan: Plan, keeps_memory: bool
) -> str:
    several = "" if programs.solo else f", {len(programs.members)} replicas at once"
    start = f"from step {step} " if step else ""
    return (
        f"{program}: {parameters:,} parameters, {start}to step {plan.stop}{several}, in {folder}\n"
        f"jax {jax.__version__} on {len(jax.devices())} {backend.platform()} device(s)"
        f"{', freed memory is kept' if keeps_memory else ''}"
    )


def show(folder: Path, console: Console, result: dict[str, Any]) -> None:
    """The end of a run: its curve, what it wrote, its numbers."""
    log = read(folder / "metrics.jsonl")
    monitored = next((name for name in result if name.count("/") == 1), None)
    curve = [line[monitored] for line in log if monitored in line and "sweep" not in line]
    if len(curve) > 1:
        console.line(f"{monitored}  {curve[0]:.4g} {sparkline(curve)} {curve[-1]:.4g}")
    for text in sorted((folder / "samples").rglob("*.txt"))[-1:]:
        console.line(f"--- {text}\n{text.read_text().rstrip()}\n---")
    for line in result["sweep"] if isinstance(result.get("sweep"), list) else [result]:
        console.line(summary(line, most=len(line)))
    there = [name for name in ("curves.png", "samples", "metrics.jsonl", "result.json") if (folder / name).exists()]
    mfu = f", {100 * result['mfu']:.3g} % MFU" if "mfu" in result else ""
    console.line(
        f"{result['steps']} steps in {clock(result['seconds'])}{mfu} (compiled in {result['compile_seconds']:.0f} s); "
        f"{folder}: {', '.join(there)}"
    )
