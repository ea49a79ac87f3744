"""What a run would hold on each device, told before anything is made: `--explain-mesh`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxarch.run.mesh import path_name
from jaxarch.run.program import Programs
from jaxarch.run.protocol import Batch


class Held(NamedTuple):
    """An array of the state: bytes in all and on a device."""

    name: str
    shape: tuple[int, ...]
    cut: str
    whole: int
    own: int


def held(shapes: PyTree) -> list[Held]:
    """The arrays of a state whose shapes say how they are cut."""

    def one(path: tuple, leaf: Any) -> Held:
        size = leaf.dtype.itemsize
        own = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        cut = (
            ""
            if leaf.sharding is None
            else ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec)
        )
        return Held(path_name(path), leaf.shape, cut, math.prod(leaf.shape) * size, math.prod(own) * size)

    return [one(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]


def explained(programs: Programs, batch: Batch, memory: float) -> Iterator[str]:
    """Lines: each array, the totals, and whether a device of `memory` GB has room for them and for a step.

    A step's own memory is the compiler's plan for this backend; another's differs.
    """
    arrays = held(programs.state_shape)
    width = max(len(array.name) for array in arrays)
    devices = 1 if programs.mesh is None else programs.mesh.size
    yield f"{'array':{width}}  {'shape':>20}  {'cut by':>20}  bytes a device"
    for array in arrays:
        yield f"{array.name:{width}}  {array.shape!s:>20}  {array.cut or 'whole':>20}  {array.own:,}"
    weights = programs.experiment.weights
    groups: dict[str, list[Held]] = {}
    for array in arrays:
        of_weights = any(f"{array.name}.".startswith(f"{name}.") for name in weights)
        groups.setdefault("parameters" if of_weights else array.name.split(".")[0], []).append(array)
    yield f"on each of {devices} device(s):"
    for name, group in groups.items():
        own, whole = sum(array.own for array in group), sum(array.whole for array in group)
        yield f"  {name:12} {own:16,} bytes, {own / max(whole, 1):.4f} of all"
    analysis = programs.compiled_step(batch).memory_analysis()
    if analysis is None:
        yield "  this backend does not say what a step takes"
        return
    state = sum(array.own for array in arrays)
    step = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes - state
    yield f"  {'a step':12} {step:16,} bytes: activations, gradients, the batch, what is gathered"
    needed = (state + step) / 1e9
    verdict = "fits" if needed <= memory else "does not fit"
    yield f"  {'together':12} {state + step:16,} bytes: {needed:.3g} GB {verdict} {memory:g} GB"
