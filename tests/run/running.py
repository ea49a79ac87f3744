"""How the tests run an experiment: in this process, through its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run import Experiment, command, load
from jaxarch.run.checkpoint import Checkpoints
from jaxarch.run.command import first_batch, main
from jaxarch.run.loop import batches
from jaxarch.run.mesh import path_name
from jaxarch.run.program import Carry, Member, Programs

SPEED = ("seconds", "steps_per_second", "mfu")


def run(module: ModuleType, runs: Path, *arguments: object, name: str = "a", copied_at: int | None = None) -> Path:
    """`python -m MODULE --runs RUNS --name NAME ARGUMENTS`, which must succeed; the run's folder.

    copied_at: a copy is made as it is when it has saved that step, for `resumed`.
    """
    save = Checkpoints.save

    def and_copy(checkpoints: Checkpoints, step: int, *others: Any) -> None:
        save(checkpoints, step, *others)
        if step == copied_at:
            shutil.copytree(checkpoints.folder.parent, copy_of(checkpoints.folder.parent))

    with pytest.MonkeyPatch.context() as patch:
        if copied_at is not None:
            patch.setattr(Checkpoints, "save", and_copy)
        code = exit_code(module, *arguments, "--runs", runs, "--name", name)
    assert code == 0
    return runs / module.__name__.rsplit(".", 1)[-1] / name


def copy_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-resumed")


def resumed(module: ModuleType, whole: Path, step: int) -> Path:
    """A copy of a finished run as it was when it had saved that step, gone on with to its end; its folder.

    Whole must have been told to save there, by `--checkpoint-every`; and to be copied there, if its newest checkpoint
    keeps more than those before.
    """
    copy = copy_of(whole)
    if not copy.exists():
        shutil.copytree(whole, copy)
        (copy / "result.json").unlink()
    saved = sorted(int(path.name) for path in (copy / "checkpoints").iterdir())
    for later in saved[saved.index(step) + 1 :]:
        shutil.rmtree(copy / "checkpoints" / str(later))
    return run(module, whole.parents[1], "--resume", name=copy.name)


def exit_code(module: ModuleType, *arguments: object) -> int:
    """Of its command line. No curves are drawn: of a run of GANs that takes as long as the rest of its test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["program", *map(str, arguments)])
        patch.setattr(command, "draw", lambda log, picture: None)
        try:
            presets = {"wide": module.Config(dim=7)} if "line" in module.__name__ else getattr(module, "PRESETS", None)
            main(module.experiment, module.Config, presets)
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def wide(experiment: Experiment) -> Experiment:
    """With a state in float64: modules make their parameters in float32, and sums of gradients are of that type.

    A world is left as it is: what its environments make has a type of its own.
    """

    def widened(tree: Any) -> Any:
        def one(path: tuple, leaf: Any) -> Any:
            mine = leaf.dtype == jnp.float32 and not path_name(path).startswith("world.")
            return leaf.astype(jnp.float64) if mine else leaf

        return jax.tree_util.tree_map_with_path(one, tree)

    def step(state: Any, batch: Any, index: Any) -> tuple[Any, Any]:
        state, metrics = experiment.step(state, batch, index)
        return widened(state), metrics

    return experiment._replace(init=lambda *given: widened(experiment.init(*given)), step=step)


def after(experiment: Experiment, members: list[Member], steps: int) -> tuple[Programs, Carry]:
    """The programs of the members and where they stand after some steps."""
    programs = Programs(experiment, members)
    carry = Carry(programs.init(), programs.sums(first_batch(experiment)))
    for index in range(steps):
        carry = programs.steps(carry, batches(experiment, index, 1), index)
    return programs, carry


def log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without their times and speeds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SPEED} for line in lines]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """The newest state of a run, leaf by leaf."""

    def plain(leaf: Any) -> np.ndarray:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    leaves = jax.tree_util.tree_leaves_with_path(load(folder).state)
    return {jax.tree_util.keystr(path): plain(leaf) for path, leaf in leaves}


def assert_same(one: Path, other: Path) -> None:
    """The same state, bit for bit, and the same curve."""
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        np.testing.assert_array_equal(value, right[key], err_msg=key)
    assert log(one) == log(other)
