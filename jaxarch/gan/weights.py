"""Tensors from files of weights by name: those of torch, without torch; .safetensors; .npz.

A file of torch is a pickle, which may run any program when it is read. Here it may hold tensors and containers of them
alone, and everything else is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxarch.run.protocol import ConfigError

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
MAGIC = 0x1950A86A20F9469CFC6C  # with which files of torch before 1.6 begin


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, by name; the file's beginning says what it is.

    Raises ConfigError where it cannot be read, is damaged, or holds something else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if start.startswith(b"PK"):
                with zipfile.ZipFile(file) as archive:
                    if any(name.endswith("data.pkl") for name in archive.namelist()):
                        return _named(_zipped(archive), path)
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: arrays[name] for name in arrays.files}
            if start[8:] == b"{":
                return load_file(path)
            file.seek(0)
            return _named(_in_sequence(file), path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.") from None
    except _Refused as error:
        raise ConfigError(f"{path} holds {error}, not tensors alone; it is not read.") from None
    except (SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, *_DAMAGE) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise ConfigError(f"{path} is damaged, or no file of weights ({reason or type(error).__name__}).") from None


class _Refused(Exception):
    pass


# What the interpreter of a pickle gives for bytes that are none.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Tensor(NamedTuple):
    """A view of a storage whose numbers may come later in the file."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.strides, 0) < 0 or last >= len(self.storage):
            raise ValueError("a tensor reaches beyond its numbers")
        width = self.storage.itemsize
        strides = tuple(stride * width for stride in self.strides)
        return np.lib.stride_tricks.as_strided(self.storage[self.offset :], self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, storage: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file)
        self._storage, self._storages = storage, {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, dtype, key, _, count, *views = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(views):
            raise _Refused(f"a {kind} that is not known")
        if key not in self._storages:
            self._storages[key] = self._storage(dtype, key, count)
        return self._storages[key]

    def filled(self, key: str) -> np.ndarray:
        return self._storages[key]


def _zipped(archive: zipfile.ZipFile) -> Any:
    """The format since torch 1.6: a pickle, and beside it a file of numbers for each storage."""
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    order = "<"
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") == b"big":
        order = ">"

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        numbers = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype.newbyteorder(order), count)
        return numbers.astype(dtype)

    return _Unpickler(io.BytesIO(archive.read(pickled)), storage).load()


def _in_sequence(file: BinaryIO) -> Any:
    """The format before: pickles of a number, a version, the machine, the tensors and their storages' keys, then the
    numbers of each.
    """
    if _Unpickler(file, _none).load() != MAGIC:
        raise ValueError("it begins like no known format")
    for _ in range(2):
        _Unpickler(file, _none).load()

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        return np.empty(count, dtype)

    unpickler = _Unpickler(file, storage)
    content = unpickler.load()
    for key in _Unpickler(file, _none).load():
        numbers = unpickler.filled(key)
        if int.from_bytes(file.read(8), "little") != len(numbers):
            raise ValueError("the length of a tensor is wrong")
        read = file.read(numbers.nbytes)
        numbers[:] = np.frombuffer(read, numbers.dtype, len(numbers))
    return content


def _none(dtype: np.dtype, key: str, count: int) -> np.ndarray:
    raise _Refused("numbers in a wrong place")


def _named(content: Any, path: Path) -> dict[str, np.ndarray]:
    if not isinstance(content, dict) or not all(isinstance(value, _Tensor) for value in content.values()):
        raise _Refused(f"a {type(content).__name__} of other things")
    return {name: tensor.array() for name, tensor in content.items()}
