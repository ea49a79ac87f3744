"""Checkpoints of a run: whole or not there, checked when read, the newest and the best kept.

Orbax writes each into a temporary folder and renames it when it is whole. It does not notice a changed
byte inside an array, so the CRC-32 of each file is kept beside them and compared before they are read.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxarch.run import processes
from jaxarch.run.mesh import path_name

CHECKSUMS = "crc32.json"
KEEP_LATEST = 2  # the one before the newest is there when the newest turns out to be damaged
DROPPED = "newest.dropped"  # what a folder that is being removed is called


class Checkpoints:
    """The checkpoints in `folder`, by step.

    newest_only: fields of the tree's `state` (`learner.replay`) that lie apart, and are kept in the newest alone.
    in_all: these are kept in all of them none the less.
    """

    def __init__(self, folder: Path, read_only: bool = False, newest_only: Sequence[str] = (), in_all: bool = False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

        class Manager(ocp.CheckpointManager):
            def metrics(self, step: int) -> Any:
                """None where they are no JSON: that the checkpoint is damaged is found when it is read."""
                try:
                    return super().metrics(step)
                except ValueError:
                    return None

        # Its own messages would stand between the run's lines; failures reach us as exceptions.
        for logger in ("absl", "asyncio"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        hush_late_callbacks()
        self.folder, self._orbax = folder.absolute(), ocp
        self._newest_only, self._in_all = tuple(newest_only), in_all
        best = policy.BestN(get_metric_fn=monitored, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(KEEP_LATEST), best]),
            best_fn=monitored,
            best_mode="min",
            enable_async_checkpointing=False,
            read_only=read_only,
        )
        self._manager = Manager(self.folder, options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: PyTree, info: dict[str, Any], monitor: float | None) -> None:
        """Keeps `tree` and `info` (JSON) as of `step`. Raises RunError; what was there before stays."""
        if step in self._manager.all_steps():
            return
        args = self._orbax.args
        tree, newest = self._apart(tree)
        items = {"tree": args.StandardSave(tree), "info": args.JsonSave(info)}
        if newest:
            items["newest"] = args.StandardSave(newest)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its threads print what they raise as well
                self._manager.save(
                    step,
                    args=args.Composite(**items),
                    metrics=None if monitor is None else {"monitor": monitor},
                    force=True,
                )
            if processes.first():  # all have written when it returns
                write_checksums(self.folder / str(step))
                for earlier in self.steps():
                    if earlier < step and newest and not self._in_all:
                        drop(self.folder / str(earlier))
        except Exception as error:  # the storage layer raises many kinds: ValueError, OSError, its own
            if processes.others_gone(error):
                raise
            atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))  # see hush_late_callbacks
            before = [earlier for earlier in self.steps() if earlier != step]
            raise processes.LocalError(
                f"the checkpoint of step {step} could not be written ({reason(error)}); {kept(before)}. "
                "Make room, then go on with --resume."
            ) from error

    def restore(
        self, step: int, shapes: PyTree, beginning: Callable[[], PyTree] | None = None
    ) -> tuple[PyTree, dict[str, Any]]:
        """The tree of that step, as `shapes` says, and its info.

        Where a shape says how its array is cut over devices, so it is, however it was when it was saved.
        beginning: gives a tree from which that is taken which only the newest has. None: it must be there.
        Raises Damaged, in all processes alike.
        """
        args = self._orbax.args
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or device), shapes)
        target, of_newest = self._apart(target)
        check_files(self.folder / str(step))
        items = {"tree": args.StandardRestore(target), "info": args.JsonRestore()}
        has_all = (self.folder / str(step) / "newest").exists()
        if of_newest and has_all:
            items["newest"] = args.StandardRestore(of_newest)
        elif of_newest and beginning is None:
            raise Incomplete(f"only the newest keeps {', '.join(self._newest_only)}")
        restored, damage = None, None
        try:
            restored = self._manager.restore(step, args=args.Composite(**items))
        except Exception as error:  # a missing, cut or overwritten file raises as many kinds as it has parts
            damage = reason(error)
        check_all(damage)
        assert restored is not None
        tree = restored["tree"]
        if of_newest:
            others = restored["newest"] if has_all else self._apart(beginning())[1]  # type: ignore[misc]
            leaves = {True: iter(others), False: iter(jax.tree.leaves(tree))}
            tree = jax.tree_util.tree_map_with_path(lambda path, _: next(leaves[self._is_of_newest(path)]), shapes)
        return tree, restored["info"]

    def newest(
        self, shapes: PyTree, report: Callable[[str], None], beginning: Callable[[], PyTree] | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones are reported, and left aside. None: there is none."""
        found = self._newest(lambda step: self.restore(step, shapes, beginning), report)
        return found and (found[0], *found[1])

    def best(self) -> int | None:
        """The step whose monitored metric was best, else the newest; None: there is none."""
        best = self._manager.best_step()
        return max(self.steps(), default=None) if best is None else best

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints after `step`: damaged ones, which a resumed run writes again."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def newest_raw(self, report: Callable[[str], None]) -> PyTree | None:
        """As `newest`, the tree alone and as `raw` gives it."""
        found = self._newest(self.raw, report)
        return found and found[1]

    def _newest(self, read: Callable[[int], Any], report: Callable[[str], None]) -> tuple[int, Any] | None:
        for step in reversed(processes.said(self.steps())):
            try:
                return step, read(step)
            except Incomplete as lack:
                report(f"the run cannot go on from the checkpoint of step {step} ({lack})")
            except Damaged as damage:
                report(f"the checkpoint of step {step} is damaged ({damage}); trying the one before it")
        return None

    def _apart(self, tree: PyTree) -> tuple[PyTree, list[Any]]:
        """The tree, None in place of each leaf that only the newest checkpoint has, and those leaves."""
        newest = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if self._is_of_newest(path)]
        rest = jax.tree_util.tree_map_with_path(lambda path, leaf: None if self._is_of_newest(path) else leaf, tree)
        return rest, newest

    def _is_of_newest(self, path: Any) -> bool:
        name = path_name(path)
        return any(f"{name}.".startswith(f"state.{field}.") for field in self._newest_only)

    def raw(self, step: int) -> PyTree:
        """The tree of that step as nested dictionaries and lists of NumPy arrays, whatever made it; None where the
        newest checkpoint alone has more. Raises Damaged.
        """
        check_files(self.folder / str(step))
        path = self.folder / str(step) / "tree"
        try:
            with self._orbax.Checkpointer(self._orbax.PyTreeCheckpointHandler()) as checkpointer:
                metadata = checkpointer.metadata(path).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: self._orbax.RestoreArgs(restore_type=np.ndarray), metadata)
                return checkpointer.restore(path, self._orbax.args.PyTreeRestore(restore_args=as_numpy))
        except Exception as error:
            raise Damaged(reason(error)) from error


