"""Networks that remember what was observed earlier in an episode: a GRU, and a gated Transformer.

Each maps `(features [time, envs, ...], memory, first [time, envs]) -> (features [time, envs, width], memory)`, where
`first` says that a step begins an episode: nothing from before it is remembered. A sequence at once is the same as its
steps one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxarch.rl.agent import Memory
from jaxarch.run import ConfigError, check_least

Steps = Float[Array, "time envs features"]
Found = Float[Array, "time envs width"]
Firsts = Bool[Array, "time envs"]


@dataclass(frozen=True)
class MemoryConfig:
    kind: Literal["none", "gru", "transformer"] = "gru"
    """what remembers: nothing, a gated recurrent unit, or a gated Transformer"""
    width: int = 64
    """features remembered a step"""
    layers: int = 2
    """blocks of the Transformer"""
    heads: int = 4
    """of its attention"""
    context: int = 32
    """steps back that a block sees; each looks so far back again from what the one below has seen"""

    def __post_init__(self) -> None:
        check_least(self, ("width", "layers", "heads", "context"), 1, "agent.memory.")
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"--agent.memory.width {self.width} is not a multiple of twice --agent.memory.heads {self.heads}."
            )


def remembering(config: MemoryConfig) -> nn.Module:
    if config.kind == "transformer":
        return GatedTransformer(config.width, config.layers, config.heads, config.context)
    return GRU(config.width) if config.kind == "gru" else Nothing()


def nothing_remembered(config: MemoryConfig, envs: int) -> Memory:
    if config.kind == "gru":
        return jnp.zeros((envs, config.width))
    if config.kind == "transformer":
        inputs = jnp.zeros((envs, config.layers, config.context, config.width))
        return Window(inputs, jnp.zeros((envs, config.context), bool))
    return ()


class Nothing(nn.Module):
    def __call__(self, x: Steps, memory: Memory, first: Firsts) -> tuple[Found, Memory]:
        return x, memory


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al. 2014)."""

    width: int

    @nn.compact
    def __call__(self, x: Steps, memory: Memory, first: Firsts) -> tuple[Found, Memory]:
        def step(cell: nn.GRUCell, carried: Array, seen: tuple[Array, Array]) -> tuple[Array, Array]:
            x, first = seen
            return cell(jnp.where(first[:, None], 0.0, carried), x)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        memory, found = scan(nn.GRUCell(self.width, name="cell"), memory, (x, first))
        return found, memory


# --- the gated Transformer ------------------------------------------------------------------------


class Window(NamedTuple):
    """What went into each block at the last steps, and which of them are of the episode under way."""

    inputs: Float[Array, "envs layers context width"]
    valid: Bool[Array, "envs context"]


class GatedTransformer(nn.Module):
    """GTrXL (Parisotto et al. 2020): layers of a Transformer-XL, normalised before, joined by gates."""

    width: int
    layers: int
    heads: int
    context: int

    @nn.compact
    def __call__(self, x: Steps, memory: Memory, first: Firsts) -> tuple[Found, Memory]:
        x = jnp.moveaxis(nn.Dense(self.width, name="embed")(x), 1, 0)  # [envs, time, width]
        seen = visible(memory.valid, first, self.context)
        inputs = []
        for layer in range(self.layers):
            inputs.append(x)
            x = Block(self.heads, self.context, name=f"block_{layer}")(x, memory.inputs[:, layer], seen)
        kept = jnp.concatenate([memory.inputs, jnp.stack(inputs, axis=1)], axis=2)[:, :, -self.context :]
        number = jnp.cumsum(first, axis=0).T
        same = jnp.concatenate([memory.valid & (number[:, -1:] == 0), number == number[:, -1:]], axis=1)
        return jnp.moveaxis(x, 1, 0), Window(kept, same[:, -self.context :])


