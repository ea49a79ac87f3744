"""Attention as modules: they own the projections and call `jaxarch.attention`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxarch.attention import attention, attention_weights
from jaxarch.attention.cache import KeyValues, append, padding_bias
from jaxarch.run.mesh import BATCH, current, divisors, present, size_of
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import Context
from jaxarch.transformer.layers import DEFAULT_INIT, Dense
from jaxarch.transformer.positions import Rotary, alibi, rotary, rotary_frequencies

PROJECTIONS = ("query", "key", "value", "out")


class SelfAttention(nn.Module):
    """Self-attention (Vaswani et al. 2017, sec. 3.2.2) with grouped queries (Ainslie et al. 2023).

    The projections are apart, not fused: published weights, orthogonalised updates and a cut by heads
    all want each matrix on its own.

    causal, window, scale, soft_cap: of `jaxarch.attention.attention`. rotary: None for none.
    alibi: a bias against distance.
    qk_norm: makes the norm of each head's queries and keys (Henry et al. 2020); None for none.
    biases: those of the projections, by `PROJECTIONS`, that have one.
    """

    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    rotary: Rotary | None = None
    alibi: bool = False
    qk_norm: Callable[..., nn.Module] | None = None
    biases: tuple[str, ...] = ()
    out_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length dim"], context: Context, past: KeyValues | None = None
    ) -> tuple[Float[Array, "batch length dim"], KeyValues | None]:
        """The output, and `past` with this call's keys and values written from slot `context.index` on."""
        positions, index, start = context.positions, context.index, context.start
        q, k, v = (
            _project(self, x, heads, name)
            for heads, name in ((self.heads, "query"), (self.kv_heads, "key"), (self.kv_heads, "value"))
        )
        if self.qk_norm is not None:
            q, k = self.qk_norm(name="query_norm")(q), self.qk_norm(name="key_norm")(k)
        # Frequencies that follow the length would leave turned keys behind: the cache holds them as they were, and
        # each call turns them all (Peng et al. 2023, sec. 3.3). Even so the tokens of before have been through their
        # layers with the frequencies of their time, as they would not in one pass over the longer text.
        late = self.rotary is not None and self.rotary.scaling == "dynamic"
        turn = None
        if self.rotary is not None:
            length = positions.max(axis=-1) + 1 if late else 0
            turn = rotary_frequencies(self.head_dim, self.rotary, length)
            q, k = rotary(q, positions, *turn), k if late else rotary(k, positions, *turn)
        biases = [] if context.bias is None else [context.bias]
        key_positions = positions
        if past is not None:
            past = append(past, k, v, index)
            k, v = (entry.swapaxes(1, 2) for entry in past)
            key_positions = jnp.arange(k.shape[1])[None] - (0 if start is None else start[:, None])
            if start is not None:
                biases.append(padding_bias(k.shape[1], start))
        if turn is not None and late:
            k = rotary(k, key_positions, *turn)
        if self.alibi:
            biases.append(alibi(self.heads, positions, key_positions))
        y = _attend(
            self,
            (q, k, v),
            (context.segments, context.segments),
            causal=self.causal,
            window=self.window,
            soft_cap=self.soft_cap,
            q_offset=index,
            bias=functools.reduce(jnp.add, biases) if biases else None,
        )
        return Dense(x.shape[-1], "out" in self.biases, self.out_init, name="out")(y), past


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to an encoder's output (Vaswani et al. 2017, sec. 3.2.3).

    scale, biases: as of `SelfAttention`.
    """

    heads: int
    head_dim: int
    scale: float | None = None
    biases: tuple[str, ...] = ()
    out_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length dim"], context: Context, memory: KeyValues | None = None
    ) -> tuple[Float[Array, "batch length dim"], KeyValues]:
        """The output, and the keys and values of the encoder's output, which the next call takes as `memory`."""
        q = _project(self, x, self.heads, "query")
        if memory is None:
            if context.memory is None:
                raise ValueError("cross-attention needs an encoder's output in context.memory.")
            k, v = (_project(self, context.memory, self.heads, name) for name in ("key", "value"))
            memory = KeyValues(k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            k, v = (entry.swapaxes(1, 2) for entry in memory)
        own, others = context.segments, context.memory_segments
        if own is None and others is not None:
            own = jnp.ones(x.shape[:2], others.dtype)
        y = _attend(self, (q, k, v), (own, others))
        return Dense(x.shape[-1], "out" in self.biases, self.out_init, name="out")(y), memory


def _project(
    module: SelfAttention | CrossAttention, x: Float[Array, "batch length dim"], heads: int, name: str
) -> Float[Array, "batch length heads head_dim"]:
    y = Dense(heads * module.head_dim, name in module.biases, name=name)(x)
    return y.reshape(*x.shape[:2], heads, module.head_dim)


def _attend(
    module: SelfAttention | CrossAttention,
    arrays: tuple[Array, Array, Array],
    segments: tuple[Array | None, Array | None],
    **options: Any,
) -> Float[Array, "batch length features"]:
    """The heads' outputs side by side; their weights are kept where the collection `intermediates` is asked for."""
    q, k, v = arrays
    options |= {"scale": module.scale}
    if module.is_mutable_collection("intermediates"):
        given = {"q_segments": segments[0], "kv_segments": segments[1]}
        module.put_variable("intermediates", "weights", attention_weights(q, k, **given, **options))
    return spread(q, k, v, *segments, **options).reshape(*q.shape[:2], -1)


def spread(
    q: Float[Array, "batch length heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads width"],
    q_segments: Int[Array, "batch length"] | None = None,
    kv_segments: Int[Array, "batch keys"] | None = None,
    bias: Float[Array, "#batch #heads #length #keys"] | None = None,
    **options: Any,
) -> Float[Array, "batch length heads width"]:
    """`jaxarch.attention.attention`; on a mesh of devices each has its examples and heads, and where positions are cut
    (`context`) keys and values go round.

    Raises ConfigError where the mesh does not fit the heads, or positions are cut that cannot be.
    """
    mesh = current()
    options |= {"bias": bias, "q_segments": q_segments, "kv_segments": kv_segments}
    if mesh is None:
        return cast(Array, attention(q, k, v, **options))
    tensor = size_of("tensor")
    for what, count in (("heads", q.shape[2]), ("heads of keys", k.shape[2])):
        if count % tensor:
            raise ConfigError(
                f"--mesh tensor={tensor} does not divide the model's {count} {what}; {divisors(count)} would."
            )
    # What is evaluated or initialised may be of a size that is not cut: then each device has all of it.
    rows = present(BATCH, mesh) if q.shape[0] % size_of(BATCH) == 0 else None
    heads, ring = present("tensor", mesh), None
    if q.shape[1] == k.shape[1] and q.shape[1] % size_of("context") == 0:
        ring = cast(str | None, present("context", mesh))
    if ring is not None and bias is not None:
        raise ConfigError("--mesh context: ring attention takes no bias (of ALiBi, T5 or padding).")
    if ring is not None and options.get("causal") and q.shape[1] % (2 * size_of(ring)):
        raise ConfigError(
            f"--mesh context={size_of(ring)}: each device takes an early and a late part of the positions, and "
            f"{q.shape[1]} are not {2 * size_of(ring)} equal parts."
        )
    whole = PartitionSpec(rows, ring, heads)
    numbers = None if q_segments is None else PartitionSpec(rows, ring)
    cut_bias = None
    if bias is not None:
        cut_bias = PartitionSpec(rows if bias.shape[0] > 1 else None, heads if bias.shape[1] > 1 else None)

    def own(q: Array, k: Array, v: Array, q_segments: Any, kv_segments: Any, bias: Any) -> Array:
        given = {**options, "q_segments": q_segments, "kv_segments": kv_segments, "bias": bias}
        return cast(Array, attention(q, k, v, axis=ring, **given))

    cut = (whole, whole, whole, numbers, numbers, cut_bias)
    over = jax.shard_map(own, in_specs=cut, out_specs=whole, check_vma=False)
    return over(q, k, v, q_segments, kv_segments, bias)
