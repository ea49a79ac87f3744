"""What all tests share: shapes checked at run time, the CPU, caches, a budget of time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

if "jaxarch.run" in sys.modules:
    raise RuntimeError("jaxarch was imported before the hook that checks its shapes")

# Environment variables, so that the commands which tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Compiled programs are kept between test runs: their key holds the program, the versions, the options and the
# processor's features, so a changed program is never mistaken for an old one.
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(USER_CACHE / "jaxarch" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Everything else that the package caches (encoded texts) begins empty.
SCRATCH = tempfile.TemporaryDirectory(prefix="jaxarch-tests-")
os.environ["JAXARCH_CACHE"] = SCRATCH.name

jaxtyping.install_import_hook("jaxarch", "beartype.beartype")

# The same examples every time: a failure seen once is seen again.
hypothesis.settings.register_profile("jaxarch", derandomize=True, max_examples=20, deadline=None, database=None)
hypothesis.settings.load_profile("jaxarch")

CACHE_BYTES = 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Programs of quick tests run so shortly that LLVM's optimisation costs more than it gains."""
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before the workers start, the oldest programs go. JAX's own limit looks through all of them at each that it adds,
    under a lock: among some thousands that is a tenth of a second.
    """
    if hasattr(session.config, "workerinput"):
        return
    kept = 0
    with contextlib.suppress(FileNotFoundError):  # others may be at it too
        files = [(file.stat(), file) for file in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache")]
        for about, file in sorted(files, key=lambda found: found[0].st_mtime, reverse=True):
            kept += about.st_size
            if kept > CACHE_BYTES:
                file.unlink()


STARTED = time.monotonic()
BUDGET = float(os.environ.get("JAXARCH_TEST_SECONDS", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked `devices(n)` runs in a process of its own, which has n of them: in all others there is one.

    Virtual devices of XLA:CPU come, once in a while, to the collectives inside a conditional and to those beside it in
    different orders, wait for one another, and are aborted after 40 seconds. Then it runs once more.
    """
    marker = pyfuncitem.get_closest_marker("devices")
    flag = "--xla_force_host_platform_device_count="
    if marker is None or flag in os.environ.get("XLA_FLAGS", ""):
        return None
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}{marker.args[0]}".strip()
    environment = os.environ | {"XLA_FLAGS": flags, "JAXARCH_TEST_SECONDS": "inf"}
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "", pyfuncitem.nodeid]
    for _ in range(2):
        done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True)
        if done.returncode != -signal.SIGABRT:
            break
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - STARTED > BUDGET:
        pytest.skip(f"not begun within JAXARCH_TEST_SECONDS={BUDGET:.0f}")