def visible(
    valid: Bool[Array, "envs context"], first: Firsts, context: int
) -> Bool[Array, "envs time context_and_time"]:
    """What each step sees of the window and the steps themselves: at most `context` steps back, of its own episode."""
    time = len(first)
    number = jnp.cumsum(first, axis=0).T  # of the episode; 0: the one that was under way
    episode = jnp.concatenate([jnp.where(valid, 0, -1), number], axis=1)
    back = distance(time, context)
    return (episode[:, None, :] == number[:, :, None]) & (back >= 0) & (back <= context)


def distance(time: int, context: int) -> np.ndarray:
    """Steps from each of the window and the sequence to each of the sequence, `[time, context + time]`."""
    return context + np.arange(time)[:, None] - np.arange(context + time)[None, :]


class Block(nn.Module):
    """Attention, then a layer of units, each behind a gate (Parisotto et al. 2020, sec. 3.2, eq. 6 and 7)."""

    heads: int
    context: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "envs time width"],
        window: Float[Array, "envs context width"],
        seen: Bool[Array, "envs time context_and_time"],
    ) -> Float[Array, "envs time width"]:
        width = x.shape[-1]
        norm = nn.LayerNorm(name="before_attention")
        found = Attention(self.heads, self.context, name="attention")(
            norm(x), norm(jnp.concatenate([window, x], axis=1)), seen
        )
        x = Gate(name="gate_attention")(x, nn.relu(found))
        hidden = nn.relu(nn.Dense(2 * width, name="up")(nn.LayerNorm(name="before_units")(x)))
        return Gate(name="gate_units")(x, nn.relu(nn.Dense(width, name="down")(hidden)))


class Attention(nn.Module):
    """Attention by content and by distance (Dai et al. 2019, sec. 3.3): no step has a place of its own, so that a
    memory may move along.
    """

    heads: int
    context: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "envs time width"],
        others: Float[Array, "envs context_and_time width"],
        seen: Bool[Array, "envs time context_and_time"],
    ) -> Float[Array, "envs time width"]:
        time, width = x.shape[1:]
        size = width // self.heads
        split = {"features": (self.heads, size), "use_bias": False}
        queries = nn.DenseGeneral(**split, name="query")(x)
        keys = nn.DenseGeneral(**split, name="key")(others)
        values = nn.DenseGeneral(**split, name="value")(others)
        places = nn.DenseGeneral(**split, name="place")(sinusoids(self.context + 1, width))
        content, place = (
            self.param(name, nn.initializers.zeros, (self.heads, size)) for name in ("content_bias", "place_bias")
        )
        by_content = jnp.einsum("ethd,eshd->ehts", queries + content, keys)
        by_distance = jnp.einsum("ethd,khd->ehtk", queries + place, places)
        back = np.clip(distance(time, self.context), 0, self.context)
        by_place = by_distance[:, :, np.arange(time)[:, None], back]
        scores = (by_content + by_place) / np.sqrt(size)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        found = jnp.einsum("ehts,eshd->ethd", weights, values)
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(found)


def sinusoids(count: int, width: int) -> Float[np.ndarray, "count width"]:
    """Of the numbers `0 ... count - 1` (Vaswani et al. 2017, sec. 3.5)."""
    angles = np.arange(count)[:, None] / 10_000 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


class Gate(nn.Module):
    """Joins a layer's output to what went in as a GRU would (Parisotto et al. 2020, sec. 3.2). At first it lets little
    through, so that a policy without memory is learned before one with it.
    """

    bias: float = 2.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch width"], y: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch width"]:
        def mixed(name: str, x: Array) -> Array:
            from_layer = nn.Dense(x.shape[-1], use_bias=False, name=f"{name}_layer")(y)
            return from_layer + nn.Dense(x.shape[-1], use_bias=False, name=f"{name}_input")(x)

        reset = nn.sigmoid(mixed("reset", x))
        bias = self.param("bias", nn.initializers.constant(self.bias), (x.shape[-1],))
        update = nn.sigmoid(mixed("update", x) - bias)
        return (1 - update) * x + update * jnp.tanh(mixed("found", reset * x))
