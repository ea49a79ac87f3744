"""What the machine reaches: floating-point operations and bytes a second, measured once and kept.

A data sheet's rates are reached by no program, and for many processors there are none. So a program is held against
the fastest product and the fastest stream that the same compiler makes on the same device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxarch.run import backend

SIZES = (1024, 2048, 4096, 8192)  # of the matrices; a product of the next size takes eight times as long
SECONDS = 0.15  # for the tries of one size
STREAM = 2**26  # numbers, 256 MiB: far more than caches hold
STREAM_BYTES = 4 * 2 * 4 * STREAM  # of a call of `stream`: four passes, each reads and writes


def flops(dtype: DTypeLike, say: Callable[[str], None] = lambda text: None) -> float:
    """The most floating-point operations a second that large products of this type reach.

    Of one device; on CPU of the cores that this process may use. `say` is told when it has to be measured, which takes
    less than half a second on two cores.
    """
    name = jnp.dtype(dtype).name
    return _kept(name, f"FLOP/s in {name}", lambda: _measured_flops(dtype), say)


def bandwidth(say: Callable[[str], None] = lambda text: None) -> float:
    """The most bytes a second that a device reads and writes, of an array that no cache holds; kept as `flops` is."""
    return _kept("bytes", "B/s", lambda: STREAM_BYTES / min(repeated(stream(), 2 * SECONDS)), say)


def seconds_at_peak(operations: Mapping[str, float], say: Callable[[str], None] = lambda text: None) -> float:
    """What a device takes at the least for these operations, given by type."""
    return sum((number / flops(dtype, say) for dtype, number in operations.items()), 0.0)


def product(size: int, dtype: DTypeLike) -> Callable[[], Any]:
    """A call that multiplies matrices of this size, 2 size ** 3 operations, and waits for the result."""
    numbers = np.random.default_rng(0).standard_normal(999_983, np.float32)  # a GPU is quicker where all are equal
    x = jnp.asarray(np.resize(numbers, (size, size)), dtype)
    compiled, _ = backend.compiled(jax.jit(lambda x: x @ x).trace(x))
    return lambda: compiled(x).block_until_ready()


def stream() -> Callable[[], Any]:
    """A call that reads and writes `STREAM_BYTES` and waits for the end."""
    x = jnp.zeros(STREAM, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, so that no page is faulted in

    def call() -> None:
        nonlocal x
        for _ in range(4):
            x = add(x)
        x.block_until_ready()

    return call


def repeated(call: Callable[[], Any], budget: float, most: int = 1000) -> list[float]:
    """Seconds of each call until the budget is spent, one at least, after one that is not counted."""
    call()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < budget and len(seconds) < most):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _measured_flops(dtype: DTypeLike) -> float:
    """Of as many sizes as the time allows."""
    rate = 0.0
    for size in SIZES:
        best = min(repeated(product(size, dtype), SECONDS))
        rate = max(rate, 2 * size**3 / best)
        if 8 * best > SECONDS:
            break
    return rate


def _kept(quantity: str, unit: str, measure: Callable[[], float], say: Callable[[str], None]) -> float:
    value = _read().get(_key(quantity))
    if value is None:
        value = measure()
        say(f"measured, once for this machine: {value / 1e9:.4g} G{unit}")
        keep(quantity, value)
    return value


def keep(quantity: str, value: float) -> None:
    """Keeps a measured figure, of a type's name or of "bytes", where it is the largest so far."""
    path, kept, key = _path(), _read(), _key(quantity)
    partial = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # then it is measured again the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(kept | {key: max(value, kept.get(key, 0.0))}, indent=2) + "\n")
        os.replace(partial, path)


def _path() -> Path:
    return backend.cache_folder() / "peaks.json"


def _key(quantity: str) -> str:
    """What a figure depends on."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{backend.processor()}, {cores} cores"
    return f"{name}, jax {jax.__version__}, {quantity}"


def _read() -> dict[str, float]:
    """All that is kept; what is broken counts as not there."""
    try:
        content = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    figures = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in figures if isinstance(value, float) and 0 < value < math.inf}
