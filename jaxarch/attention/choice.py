"""The implementations: what each has, where it runs, and which of them auto takes."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxarch.attention.blocks import blocks_attention
from jaxarch.attention.blockwise import blockwise_attention
from jaxarch.attention.cudnn import cudnn_attention, misfit
from jaxarch.attention.dense import dense_attention
from jaxarch.attention.ring import ring_attention
from jaxarch.attention.splash import LANES, splash_attention
from jaxarch.attention.window import window_attention

EVERY = frozenset({
    "causal", "window", "q_offset", "q_segments", "kv_start", "kv_length", "bias", "soft_cap", "sinks", "dropout",
    "return_lse",
})  # fmt: skip
BLOCKS_LENGTH = 1024  # up to which auto keeps the weights of causal self-attention, rather than make them twice
DENSE_WEIGHTS = 2**20  # a head's, up to which auto takes dense
WINDOWS = 4  # in a sequence, from which on auto takes window


class Kind(NamedTuple):
    """An implementation. function: `(q, k, v, options) -> (out, lse)`, or `out` alone where it lacks return_lse.

    has, needs: names of options, as of `attention`. self_attention: it is for as many keys as queries. types: of the
    numbers that it takes; empty for all. runs_on: the one `platform()` where it runs, and what it is called.
    """

    function: Callable[..., Any]
    has: Set[str]
    needs: Set[str] = frozenset()
    self_attention: bool = False
    types: tuple[str, ...] = ()
    runs_on: tuple[str, str] | None = None


KINDS = {
    "dense": Kind(dense_attention, EVERY),
    "blockwise": Kind(blockwise_attention, EVERY),
    "blocks": Kind(blocks_attention, {"causal"}, needs={"causal"}, self_attention=True),
    "window": Kind(window_attention, EVERY - {"q_offset", "bias", "dropout"}, needs={"window"}, self_attention=True),
    "ring": Kind(
        ring_attention, {"causal", "window", "q_segments", "soft_cap", "sinks", "return_lse", "axis"},
        needs={"axis"}, self_attention=True,
    ),
    "cudnn": Kind(
        cudnn_attention, {"causal", "window", "kv_length"}, types=("float16", "bfloat16"),
        runs_on=("cuda", "NVIDIA GPUs, Ampere and later"),
    ),
    "splash": Kind(
        splash_attention, EVERY - {"q_offset", "bias", "dropout", "return_lse"}, types=("float32", "bfloat16"),
        runs_on=("tpu", "TPUs"),
    ),
}  # fmt: skip
# What auto takes on a platform that has one, where it fits.
FUSED = {kind.runs_on[0]: name for name, kind in KINDS.items() if kind.runs_on is not None}


def platform() -> str:
    """Of the device that computes: cpu, tpu, cuda for an NVIDIA GPU of Ampere and later, gpu for others."""
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    generation = str(getattr(device, "compute_capability", "")).partition(".")[0]  # AMD's is no number
    return "cuda" if generation.isdigit() and int(generation) >= 8 else device.platform


def unfit(
    name: str,
    length: int,
    keys: int,
    on: Set[str],
    *,
    dims: tuple[int, int] = (64, 64),
    dtype: DTypeLike = jnp.float32,
    here: str | None = None,
) -> str | None:
    """Why this implementation cannot do this; None where it can.

    on: the options in use, as `attention` names them. dims: of a head's keys and of its values. here: `platform()`.
    """
    if name not in KINDS:
        return f"there is no implementation {name!r}: {', '.join(KINDS)}"
    kind, given = KINDS[name], jnp.dtype(dtype).name
    if kind.runs_on is not None and (here or platform()) != kind.runs_on[0]:
        return f"{name} runs on {kind.runs_on[1]}; here is {here or platform()}"
    if on - kind.has:
        return f"{name} lacks {', '.join(sorted(on - kind.has))}"
    if kind.needs - on:
        return f"{name} needs {', '.join(sorted(kind.needs - on))}"
    if kind.self_attention and length != keys:
        return f"{name} is for as many keys as queries, not for {keys} and {length}"
    if kind.types and given not in kind.types:
        return f"{name} takes {' and '.join(kind.types)}, not {given}"
    if name == "cudnn":
        return misfit(length, keys, on, dims)
    if name == "splash" and length < LANES:
        return f"splash fills blocks of {LANES} queries, and here are {length}"
    return None


def chosen(
    length: int,
    keys: int,
    on: Set[str],
    window: int | None = None,
    *,
    dims: tuple[int, int] = (64, 64),
    dtype: DTypeLike = jnp.float32,
    here: str | None = None,
) -> str:
    """What auto takes for this many queries and keys with these options in use; the arguments are those of `unfit`."""
    if "axis" in on:
        return "ring"
    order = ["dense", "blockwise"] if length * keys <= DENSE_WEIGHTS else ["blockwise"]
    if length <= BLOCKS_LENGTH:
        order.insert(0, "blocks")
    if window is not None and length >= WINDOWS * window:
        order.insert(0, "window")
    here = here or platform()
    if here in FUSED:
        order.insert(0, FUSED[here])
    return next(name for name in order if unfit(name, length, keys, on, dims=dims, dtype=dtype, here=here) is None)


def passed_over(
    name: str, length: int, keys: int, on: Set[str], *, dims: tuple[int, int], dtype: DTypeLike
) -> str | None:
    """Why the platform's own kernel was not taken; None where it was, or there is none."""
    fused = FUSED.get(platform(), name)
    return None if fused == name else unfit(fused, length, keys, on, dims=dims, dtype=dtype)
