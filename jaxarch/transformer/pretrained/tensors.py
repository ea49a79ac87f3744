"""Safetensors files, one or sharded, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxarch.run.command import write_json
from jaxarch.run.protocol import ConfigError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """The tensors of a folder by name. Nothing is read before it is asked for, and only the part that is asked for.

    Raises ConfigError where there is no such file or a header is damaged.
    """

    def __init__(self, folder: Path):
        self._slices: dict[str, Any] = {}
        for file, expected in _files(folder).items():
            try:
                opened = safe_open(file, framework="np")
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            except FileNotFoundError:
                raise ConfigError(f"{folder / INDEX} names {file.name}, which is not there.") from None
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is damaged: {' '.join(str(error).split())}.") from None
            self._slices |= slices
            missing = expected - slices.keys()
            if missing:
                raise ConfigError(f"{folder}: the tensor {min(missing)} is missing in {file.name}.")

    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def kind(self, name: str) -> str:
        """The type of its numbers, as safetensors calls it."""
        return self._slices[name].get_dtype()

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        return self._slices[name][part]

    def whole(self, name: str) -> np.ndarray:
        return self.read(name, (slice(None),) * len(self.shape(name)))


def _files(folder: Path) -> dict[Path, set[str]]:
    """Each file, and the tensors that the index says are in it."""
    if (folder / FILE).exists():
        return {folder / FILE: set()}
    if not (folder / INDEX).exists():
        raise ConfigError(f"{folder} has neither {FILE} nor {INDEX}; other files of weights are not read.")
    files: dict[Path, set[str]] = {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{folder / INDEX} is damaged: {file!r} is no file of the folder.")
        files.setdefault(folder / file, set()).add(name)
    if not files:
        raise ConfigError(f"{folder / INDEX} is damaged: it has no weight_map.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ConfigError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it holds no object.")
    return content


def write(folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], np.ndarray], shard_bytes: int) -> None:
    """Writes the tensors in their order into one file, or into several where they are more than `shard_bytes`.

    sizes: of each tensor, in bytes. tensor: by name; no more than one shard of them is held at once.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The library writes an array's memory as it lies, whatever its strides.
        save_file({name: np.ascontiguousarray(tensor(name)) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
