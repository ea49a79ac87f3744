"""What a family of published models is: its table of names, and its configuration in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder, ModelConfig

Settings = Mapping[str, Any]  # what config.json holds
Names = Mapping[str, str | tuple[str, ...]]


class Described(NamedTuple):
    """All that `decoder` needs to be told."""

    config: ModelConfig
    vocab: int
    length: int


class Family(NamedTuple):
    """One file of this folder.

    names: for each tensor the parameter that it is, `#` being the layer's number. `.T` says that it lies transposed;
        several parameters lie side by side along their last axis. A parameter that a model lacks (a bias, a free
        read-out) is passed over with its tensor.
    prefix: what all names begin with but the read-out's; folders of the body alone leave it out.
    ignored: a pattern of tensors that hold nothing learned.
    described: the model that a config.json means. Raises ConfigError, which says what stands against it.
    obstacles: the options with which a model is none of this family.
    settings: the config.json of a model without obstacles.
    """

    title: str
    architectures: tuple[str, ...]
    names: Names
    prefix: str
    ignored: str
    described: Callable[[Settings], Described]
    obstacles: Callable[[ModelConfig], list[str]]
    settings: Callable[[Decoder], dict[str, Any]]


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


def obstacles(config: ModelConfig, fixed: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """The options that differ from what is fixed, or from the default where they are not free either."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in free and value != fixed.get(field.name, field.default):
            found.append(f"--model.{field.name.replace('_', '-')} {value}")
    return found
