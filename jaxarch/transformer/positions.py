"""Where a token stands, as numbers to add, angles to turn by or a bias on logits. Tables of them are the modules'."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def packed_positions(segments: Int[Array | np.ndarray, "batch length"]) -> Int[Array, "batch length"]:
    """The position of each token in its own text, where texts lie one after another and differ in their numbers."""
    segments, slots = jnp.asarray(segments), jnp.arange(segments.shape[1])
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return slots - jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


# --- sines --------------------------------------------------------------------------------------


def sinusoidal(positions: Int[Array, "*batch"], dim: int, base: float = 10000.0) -> Float[Array, "*batch {dim}"]:
    """sin and cos of the position at `dim / 2` wavelengths, interleaved (Vaswani et al. 2017, sec. 3.5).

    dim: even.
    """
    angles = positions[..., None] * _frequencies(dim, base)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, dim)


# --- rotary -------------------------------------------------------------------------------------

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3"]
FAST_TURNS = {"yarn": 32.0, "llama3": 4.0}  # as published


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned by their position, in the words of the command line.

    Of the scalings, linear divides all frequencies (position interpolation, Chen et al. 2023). dynamic raises the base
    once a text is longer than `length` (dynamic NTK, Peng et al. 2023, sec. 3.1 and 3.3). yarn divides those that turn
    seldom within `length` and sharpens the attention (Peng et al. 2023, sec. 3.2 and 3.4); llama3 divides likewise
    (Llama 3.1, Grattafiori et al. 2024, and its published code).
    """

    base: float = 10000.0
    """the longest wavelength is 2 pi times this"""
    scaling: Scaling = "none"
    """how frequencies are lowered for texts longer than those of training"""
    factor: float = 1.0
    """by which they are divided, or how steeply dynamic goes: by about as much the texts may be longer"""
    length: int = 0
    """tokens of a text in training, before any scaling (linear needs none)"""
    fast_turns: float = 0.0
    """of yarn and llama3: turns within that length from which on a frequency is kept (0: 32 and 4)"""
    slow_turns: float = 1.0
    """of yarn and llama3: turns up to which it is divided by all of the factor"""
    attention_factor: float = 0.0
    """of yarn: of turned queries and keys, so that the logits have its square (0: 0.1 ln(factor) + 1)"""


