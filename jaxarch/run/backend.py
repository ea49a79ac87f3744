"""What the machine needs, chosen in one place by platform: compiler options, caches, versions."""

from __future__ import annotations

import ctypes
import math
import os
import platform as host
import re
import subprocess
import warnings
from importlib.metadata import version
from pathlib import Path

import jax

SMALL = 1 << 18  # numbers in the result of a product that is small
# Of a convolution's operands and result: batch first, channels last; the kernel's input and output features last.
LAYOUT = r"lhs_spec=\(0, 3, 1, 2\), rhs_spec=\(3, 2, 0, 1\), out_spec=\(0, 3, 1, 2\)"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# mallopt(3): no mmap for large blocks, the heap trimmed above 2 GB only, one arena for all threads.
KEEP_MEMORY = {-4: 0, -1: 2**31 - 1, -8: 1}
# Blocks from 32 MB on by mmap again, as by default.
GIVE_BACK = {-4: 65536, -3: 2**25}


def platform() -> str:
    return jax.default_backend()


def compiler_options(program: str) -> dict[str, str | bool | int]:
    """Options for a program, given the text of its jaxpr: empty where the compiler's own are best."""
    options: dict[str, str | bool | int] = {}
    if platform() == "cpu":
        new = jax.__version_info__ >= (0, 11)
        convolves = "conv_general_dilated[" in program
        if convolves:
            # Products by YNNPACK, convolutions by Eigen: gradients of convolutions are up to twice as fast.
            options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
        small = not convolves and 0 < _largest_product(program) <= SMALL
        if small:
            # Networks of reinforcement learning and the like: a tenth faster with each of the two (512 bits are what
            # the processor has, the compiler's own choice is 256).
            options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
            options["xla_cpu_prefer_vector_width"] = 512
            # In a loop of many small steps copies are a part of the time: a fifteenth without those that this finds
            # to be needless.
            options["xla_cpu_copy_insertion_use_region_analysis"] = True
        if new and re.search(r"bf16\[[\d,]*\] = dot_general", program):
            # Half again to twice as fast for bfloat16; before 0.11 slower.
            options |= {"xla_cpu_experimental_onednn_custom_call": True, "xla_cpu_experimental_ynn_fusion_type": ""}
        if not new and (" = remat2[" in program or ((convolves or small) and "optimization_barrier" in program)):
            # Else the barriers around what is recomputed are dropped before common subexpressions are, and those
            # around a convolution's operands before their transposes join the arithmetic that they come from.
            options |= {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return options


def _largest_product(program: str) -> int:
    """Numbers in the largest result of a product in the text of a jaxpr."""
    shapes = re.findall(r"[a-z]\w*\[([\d,]*)\] = dot_general\[", program)
    return max((math.prod(int(size) for size in shape.split(",") if size) for shape in shapes), default=0)


def compiled(traced: jax.stages.Traced) -> tuple[jax.stages.Compiled, dict[str, str | bool | int]]:
    """A traced program with the options of `compiler_options`, and these."""
    options = compiler_options(str(traced.jaxpr))
    return traced.lower().compile(compiler_options=options), options


def slow_in_loops(program: str) -> bool:
    """Whether a program, given the text of its jaxpr, has a convolution that XLA:CPU runs 40 to 100 times slower inside
    a loop's body: one in another layout than `LAYOUT`, as the weight gradients that autodiff writes are.

    `jaxarch.convolution` writes all in that layout.
    """
    return len(re.findall(r"conv_general_dilated\[", program)) > len(re.findall(LAYOUT, program))


def slow_transposed() -> bool:
    """Whether one row's float32 product with a transposed matrix becomes a loop over single numbers.

    So it does on XLA:CPU from jax 0.11 on, at a tenth of the speed of the same sums.
    """
    return platform() == "cpu" and jax.__version_info__ >= (0, 11)


def converts_in_products() -> bool:
    """Whether one row's product with a transposed matrix reads it in bfloat16 where it is to be in float32.

    So it does on XLA:CPU before jax 0.11, at twice the speed of float32; elsewhere the matrix is converted first.
    """
    return platform() == "cpu" and jax.__version_info__ < (0, 11)


def cache_folder() -> Path:
    """Where compiled programs and encoded texts are kept: `JAXARCH_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxarch"
    return Path(os.environ.get("JAXARCH_CACHE") or default)


def prepare() -> bool:
    """To be called once, before the first computation and before anything asks for a device.

    Whether freed memory is kept.

    Keeps compiled programs between runs, unless the user has chosen a place of their own. Keeps freed memory
    too: on CPU a program's temporaries are allocated anew at each call, and glibc gives large ones back to the
    system, so that every page of them is faulted in again, at up to half the time of a step. A device's threads
    once started have arenas of their own, for which none of this holds.
    """
    keeps = _mallopt(KEEP_MEMORY)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it is only a cache
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    return keeps


def make_room(temporaries: int) -> bool:
    """Gives freed memory back to the system from now on, if a program with this many bytes of temporaries is large.

    Whether it does. A heap that is kept splits, and may grow to several times the temporaries: affordable for
    small ones only.
    """
    large = temporaries > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 16
    return large and _mallopt(GIVE_BACK)


def _mallopt(parameters: dict[int, int]) -> bool:
    """Whether the allocator is glibc's, which takes them."""
    if host.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return min(libc.mallopt(parameter, value) for parameter, value in parameters.items()) == 1


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
