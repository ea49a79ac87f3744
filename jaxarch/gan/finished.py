"""A finished run of a GAN, without its data: the generator, its averaged parameters, the classes that it knows.

What the generator is says `generator.json` among the run's assets, which its experiment writes (`save_description`):
the module's class and fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.gan.game import streams
from jaxarch.run.command import write_json
from jaxarch.run.load import raw_state, saved_config
from jaxarch.run.protocol import ConfigError

DESCRIPTION = "generator.json"
ConditionKind = Literal["none", "labels", "other"]


class Finished(NamedTuple):
    """`generator.apply(variables, latents, condition, train=False)`.

    classes: of a generator that takes labels, their names; none of one that takes nothing.
    """

    generator: nn.Module
    variables: PyTree
    classes: tuple[str, ...]


def save_description(folder: Path, generator: nn.Module, condition: ConditionKind = "none") -> None:
    """Writes `generator.json`, from which `restored` composes the generator; one of an experiment's assets.

    condition: what the generator is given beside latents: nothing; labels, whose names are in `classes.json` beside it
        (`ImageData.save`); or something else (a picture, a text), for which `restored` has no use.
    Raises TypeError for a module with fields that JSON cannot hold.
    """
    write_json(folder / DESCRIPTION, {"condition": condition, **_described(generator)})


def restored(run: Path, step: str = "newest") -> Finished:
    """The generator as it was saved, the average of its parameters where the run kept one.

    step: newest, best or a number.
    Raises ConfigError where there is no such run or checkpoint, where the run's pictures are not made of latents and
    labels alone, or where it holds several members.
    """
    saved_config(run)
    assets = run / "assets"
    if not (assets / DESCRIPTION).exists():
        raise ConfigError(f"{run} is not the run of a GAN that makes pictures; jaxarch.run.load takes any.")
    described = json.loads((assets / DESCRIPTION).read_text())
    if described["condition"] == "other":
        raise ConfigError(f"the generator of {run} makes its pictures of more than latents and labels.")
    generator = _composed(described)
    classes = tuple(json.loads((assets / "classes.json").read_text())) if described["condition"] == "labels" else ()
    state = raw_state(run, step)
    params = jax.tree.map(jnp.asarray, state.get("average") or state["generator"])
    variables = {"params": params, **jax.tree.map(jnp.asarray, state.get("g_stats") or {})}
    if _shapes(params) != _shapes(_parameters(generator, bool(classes))):
        raise ConfigError(f"{run} holds several replicas or points of a sweep; name a run of one.")
    return Finished(generator, variables, classes)


def pictures(
    finished: Finished, key: Key[Array, ""], labels: Int[np.ndarray, " count"], batch_size: int = 64, **options: Any
) -> Float[np.ndarray, "count height width channels"]:
    """As many pictures as labels, on the host; a generator without classes takes no note of what the labels are.

    The first latents of a key are the same, however many follow; so are a batch's other random numbers (noise).
    options: of the generator's call, as StyleGAN's `truncation`.
    """
    generator, variables, classes = finished
    dim = cast(Any, generator).latent_dim

    @jax.jit
    def some(variables: PyTree, numbers: Array, labels: Array) -> Array:
        latents = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), (dim,)))(numbers)
        given = latents, labels if classes else None
        rngs = streams(jax.random.fold_in(jax.random.fold_in(key, numbers[0]), 0))
        return cast(Array, generator.apply(variables, *given, train=False, rngs=rngs, **options))

    out = []
    for start in range(0, len(labels), batch_size):
        numbers = np.arange(start, start + min(batch_size, len(labels)))  # all batches alike: one program
        out.append(np.asarray(some(variables, numbers, labels[np.minimum(numbers, len(labels) - 1)].astype(np.int32))))
    return np.concatenate(out)[: len(labels)]


def takes(generator: nn.Module, option: str) -> bool:
    """Whether the generator's call has this option."""
    return option in inspect.signature(type(generator).__call__).parameters


def labels_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The places of these classes, which are given by their names or numbers. Raises ConfigError."""
    out = []
    for name in names:
        if name in classes:
            out.append(list(classes).index(name))
        elif name.isdigit() and int(name) < len(classes):
            out.append(int(name))
        else:
            known = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
            raise ConfigError(f"--label {name} is none of this run's classes: {known}.")
    return out


def _parameters(generator: nn.Module, conditional: bool) -> PyTree:
    latents = jax.ShapeDtypeStruct((1, cast(Any, generator).latent_dim), jnp.float32)
    condition = jax.ShapeDtypeStruct((1,), jnp.int32) if conditional else None
    key = jax.random.key(0)
    return jax.eval_shape(lambda z, c: generator.init({"params": key, **streams(key)}, z, c), latents, condition)[
        "params"
    ]


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- a module as JSON ---------------------------------------------------------------------------


def _described(module: Any) -> dict[str, Any]:
    """The class of a dataclass and its fields; of a Linen module without those that Flax adds."""
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name") and field.init]
    return {
        "class": f"{type(module).__module__}:{type(module).__qualname__}",
        "fields": {name: _plain(getattr(module, name), f"{type(module).__name__}.{name}") for name in fields},
    }


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(one, where) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _described(value)
    try:
        return {"dtype": jnp.dtype(value).name}
    except TypeError:
        raise TypeError(f"{where} is {value!r}, which a description cannot hold") from None


def _composed(described: Any) -> Any:
    if isinstance(described, list):
        return tuple(map(_composed, described))
    if not isinstance(described, dict):
        return described
    if "dtype" in described:
        return jnp.dtype(described["dtype"]).type
    module, name = described["class"].split(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        return kind(**{name: _composed(value) for name, value in described["fields"].items()})
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"the run's generator {module}.{name} is no longer what it was: {error}.") from None