def rotary_frequencies(
    dim: int, rotary: Rotary = Rotary(), length: int | Int[Array, "*rows"] = 0
) -> tuple[Float[Array, "*rows pairs"], float]:
    """Radians a position of each pair, base ** (-2 i / dim) scaled, and the factor of turned queries and keys.

    The factor is 1 except for yarn.

    dim: even; for dynamic above 2. length: tokens of the text at hand, which only dynamic asks for.
    """
    base, factor = rotary.base, rotary.factor
    fast, slow = rotary.fast_turns or FAST_TURNS.get(rotary.scaling, 0.0), rotary.slow_turns
    frequencies = _frequencies(dim, base)
    if rotary.scaling == "linear":
        return frequencies / factor, 1.0
    if rotary.scaling == "dynamic":
        # Beyond `length` even a factor of 1 raises the base, in the ratio of the lengths.
        ratio = jnp.maximum(jnp.asarray(length, jnp.float32) / rotary.length, 1.0)
        raised = base * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
        return _frequencies(dim, raised[..., None]), 1.0
    if rotary.scaling == "yarn":
        # The paper's ramp is linear in the turns, its code's in the pair's number, between whole numbers: weights were
        # trained with the code.
        low = max(math.floor(_pair_turning(fast, rotary.length, dim, base)), 0)
        high = min(math.ceil(_pair_turning(slow, rotary.length, dim, base)), dim - 1)
        kept = 1 - jnp.clip((jnp.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return _divided(frequencies, kept, factor), rotary.attention_factor or 0.1 * math.log(factor) + 1
    if rotary.scaling == "llama3":
        turns = rotary.length * frequencies / (2 * math.pi)
        kept = jnp.clip((turns - slow) / (fast - slow), 0, 1)
        return _divided(frequencies, kept, factor), 1.0
    return frequencies, 1.0


def rotary(
    x: Float[Array, "batch length heads dim"],
    positions: Int[Array, "#batch length"],
    frequencies: Float[Array, "*#rows pairs"],
    factor: float = 1.0,
) -> Float[Array, "batch length heads dim"]:
    """Turns pairs of features by position * frequency (Su et al. 2021, eq. 34), in float32, and multiplies by factor.

    Feature i is paired with i + dim / 2 (half-split, as in Llama's published weights; the paper pairs
    neighbours). dim: even.

    frequencies, factor: from `rotary_frequencies`; frequencies of all rows or of each.
    """
    # A rotation of both q and k by the same angle cancels in their product, so only the distance matters.
    angles = (positions[..., None] * frequencies[..., None, :])[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1:
        cos, sin = factor * cos, factor * sin
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(dim: int, base: float | Float[Array, "*rows 1"]) -> Float[Array, "*rows pairs"]:
    return base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _pair_turning(turns: float, length: int, dim: int, base: float) -> float:
    """The number, not whole, of the pair that turns this often within `length`."""
    return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))


def _divided(frequencies: Float[Array, "pairs"], kept: Float[Array, "pairs"], factor: float) -> Float[Array, "pairs"]:
    """Of each as much as is kept (0 to 1), and of the rest a part of `factor`."""
    return kept * frequencies + (1 - kept) * frequencies / factor


# --- biases on the attention's logits -----------------------------------------------------------


def alibi_slopes(heads: int) -> Float[Array, "{heads}"]:
    """2 ** (-8 i / heads) for head i = 1, 2, ... (Press et al. 2022, sec. 3).

    Heads that are no power of two have the slopes of the power below, then every other one of twice that power, as in
    the paper's code.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)] + [8 * i / (2 * power) for i in range(1, 2 * power, 2)]
    return 2.0 ** -jnp.asarray(exponents[:heads], jnp.float32)


def alibi(
    heads: int, positions: Int[Array, "#batch length"], key_positions: Int[Array, "#batch keys"]
) -> Float[Array, "#batch {heads} length keys"]:
    """The bias -slope * distance (ALiBi, Press et al. 2022, sec. 3), on both sides alike; a mask hides the future."""
    distances = jnp.abs(key_positions[:, None, None, :] - positions[:, None, :, None])
    return -alibi_slopes(heads)[:, None, None] * distances


def relative_buckets(
    relative: Int[Array, "*shape"], bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*shape"]:
    """The number in [0, buckets) of each key's position less the query's (Raffel et al. 2020, sec. 2.1, and its code).

    Distances share buckets the more, the greater they are: half of the buckets hold one distance each, the others
    grow by one ratio up to `max_distance`, and the last holds all from there on. Bidirectional, keys after the query
    have the upper half of the buckets; otherwise they are in bucket 0 with the query's own.

    Raises ValueError where the buckets are too few or the distance too short.
    """
    side = buckets // 2 if bidirectional else buckets
    single = side // 2
    if single < 1:
        raise ValueError(f"{buckets} buckets are too few; {4 if bidirectional else 2} would do.")
    if max_distance <= single:
        raise ValueError(f"max_distance {max_distance} is not above the {single} buckets of one distance each.")
    distances = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    # In whole numbers: rounded logarithms put distances at an edge into one bucket here, another there.
    grown = side - single
    edges = list(range(1, single + 1))  # the least distance of each bucket but the first
    for i in range(1, grown):
        bound = single ** (grown - i) * max_distance**i  # single * (max_distance / single) ** (i / grown), to the grown
        edges.append(next(d for d in range(edges[-1], max_distance + 1) if d**grown >= bound))
    numbers = jnp.searchsorted(jnp.asarray(edges), distances, side="right", method="compare_all")
    return numbers + side * (relative > 0) if bidirectional else numbers
