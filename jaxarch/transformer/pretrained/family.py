"""What a family of published models is: its table of names, and its configuration in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
from jax.typing import DTypeLike

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.pretrained.tensors import Tensors

Settings = Mapping[str, Any]  # what config.json holds
Names = Mapping[str, str | tuple[str, ...]]


class Family(NamedTuple):
    """One file of this folder.

    kind: the class of its models, which have `inputs()`: the smallest with which `init` makes all parameters.
    architectures: the names of those that can be loaded.
    bodies: the names of those without a head, whose folders leave the prefix out.
    names: for each tensor the parameter that it is, `#` being the layer's number. `.T` says that it lies transposed,
        `@2310` which of its axes are the parameter's first, second ...; several parameters lie side by side along
        their last axis. A parameter that a model lacks (a bias, a free read-out) is passed over with its tensor. A
        function of the parameters' names where the same parameter is another tensor in another model.
    prefix: what the names of the body begin with.
    heads: what the names begin with that are not the body's, or that another head may lack.
    copies: tensors that some folders repeat under another name: that name, and the one in `names`.
    ignored: a pattern of tensors that hold nothing learned.
    model: what a config.json means, to be computed in the given type. Raises ConfigError: what stands against it.
    obstacles: the options with which a model of that kind is none of this family.
    settings: the config.json of a model without obstacles.
    completed: the entries of a config.json with what only the tensors tell.
    older: endings of names in old folders, and what they are now.
    """

    title: str
    kind: type[nn.Module]
    architectures: tuple[str, ...]
    bodies: tuple[str, ...]
    names: Names | Callable[[Collection[str]], Names]
    prefix: str
    heads: tuple[str, ...]
    copies: Mapping[str, str]
    ignored: str
    model: Callable[[Settings, DTypeLike], Any]
    obstacles: Callable[[Any], list[str]]
    settings: Callable[[Any], dict[str, Any]]
    completed: Callable[[Settings, Tensors], Settings] = lambda settings, tensors: settings
    older: Mapping[str, str] = {}


Value = TypeVar("Value", bool, int, float, str)


def entry(settings: Settings, name: str, kind: type[Value], default: Value | None = None) -> Value:
    """The value of that name, or the default where it is left out or null. Raises ConfigError."""
    value: Any = settings.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{name} is missing.")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{name} is {value!r}, not of type {kind.__name__}.")
    return value


def must_be(settings: Settings, name: str, *allowed: Any) -> None:
    """Raises ConfigError where the value of that name is another one; left out or null, it is the first."""
    value = settings.get(name)
    if value is not None and value not in allowed:
        expressed = " or ".join(str(one) for one in allowed)
        raise ConfigError(f"{name} {value} cannot be expressed here, only {expressed}.")


def sizes(settings: Settings, *names: str) -> tuple[int, ...]:
    """The whole numbers of these names. Raises ConfigError where one is below 1."""
    found = tuple(entry(settings, name, int) for name in names)
    for name, size in zip(names, found, strict=True):
        if size < 1:
            raise ConfigError(f"{name} {size} is below 1.")
    return found


def obstacles(config: Any, fixed: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The options of a configuration that differ from what is fixed, or from the default where they are not free."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in free and value != fixed.get(field.name, field.default):
            said = " ".join(map(str, value)) if isinstance(value, tuple) else value
            found.append(f"--model.{field.name.replace('_', '-')} {said}")
    return found
