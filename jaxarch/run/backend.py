"""What the machine needs, chosen in one place by platform: compiler options, caches, versions."""

from __future__ import annotations

import ctypes
import os
import platform as host
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# mallopt(3): no mmap for large blocks, never trim the heap, one arena for all threads.
MALLOC_PARAMETERS = {-4: 0, -1: 2**31 - 1, -8: 1}


def platform() -> str:
    return jax.default_backend()


def compiler_options() -> dict[str, str | bool] | None:
    """Options for every program of a run; None leaves the compiler its own."""
    return None


def cache_folder() -> Path:
    """Where compiled programs and encoded texts are kept: `JAXARCH_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxarch"
    return Path(os.environ.get("JAXARCH_CACHE") or default)


def prepare() -> None:
    """To be called once, before the first computation.

    Keeps compiled programs between runs, unless the user has chosen a place of their own. On CPU it keeps
    freed memory too: a program's temporaries are allocated anew at each call, and glibc gives large ones
    back to the system, so that every page of them is faulted in again, at half the time of a small step.
    """
    if platform() == "cpu" and host.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in MALLOC_PARAMETERS.items():
            libc.mallopt(parameter, value)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it is only a cache
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def environment() -> dict[str, object]:
    """Versions, devices and the commit, for `config.json` and for every benchmark's record."""
    devices = jax.devices()
    return {
        "python": host.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in devices],
        "processor": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return host.processor() or host.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), host.machine())


def commit() -> str | None:
    """The commit of the code, with `+` where files differ from it; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
