"""One run as several processes, on one host or many: how they find each other, who writes, how they end.

All compute, read their part of the data, evaluate and write their part of a checkpoint. Only the first prints, logs and
reports. Alone, a process is the first.

A `ConfigError` or `RunError` is every process's: it follows from what all share, or they told each other of it
(`agreed`); the first says it, and all leave together. Anything else is one process's own: it says it, and ends at once,
and the others end because it is gone: at the next sum over the devices, or when its heartbeat is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxarch.run.protocol import ConfigError, RunError

HEARTBEAT = 30  # seconds after which a process that is not heard of is dead, and the others end
PATIENCE = 300  # seconds to wait for the others at the start
BLOCK = 1 << 10  # bytes; what is told fills whole blocks, so that few sizes are compiled


def join(program: str, coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Waits for the others; ends this process in a line where they do not come. To be called before anything asks for a
    device.

    Where nothing is said, JAX asks Slurm, Open MPI, Kubernetes or the Cloud TPU (`jax.distributed.initialize`).
    program: what the line begins with.
    Raises ConfigError where nobody says where they are, RunError where the first cannot listen.
    """
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"--process {process} is none of --processes {processes}, which are 0 to {processes - 1}.")
    if coordinator is not None:
        check_coordinator(coordinator, process)
    # Its handler would take a SIGTERM that comes before the loop's own is there, and do nothing.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(PATIENCE, _nobody_came, (program,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=PATIENCE + HEARTBEAT,  # at its end the process would be aborted
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed: {' '.join(str(error).split())[:200]} "
            "Where no scheduler says so, give --coordinator HOST:PORT --processes N --process I."
        ) from None
    except RuntimeError as error:
        raise RunError(f"--distributed: the processes did not meet: {' '.join(str(error).split())[:200]}") from None
    finally:
        late.cancel()


def _nobody_came(program: str) -> None:
    print(
        f"{program}: --distributed: the processes did not meet within {PATIENCE} s; start each of them, with one "
        "coordinator, whose port is open to all.",
        file=sys.stderr,
    )
    end(1)


def check_coordinator(coordinator: str, process: int | None) -> None:
    """Raises ConfigError for an address that is none, RunError where the first process's port is taken: JAX's service
    would end the process with a segmentation fault.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator {coordinator} is not HOST:PORT, as node0:55527.")
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise RunError(
                f"--coordinator {coordinator}: {os.strerror(error.errno or 0)}; another port would do."
            ) from None


def first() -> bool:
    return alone() or jax.process_index() == 0


def alone() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def each(value: Any) -> list[Any]:
    """What each process gives (JSON), by its number, on all of them. To be called by all."""
    if alone():
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(-(-int(np.max(sizes)) // BLOCK) * BLOCK, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def said(value: Any) -> Any:
    """What the first process gives (JSON), on all of them."""
    return each(value if first() else None)[0]


def largest(number: int) -> int:
    """Of the numbers that the processes give."""
    if alone():
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What one process cannot do, none does: an error of one within it is raised by all after it.

    Within it no process may wait for the others. Raises ConfigError and RunError.
    """
    problem: tuple[str, str] | None = None
    try:
        yield
    except (ConfigError, RunError) as error:
        if alone():
            raise
        problem = type(error).__name__, str(error)
    except OSError as error:
        if alone():
            raise
        problem = "RunError", said_by_system(error)
    for process, found in enumerate(each(problem)):
        if found is not None:
            kind = ConfigError if found[0] == "ConfigError" else RunError
            raise kind(f"process {process}: {found[1]}" if process else found[1])


class LocalError(RunError):
    """A `RunError` of this process, of which the others do not know."""


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process's part of what all have before them."""
    return items if alone() else items[jax.process_index() :: jax.process_count()]


def others_gone(error: Exception) -> bool:
    """Whether a library's error says that another process does not answer."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "closed by peer", "heartbeat", "DEADLINE_EXCEEDED"))


def end(code: int) -> None:
    """Ends this process at once. By Python's own way out it would wait for the others, who may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def said_by_system(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
