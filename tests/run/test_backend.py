from __future__ import annotations

import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxarch.convolution import convolve
from jaxarch.run import backend

FAULTS = """
import resource
from jaxarch.run import backend
{before}
import jax, jax.numpy as jnp
{after}

@jax.jit
def program(x):  # the first product is a temporary of 64 MB
    return ((x @ jnp.ones((16, 16))) @ jnp.ones((16, 1))).sum()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

x = jnp.ones((2**20, 16))
print(sorted(faults() for _ in range(40))[10])
"""


def faults(before: str = "", after: str = "") -> int:
    """Pages faulted in by a call: the lower quartile of forty, since a heap that is kept settles slowly."""
    code = FAULTS.format(before=before, after=after)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_is_kept_until_room_is_needed():
    assert faults(before="backend.prepare()") < 1000
    assert faults() > 10_000
    assert faults(before="backend.prepare()", after="backend.make_room(2**50)") > 10_000


SIDE = 513  # of a product that is not small


def program(dtype, side=SIDE):
    return str(jax.make_jaxpr(lambda x: x @ x + 1)(jnp.ones((side, side), dtype)))


@pytest.mark.skipif(backend.platform() != "cpu", reason="options of the CPU")
def test_options_follow_what_the_program_holds():
    assert backend.compiler_options(program(jnp.float32)) == {}
    assert bool(backend.compiler_options(program(jnp.bfloat16))) == (jax.__version_info__ >= (0, 11))
    recomputed = str(jax.make_jaxpr(jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))))(1.0))
    assert bool(backend.compiler_options(recomputed)) == (jax.__version_info__ < (0, 11))


@pytest.mark.skipif(backend.platform() != "cpu", reason="options of the CPU")
def test_small_products_have_options_of_their_own():
    small = backend.compiler_options(program(jnp.float32, SIDE - 1))
    assert small["xla_cpu_prefer_vector_width"] == 512
    assert small["xla_cpu_copy_insertion_use_region_analysis"]
    behind = str(jax.make_jaxpr(lambda x: jax.lax.optimization_barrier(x.T) @ x)(jnp.ones((2, 2))))
    assert ("xla_disable_hlo_passes" in backend.compiler_options(behind)) == (jax.__version_info__ < (0, 11))
    # The largest of all counts, over a batch too; where there is none, nothing is chosen.
    together = str(jax.make_jaxpr(jax.vmap(lambda x: x @ x))(jnp.ones((2, SIDE - 1, SIDE - 1))))
    assert backend.compiler_options(together) == {}
    assert backend.compiler_options(str(jax.make_jaxpr(jnp.sin)(1.0))) == {}


@pytest.mark.skipif(backend.platform() != "cpu", reason="options of the CPU")
def test_convolutions_have_options_of_their_own():
    def convolved(x):
        return jax.lax.conv(x, x, (1, 1), "SAME")

    pictures = jnp.ones((1, 1, 4, 4))
    products = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    assert backend.compiler_options(str(jax.make_jaxpr(convolved)(pictures))) == products
    # A barrier around a convolution's operands must not be dropped, as jax before 0.11 drops it; one elsewhere may.
    behind = str(jax.make_jaxpr(lambda x: convolved(jax.lax.optimization_barrier(x)))(pictures))
    kept = {} if jax.__version_info__ >= (0, 11) else {"xla_disable_hlo_passes": "cse_barrier_expander"}
    assert backend.compiler_options(behind) == products | kept
    assert backend.compiler_options(str(jax.make_jaxpr(jax.lax.optimization_barrier)(pictures))) == {}
    # Those of bfloat16 products come before those of convolutions, where there are both.
    both = str(jax.make_jaxpr(lambda x: convolved(x)[0, 0] @ x[0, 0])(pictures.astype(jnp.bfloat16)))
    of_products = backend.compiler_options(program(jnp.bfloat16))
    assert backend.compiler_options(both) == products | of_products


def test_programs_are_compiled_with_their_options(monkeypatch):
    """An option that there is not is refused by the compiler: so it was given."""
    traced = jax.jit(lambda x: x + 1).trace(1.0)
    compiled, options = backend.compiled(traced)
    assert compiled(1.0) == 2 and options == {}
    monkeypatch.setattr(backend, "compiler_options", lambda program: {"no_such_option": "add" in program})
    with pytest.raises(Exception, match="no_such_option"):
        backend.compiled(traced)


def test_a_convolution_in_another_layout_is_slow_in_loops():
    """The weight gradient that autodiff writes; that of `convolve` is none."""

    def gradient(convolution):
        x, w = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 2))
        return str(jax.make_jaxpr(jax.grad(lambda w: jnp.sum(convolution(x, w))))(w))

    def plain(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert backend.slow_in_loops(gradient(plain))
    assert not backend.slow_in_loops(gradient(convolve))
    assert not backend.slow_in_loops(str(jax.make_jaxpr(jnp.sin)(1.0)))
