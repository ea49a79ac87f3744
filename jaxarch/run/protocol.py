"""What an experiment is: a few pure functions over one pytree of state.

Everything else (compiling, many steps a dispatch, replicas, sweeps, checkpoints, resuming) is a
transformation of these functions, written once in this package.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key, Shaped

if TYPE_CHECKING:
    import grain

State = Any  # one pytree: all that a checkpoint holds
Batch = Any  # a pytree of arrays with a leading axis of examples; None where the state holds its own world
Hypers = Any  # a NamedTuple of numbers
Index = Int[Array, ""]  # the step's number: time is an argument, never part of the state


class Mean(NamedTuple):
    """A weighted mean in the making: totals and weights add over steps, micro-batches and devices.

    A mean of weight 0 (no episode ended, a penalty not due) has no value and is left out of the log.
    """

    total: Float[Array, "*replicas"]
    weight: Float[Array, "*replicas"]


Metrics = dict[str, Mean | Shaped[Array, "*replicas"]]  # by name, as `train/loss`


Axis = str | tuple[str, ...] | None  # of a mesh, by name: what cuts a dimension of an array; None: it is whole
# An Axis for each of an array's first dimensions; after an ellipsis, for each of its last. One written with a question
# mark, as `tensor?`, cuts what it divides and leaves the rest whole.
Cut = tuple[Any, ...]


class Layout(NamedTuple):
    """How a family's arrays are cut over a mesh of devices (`jaxarch.run.mesh`).

    axes: of a mesh, those that the family can use. All can use `replica` for the run's members; it stands here where
        the state holds members of its own, which the rules cut by it.
    state: pairs of a regular expression, searched for in an array's path (`params.layers_0.attention.query.kernel`),
        and its cut. The first that fits counts; what it leaves whole is cut by size for `fsdp`.
    batch: of every array of a batch.
    """

    axes: tuple[str, ...] = ()
    state: tuple[tuple[str, Cut], ...] = ()
    batch: Cut = (("data", "fsdp"),)


class Experiment(NamedTuple):
    """The functions that a run transforms. All but `report` are pure.

    init: `(key, hypers) -> state`. Compiled; large arrays that it closes over (pretrained weights)
        become arguments of the program, not constants in it.
    step: `(state, batch, index) -> (state, metrics)`. Every predicate (warm-up, lazy regularisation,
        target updates) is computed from `index`, and all randomness from `fold_in(state.key, index)`.
    evaluate: `(state, key) -> metrics`.
    data: single examples by number, shuffled and repeated without end; step t is given examples
        `t * batch_size ... (t + 1) * batch_size - 1`. None: the state holds its own world.
    report: `(state, key, folder) -> metrics`, on the host: writes text and pictures to the folder. Of a run on a mesh
        the state's arrays are NumPy's, since no device need have room for all of them.
    monitor: the metric that "best" means; a leading minus says that it is maximised.
    hypers: the numbers that a sweep may vary, with their defaults; given to `init`, kept in the state.
    assets: writes what the run needs besides its state (a tokeniser) into the given folder, once, and what its
        data are (files called data*). A resumed run must give the same; one that begins with another run's weights
        too, but for the data.
    weights: the fields of the state (a dataclass or a NamedTuple) that `--init-from` fills, those of a field of it as
        `learner.params`. One that the other run lacks (an exponential average, a target network) is filled from the
        first of them.
    newest_only: fields of the state, likewise, that are large and only needed to go on (a replay): each checkpoint but
        the newest is without them. One that is loaded has them as they are at a run's beginning.
    flops: the floating-point operations of a step's products by type, `{"bfloat16": 1.2e12}`, by formula: three times
        those of the forward pass, what is recomputed not counted again. Against the machine's peaks they give the
        run's MFU. None: they are counted in the program (`jaxarch.run.operations`).
    layout: how state and batch are cut over devices. None: only replicas can be spread.
    check: raises ConfigError for hypers that are none, as a discount above 1; it is asked about those of a sweep.
    """

    init: Callable[[Key[Array, ""], Hypers], State]
    step: Callable[[State, Batch, Index], tuple[State, Metrics]]
    evaluate: Callable[[State, Key[Array, ""]], Metrics]
    data: grain.MapDataset | None = None
    batch_size: int = 1
    report: Callable[[State, Key[Array, ""], Path], Metrics] | None = None
    monitor: str = "val/loss"
    hypers: Hypers = ()
    assets: Callable[[Path], None] | None = None
    weights: tuple[str, ...] = ("params",)
    flops: Mapping[str, float] | None = None
    layout: Layout | None = None
    newest_only: tuple[str, ...] = ()
    check: Callable[[Hypers], None] = lambda hypers: None


class ConfigError(Exception):
    """What the user asked for cannot be: one line that says what is wrong and what would do. Exit code 2."""


class RunError(Exception):
    """A run that began cannot go on: one line that says why and what is kept. Exit code 1."""


def check_least(config: Any, names: Iterable[str], least: int, prefix: str = "") -> None:
    """Raises ConfigError for the first of a configuration's numbers of these names that is below `least`.

    prefix: of its options, as `model.`.
    """
    for name in names:
        value = getattr(config, name)
        if value < least:
            said = f"{value:g}" if isinstance(value, float) else value
            raise ConfigError(f"--{prefix}{name.replace('_', '-')} {said} is below {least}.")


def check_not_negative(config: Any, names: Iterable[str], prefix: str = "") -> None:
    """Raises ConfigError for the first of these numbers, of which 0 turns something off, that is not 0 or above."""
    for name in names:
        if not getattr(config, name) >= 0:  # as a number that is none is not
            option = f"--{prefix}{name.replace('_', '-')}"
            raise ConfigError(f"{option} {getattr(config, name):g} is not 0 or above; 0 is off.")


def checked_by(*configs: Any) -> Callable[[Hypers], None]:
    """The `check` of hypers that are fields of these frozen configurations, which look at them when they are made."""

    def check(hypers: Hypers) -> None:
        values = hypers._asdict()
        for config in configs:
            own = {field.name for field in dataclasses.fields(config)} & values.keys()
            dataclasses.replace(config, **{name: values[name] for name in own})

    return check


def field_of(state: State, name: str) -> Any:
    """Of the state, or of one of its fields: `learner.params`. Raises AttributeError where there is none."""
    return operator.attrgetter(name)(state)


def with_field(state: State, name: str, value: Any) -> State:
    first, _, rest = name.partition(".")
    changed = {first: with_field(getattr(state, first), rest, value) if rest else value}
    return state._replace(**changed) if hasattr(state, "_replace") else dataclasses.replace(state, **changed)


def mean(value: jax.Array, weight: jax.Array | float = 1.0) -> Mean:
    """A mean that counts `weight` examples."""
    return Mean(value * weight, jax.numpy.asarray(weight, value.dtype) + jax.numpy.zeros_like(value))
