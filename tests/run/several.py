"""How the tests run an experiment as several processes on this host."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

MODULE = "tests.run.sketches.network"
# What the transport prints from several threads at once, so that the pieces of its lines may be mixed.
TRANSPORT = r"(\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\n)*"
MESH = ("--mesh", "data=2,fsdp=4")


class Ended(NamedTuple):
    """One process: its exit code, what it printed (but for the transport's lines), its errors, and when it ended."""

    code: int
    out: str
    err: str
    seconds: float


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Several:
    """Processes with so many devices each, started at once; a single one is not told of others. `ended` waits for them.

    own: for a process's number, what its command line has besides; environments: its environment.
    """

    def __init__(
        self,
        *arguments: object,
        own: dict[int, Sequence[object]] | None = None,
        environments: dict[int, dict[str, str]] | None = None,
        prefix: Sequence[str] = ("-m", MODULE),
        count: int = 2,
        devices: int = 4,
    ):
        port, self.started = free_port(), time.monotonic()
        self.processes: list[subprocess.Popen] = []
        for number in range(count):
            place = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", count, "--process", number]
            command = [*(place if count > 1 else []), *arguments, *(own or {}).get(number, ())]
            flag = f"--xla_force_host_platform_device_count={devices}"
            flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
            environment = os.environ | {"XLA_FLAGS": flags} | (environments or {}).get(number, {})
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
            whole = [sys.executable, *prefix, *map(str, command)]
            self.processes.append(subprocess.Popen(whole, env=environment, **pipes))

    def ended(self, within: float = 120.0) -> list[Ended]:
        """How each ended. Those that do not are killed, and fail the test."""
        out: list[Ended] = []
        try:
            for process in self.processes:
                printed, err = process.communicate(timeout=max(1.0, self.started + within - time.monotonic()))
                kept = "".join(line for line in printed.splitlines(True) if not re.fullmatch(TRANSPORT, line))
                out.append(Ended(process.returncode, kept, err, time.monotonic() - self.started))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return out


def several(*arguments: object, **options) -> list[Ended]:
    return Several(*arguments, **options).ended()


def wait_for(path: Path, there: Callable[[str], bool] = bool, within: float = 90.0) -> None:
    """Until a file is there, and its text so."""
    limit = time.monotonic() + within
    while not (path.exists() and there(path.read_text())):
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.05)
