"""Rotary positions in config.json, in both directions.

transformers 5 says them in `rope_parameters`, 4 in `rope_scaling` beside `rope_theta`.
"""

from __future__ import annotations

import math
from typing import Any

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.positions import FAST_TURNS, Rotary
from jaxarch.transformer.pretrained.family import Settings, entry, must_be

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rotary(settings: Settings) -> Rotary:
    """Raises ConfigError for what a `Rotary` cannot say."""
    name = "rope_scaling" if settings.get("rope_scaling") else "rope_parameters"  # which transformers takes of both
    rope: Any = settings.get(name) or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{name} is {rope!r}, not an object.")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"{name} {', '.join(rope)} cannot be expressed here, only one rotation for all layers.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise ConfigError(f"{name} {kind} cannot be expressed here, only {', '.join(KINDS)}.")
    must_be({**settings, **rope}, "partial_rotary_factor", 1.0)
    base = entry({**settings, **rope}, "rope_theta", float, 10000.0)
    if kind == "default":
        return Rotary(base)
    longest = entry(settings, "max_position_embeddings", int)
    if kind == "dynamic":
        return Rotary(base, kind, entry(rope, "factor", float), longest)
    if kind == "linear":
        return Rotary(base, kind, entry(rope, "factor", float))
    length = entry({**rope, **settings}, "original_max_position_embeddings", int, longest)
    if kind == "llama3":
        fast, slow = entry(rope, "high_freq_factor", float), entry(rope, "low_freq_factor", float)
        return Rotary(base, kind, entry(rope, "factor", float), length, fast, slow)
    must_be(rope, "truncate", True)
    factor = entry(rope, "factor", float, longest / length)
    sharpened, whole = (entry(rope, one, float, 0.0) for one in ("mscale", "mscale_all_dim"))
    ratio = (0.1 * sharpened * math.log(factor) + 1) / (0.1 * whole * math.log(factor) + 1)
    return Rotary(
        base,
        "yarn",
        factor,
        length,
        entry(rope, "beta_fast", float, 0.0),
        entry(rope, "beta_slow", float, 0.0) or 1.0,
        entry(rope, "attention_factor", float, ratio if sharpened and whole else 0.0),
    )


def write_rotary(rotary: Rotary, length: int) -> dict[str, Any]:
    """With `max_position_embeddings`, which is the model's `length` where the rotation does not ask for another."""
    rope: dict[str, Any] = {"rope_type": "default" if rotary.scaling == "none" else rotary.scaling}
    if rotary.scaling != "none":
        rope["factor"] = rotary.factor
    if rotary.scaling in FAST_TURNS:
        rope["original_max_position_embeddings"] = rotary.length
        names = ("beta_fast", "beta_slow") if rotary.scaling == "yarn" else ("high_freq_factor", "low_freq_factor")
        turns = rotary.fast_turns or FAST_TURNS[rotary.scaling], rotary.slow_turns
        rope |= dict(zip(names, turns, strict=True))
    if rotary.scaling == "yarn" and rotary.attention_factor:
        rope["attention_factor"] = rotary.attention_factor
    return {
        "max_position_embeddings": rotary.length if rotary.scaling == "dynamic" else length,
        "rope_theta": rotary.base,
        "rope_scaling": None if rotary.scaling == "none" else rope,
        "rope_parameters": {**rope, "rope_theta": rotary.base},
    }
