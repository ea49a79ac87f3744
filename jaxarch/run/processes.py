"""One run as several processes, on one host or many: how they find each other, and who writes.

All compute, read their part of the data, evaluate and write their part of a checkpoint. Only the first prints, logs and
reports. Alone, a process is the first.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from jaxarch.run.protocol import ConfigError

HEARTBEAT = 30  # seconds after which a process that is not heard of is dead, and the others end


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Waits for the others. To be called before anything asks for a device.

    Where nothing is said, JAX asks Slurm, Open MPI, Kubernetes or the Cloud TPU (`jax.distributed.initialize`).
    Raises ConfigError where they are not found.
    """
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed: {' '.join(str(error).split())[:200]} "
            "Where no scheduler says so, give --coordinator HOST:PORT --processes N --process I."
        ) from None


def first() -> bool:
    return jax.process_index() == 0


def alone() -> bool:
    return jax.process_count() == 1


def said(value: Any) -> Any:
    """What the first process gives (JSON), on all of them."""
    if alone():
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if first():
        padded[:] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))))


def largest(number: int) -> int:
    """Of the numbers that the processes give."""
    if alone():
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def together(what: str) -> None:
    """Waits until all processes are here."""
    if not alone():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
