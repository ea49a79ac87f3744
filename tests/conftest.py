"""What all tests share: shapes checked at run time, the CPU, caches, a budget of time."""

from __future__ import annotations

import os
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
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
# Everything else that the package caches (encoded texts) begins empty.
SCRATCH = tempfile.TemporaryDirectory(prefix="jaxarch-tests-")
os.environ["JAXARCH_CACHE"] = SCRATCH.name

jaxtyping.install_import_hook("jaxarch", "beartype.beartype")

# The same examples every time: a failure seen once is seen again.
hypothesis.settings.register_profile("jaxarch", derandomize=True, max_examples=20, deadline=None, database=None)
hypothesis.settings.load_profile("jaxarch")

STARTED = time.monotonic()
BUDGET = float(os.environ.get("JAXARCH_TEST_SECONDS", "inf"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - STARTED > BUDGET:
        pytest.skip(f"not begun within JAXARCH_TEST_SECONDS={BUDGET:.0f}")