class Damaged(Exception):
    """A checkpoint that cannot be read back whole."""


class Incomplete(Damaged):
    """One that lacks what only the newest keeps."""


@functools.cache
def hush_late_callbacks() -> None:
    """After a failed save threads of the storage layer come back to an event loop that is gone, and say so at length.

    While Python ends they pass by this hook, straight to the error output; by then all is said, and it can be closed.
    """
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def monitored(metrics: dict[str, float]) -> float:
    return metrics["monitor"]


def checksums(folder: Path) -> dict[str, int]:
    """The CRC-32 of each file below the folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    return {str(path.relative_to(folder)): checksum(path) for path in files}


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def write_checksums(folder: Path) -> None:
    write_whole(folder / CHECKSUMS, checksums(folder))


def write_whole(path: Path, content: dict[str, int]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def drop(folder: Path) -> None:
    """Removes what only the newest checkpoint keeps. Killed in the middle, what is left is whole all the same."""
    path = folder / CHECKSUMS
    if (folder / "newest").exists():
        if path.exists():
            kept = {name: crc for name, crc in json.loads(path.read_text()).items() if not name.startswith("newest/")}
            write_whole(path, kept)
        (folder / "newest").rename(folder / DROPPED)
    shutil.rmtree(folder / DROPPED, ignore_errors=True)


def check_files(folder: Path) -> None:
    """Raises Damaged where a file differs from what was written. Of several processes each reads its share of them."""
    check_all(damage_in(folder))


def damage_in(folder: Path) -> str | None:
    if not (folder / CHECKSUMS).exists():  # the run was killed between the two; the files are whole
        return None
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        for name in processes.share(sorted(expected)):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checksum(folder / name) != expected[name]:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError) as error:
        return reason(error)
    return None


def check_all(damage: str | None) -> None:
    """Raises Damaged where any process found damage. To be called by all."""
    for found in processes.each(damage):
        if found is not None:
            raise Damaged(found)


def kept(steps: list[int]) -> str:
    return f"the checkpoint of step {max(steps)} is kept" if steps else "no checkpoint had been saved"


def reason(error: BaseException) -> str:
    """The first words of a library's error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "File too large", "Permission denied", "Disk quota exceeded"):
        if known in text:
            return known
    return text[:100] + ("..." if len(text) > 100 else "")
