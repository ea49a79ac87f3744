"""Which parameters of a pretrained model are trained: all of them, its head, or a low rank beside its matrices.

What is trained is a tree of the model's own names that lies over the frozen parameters. A matrix in it stands in the
place of its name; a pair `lora_a`, `lora_b` is added to the `kernel` of its module (Hu et al. 2021, eq. 3). `merged`
makes one tree of both, inside of the step too, so that no module knows of it and gradients go to what is trained
alone. The optimiser's state is as small as what is trained; the arithmetic is that of training all, for the gradient
of an adapter's pair is made from that of its matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Key, PyTree

from jaxarch.run.protocol import ConfigError, Index, Metrics
from jaxarch.transformer.training import Hypers, Objective, OptimConfig, TrainState, make_step, train_state

Tune = Literal["full", "lora", "head"]


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 8
    """of what is added to each matrix"""
    alpha: float = 16.0
    """what is added is multiplied by alpha / rank"""
    targets: tuple[str, ...] = ("query", "value")
    """the modules whose matrices are adapted, of query, key, value, out, gate, up, down"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"--lora.rank {self.rank} is below 1; 8 is usual.")
        if self.alpha <= 0:
            raise ConfigError(f"--lora.alpha {self.alpha:g} is not above 0; twice --lora.rank is usual.")
        if not self.targets:
            raise ConfigError("--lora.targets names no module; query value is usual.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Parts(NamedTuple):
    """The parameters of a model in two. frozen: None where all are trained."""

    trained: PyTree
    frozen: PyTree


def init(params: PyTree, rank: int, targets: Collection[str], key: Key[Array, ""]) -> PyTree:
    """Adapters of the kernels of all modules of these names, which add nothing yet (Hu et al. 2021, sec. 4.1).

    `lora_a` is `[in, rank]` and drawn so that it keeps the size of what it multiplies, `lora_b` is `[rank, out]` and 0;
    of stacked layers each has an axis of layers before these.
    Raises ConfigError where no module has such a name, or the rank is more than a matrix has.
    """
    leaves = cast(dict[tuple[str, ...], Any], traverse_util.flatten_dict(params))
    kernels = {path[:-1]: leaf for path, leaf in leaves.items() if path[-1] == "kernel" and len(path) > 1}
    names = {path[-1]: path for path in kernels}
    unknown = [name for name in targets if name not in names]
    if unknown:
        raise ConfigError(f"--lora.targets {unknown[0]} is no matrix of this model; it has {', '.join(sorted(names))}.")
    adapters = {}
    for number, path in enumerate(sorted(path for path in kernels if path[-1] in targets)):
        kernel = kernels[path]
        *layers, rows, columns = kernel.shape
        if rank > min(rows, columns):
            raise ConfigError(f"--lora.rank {rank} is more than {path[-1]} has, which is {rows} x {columns}.")
        normal = jax.random.normal(jax.random.fold_in(key, number), (*layers, rows, rank), kernel.dtype)
        adapters[(*path, "lora_a")] = normal / rows**0.5
        adapters[(*path, "lora_b")] = jnp.zeros((*layers, rank, columns), kernel.dtype)
    return traverse_util.unflatten_dict(adapters)


def merged(params: PyTree, over: PyTree, scale: float) -> PyTree:
    """`params` with `over` laid on it: W + scale * A B where it has a pair, its own leaves as they are."""
    if params is None or not isinstance(over, Mapping):
        return over
    out: dict[str, Any] = dict(params)
    for name, value in over.items():
        if name == "lora_a":
            out["kernel"] = params["kernel"] + scale * (value @ over["lora_b"])
        elif name != "lora_b":
            out[name] = merged(params.get(name), value, scale)
    return out


def divided(params: PyTree, tune: Tune, head: Collection[str], lora: LoraConfig, key: Key[Array, ""]) -> Parts:
    """What is trained and what stays; `merged(frozen, trained, lora.scale)` is the model again, now as at the start.

    head: the names at the top of the tree that belong to the head. It is trained as it is, also beside adapters.
    Raises ConfigError as `init` does, and where a head is to be trained and there is none.
    """
    if tune == "full":
        return Parts(params, None)
    own = {name: value for name, value in params.items() if name in head}
    frozen = {name: value for name, value in params.items() if name not in head}
    if tune == "head":
        if not own:
            raise ConfigError("--tune head: this model has no head apart from its body; full or lora would do.")
        return Parts(own, frozen)
    return Parts(own | init(frozen, lora.rank, lora.targets, key), frozen)


# --- training -----------------------------------------------------------------------------------


@flax.struct.dataclass
class TunedState(TrainState):
    """A `TrainState` whose parameters lie over others. Both are kept: a run outlives the folder that it began with."""

    frozen: PyTree

    def whole(self, scale: float) -> PyTree:
        """The parameters of the model: the average, where one is kept, over what is frozen."""
        return merged(self.frozen, self.evaluated, scale)


def tuned_state(parts: Parts, optim: OptimConfig, key: Key[Array, ""], hypers: Hypers) -> TunedState:
    """At step 0, the optimiser having met what is trained alone."""
    begun = train_state(parts.trained, optim, key, hypers)
    return TunedState(**{name: getattr(begun, name) for name in begun.__dataclass_fields__}, frozen=parts.frozen)


def make_tuned_step(
    objective: Objective, optim: OptimConfig, steps: int, scale: float
) -> Callable[[TunedState, Any, Index], tuple[TunedState, Metrics]]:
    """`make_step` for an objective of the whole model's parameters, of which the state trains its part."""

    def step(state: TunedState, batch: Any, index: Index) -> tuple[TunedState, Metrics]:
        def of_trained(trained: PyTree, batch: Any, key: Key[Array, ""]) -> tuple[Array, Array]:
            return objective(merged(state.frozen, trained, scale), batch, key)

        return cast(Any, make_step(of_trained, optim, steps)(state, batch, index))

    return step
