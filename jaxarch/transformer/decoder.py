"""The decoder-only Transformer, composed: blocks are handed the makers of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxarch.attention.cache import Cache, empty_cache, next_positions
from jaxarch.attention.cost import flops, projection_flops, visible_pairs
from jaxarch.run.protocol import ConfigError, check_least
from jaxarch.transformer.attention import PROJECTIONS, SelfAttention
from jaxarch.transformer.blocks import Block, Context, Depth, MakeModule, stack
from jaxarch.transformer.layers import (
    Activation,
    Dense,
    Embedding,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    RMSNorm,
    gelu,
    squared_relu,
)
from jaxarch.transformer.layout import residual, scores
from jaxarch.transformer.positions import FAST_TURNS, Rotary, sinusoidal

GATED: dict[str, Activation] = {"swiglu": jax.nn.silu, "geglu": gelu}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, in the words of the command line. Raises ConfigError where the numbers do not fit."""

    layers: int = 4
    heads: int = 4
    dim: int = 128
    """width of the residual stream"""
    kv_heads: int = 0
    """heads of keys and values, each shared by a group of query heads (0: as many as heads)"""
    head_width: int = 0
    """of each head (0: dim / heads)"""
    window: tuple[int, ...] = (0,)
    """keys that a query sees, itself among them (0: all of the past); of several, layers take theirs in turn"""
    mlp: Literal["gelu", "relu2", "swiglu", "geglu"] = "gelu"
    """kind of feed-forward layer"""
    mlp_dim: int = 0
    """its hidden width (0: 4 dim; for swiglu and geglu 8/3 dim, rounded up to a multiple of 64)"""
    norm: Literal["layer", "rms", "zero_centered_rms"] = "layer"
    """zero-centered: the scale is 1 + its parameter"""
    placement: Literal["pre", "both"] = "pre"
    """of the norms: before each attention and feed-forward layer, or before and after"""
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"
    rotary: Rotary = Rotary()
    scale_embedding: bool = False
    """multiply the tokens' embedding by sqrt(dim)"""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys"""
    soft_cap: float = 0.0
    """keeps the output's logits within plus and minus this (0: off)"""
    attention_scale: float = 0.0
    """of the attention's logits (0: 1 / sqrt(width of a head))"""
    attention_soft_cap: float = 0.0
    """keeps the attention's logits within plus and minus this (0: off)"""
    tied: bool = True
    """read out with the embedding of the tokens"""
    bias: bool = False
    """biases in dense layers and LayerNorm"""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """biases in the attention alone: of queries, keys and values, or of all its projections"""
    eps: float = 1e-5
    """of the norms"""
    dropout: float = 0.0
    """of the embedding and of what each attention and feed-forward layer adds"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """compile one layer and loop over it: compiles deep stacks sooner, runs slower on CPU"""

    def __post_init__(self) -> None:
        check_least(self, ("layers", "heads", "dim"), 1, "model.")
        for name in ("kv_heads", "head_width", "mlp_dim", "soft_cap", "attention_scale", "attention_soft_cap"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--model.{option} {getattr(self, name):g} is below 0; 0 is the default.")
        if not self.head_width and self.dim % self.heads:
            near = _near_divisors(self.dim, self.heads)
            raise ConfigError(f"--model.heads {self.heads} does not divide --model.dim {self.dim}; {near} would.")
        if self.kv_heads and self.heads % self.kv_heads:
            near = _near_divisors(self.heads, self.kv_heads)
            raise ConfigError(
                f"--model.kv-heads {self.kv_heads} does not divide --model.heads {self.heads}; {near} would."
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise ConfigError(
                f"--model.positions rotary needs heads of even width, not --model.head-width {self.head_width}; "
                f"{self.head_width + 1} would do."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"--model.positions rotary needs heads of even width, not --model.dim {self.dim} / "
                f"--model.heads {self.heads} = {self.head_dim}; "
                f"--model.dim {self.heads * (self.head_dim + 1)} would do."
            )
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ConfigError(
                f"--model.dim {self.dim} is odd, but --model.positions sinusoidal needs pairs; "
                f"--model.dim {self.dim + 1} would do."
            )
        if not self.window or min(self.window) < 0:
            raise ConfigError(f"--model.window {_spaced(self.window)} is no number of keys; 0 is all of the past.")
        if self.scan_layers and len(self.windows) > 1:
            raise ConfigError(
                f"--model.scan-layers compiles one kind of layer, but --model.window {_spaced(self.window)} makes "
                f"{len(self.windows)}."
            )
        if self.rotary.base <= 1:
            raise ConfigError(f"--model.rotary.base {self.rotary.base:g} is not above 1; 10000 is usual.")
        if self.rotary.scaling != "none":
            self._check_scaling()
        if self.eps <= 0:
            raise ConfigError(f"--model.eps {self.eps:g} is not above 0; 1e-5 is usual.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1); 0.1 is usual.")

    def _check_scaling(self) -> None:
        rotary, kind = self.rotary, self.rotary.scaling
        if self.positions != "rotary":
            raise ConfigError(f"--model.rotary.scaling {kind} needs --model.positions rotary, not {self.positions}.")
        if rotary.factor < 1:
            raise ConfigError(f"--model.rotary.factor {rotary.factor:g} is below 1, which leaves all as it is.")
        if kind != "linear" and rotary.length < 1:
            raise ConfigError(
                f"--model.rotary.scaling {kind} needs --model.rotary.length, the tokens of a text in training, "
                f"not {rotary.length}; 8192 is Llama 3's."
            )
        fast = rotary.fast_turns or FAST_TURNS.get(kind)
        if fast is not None and not fast > rotary.slow_turns > 0:
            raise ConfigError(
                f"--model.rotary.slow-turns {rotary.slow_turns:g} is not between 0 and the fast turns, {fast:g}; 1 is "
                "usual."
            )
        if rotary.attention_factor < 0:
            raise ConfigError(
                f"--model.rotary.attention-factor {rotary.attention_factor:g} is below 0; 0 is the default."
            )
        if kind == "dynamic" and self.head_dim == 2:
            raise ConfigError(
                f"--model.rotary.scaling dynamic needs heads wider than --model.dim {self.dim} / --model.heads "
                f"{self.heads} = 2; --model.dim {4 * self.heads} would do."
            )

    @property
    def windows(self) -> tuple[int, ...]:
        """`window` as short as it says the same: those of the kinds of layer, in turn."""
        return in_turn([self.window[number % len(self.window)] for number in range(self.layers)])

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of a feed-forward layer."""
        gated = -(-8 * self.dim // (3 * 64)) * 64
        return self.mlp_dim or (gated if self.mlp in GATED else 4 * self.dim)


def in_turn(each: Sequence[int]) -> tuple[int, ...]:
    """The fewest that, taken in turn, are these."""
    period = next(n for n in range(1, len(each) + 1) if [each[i % n] for i in range(len(each))] == [*each])
    return tuple(each[:period])


def _spaced(numbers: tuple[int, ...]) -> str:
    """As they stand on the command line."""
    return " ".join(map(str, numbers))


def _near_divisors(number: int, wanted: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return " or ".join(str(n) for n in below + above)


def gpt2(layers: int = 12, heads: int = 12, dim: int = 768) -> ModelConfig:
    """Radford et al. 2019: LayerNorm, GELU, learned positions, biases, tied; by default the 124 million."""
    return ModelConfig(layers, heads, dim, bias=True)


def llama(layers: int = 32, heads: int = 32, dim: int = 4096, kv_heads: int = 0) -> ModelConfig:
    """Touvron et al. 2023: RMSNorm, SwiGLU, rotary positions, free output; by default about the 7 billion."""
    return ModelConfig(layers, heads, dim, kv_heads, mlp="swiglu", norm="rms", positions="rotary", tied=False, eps=1e-6)


class Decoder(nn.Module):
    """Embedding, a stack of blocks, norm, read-out (Radford et al. 2019, sec. 2.3)."""

    config: ModelConfig
    vocab: int
    length: int
    blocks: tuple[MakeModule, ...]
    norm: MakeModule
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        positions: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"] | tuple[Float[Array, "batch length vocab"], Cache]:
        """Logits in float32; with a cache, `(logits, cache)`, the tokens having followed those in the cache.

        positions: where None, 0, 1, ... or on from where the cache stands.
        deterministic: no dropout; otherwise `rngs={"dropout": key}` are needed.
        cache: from `empty_cache` or an earlier call.
        segments: numbers of packed sequences, whose positions begin anew; not with a cache.
        """
        config = self.config
        if positions is None:
            length = tokens.shape[1]
            if config.positions == "learned" and length > self.length:
                raise ConfigError(f"{length} tokens do not fit the model's length; {self.length} would.")
            positions = jnp.arange(length)[None] if cache is None else next_positions(cache, length)
        init = nn.initializers.normal(_embedding_std(config))
        embedding = Embedding(self.vocab, config.dim, self.dtype, init, name="embedding")
        x = residual(embedding(tokens))
        if config.scale_embedding or config.positions == "sinusoidal":
            # Up to the size of the sines (Vaswani et al. 2017, sec. 3.4), or of what layers add. The root is rounded to
            # the type of the computation, as in Gemma.
            x = x * config.dim**0.5
        if config.positions == "learned":
            x = x + Embedding(self.length, config.dim, self.dtype, init, name="positions")(positions)
        elif config.positions == "sinusoidal":
            x = x + sinusoidal(positions, config.dim).astype(x.dtype)
        x = nn.Dropout(config.dropout)(x, deterministic)
        index, start = (0, None) if cache is None else (cache.index, cache.start)
        depth = Depth(config.layers, config.remat, config.scan_layers)
        x, cache = stack(self, self.blocks, depth, x, Context(positions, index, start, segments), cache, deterministic)
        x = self.norm(name="norm")(x)
        if config.tied:
            logits = embedding.attend(x)
        else:
            logits = Dense(self.vocab, kernel_init=nn.initializers.zeros, name="readout")(x)
        logits = scores(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        if config.soft_cap:
            logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
        return logits if cache is None else (logits, cache)

    def inputs(self) -> tuple[Int[Array, "1 1"]]:
        """The smallest with which `init` makes all parameters."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def empty_cache(self, slots: int, start: Int[Array, "batch"]) -> Cache:
        """Room for `slots` tokens of rows whose first real token will stand in slot `start`."""
        c = self.config
        return empty_cache(c.layers, slots, c.kv_heads or c.heads, c.head_dim, self.dtype, start, stacked=c.scan_layers)


def decoder(config: ModelConfig, vocab: int, length: int, dtype: DTypeLike = jnp.float32) -> Decoder:
    """The decoder that the configuration describes.

    length: the most tokens that learned positions can tell apart.
    dtype: of the computation, float32 or bfloat16; parameters are float32.
    """
    rms = partial(RMSNorm, config.norm == "zero_centered_rms", config.eps)
    norm = partial(LayerNorm, config.bias, config.eps) if config.norm == "layer" else rms
    # What each layer adds to the residual stream shrinks with their number (Radford et al. 2019, sec. 2.3).
    out_init = nn.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
    biased = {"none": (), "qkv": PROJECTIONS[:3], "all": PROJECTIONS}
    attention = partial(
        SelfAttention,
        config.heads,
        config.kv_heads or config.heads,
        config.head_dim,
        scale=config.attention_scale or None,
        soft_cap=config.attention_soft_cap or None,
        rotary=config.rotary if config.positions == "rotary" else None,
        alibi=config.positions == "alibi",
        qk_norm=rms if config.qk_norm else None,
        biases=PROJECTIONS if config.bias else biased[config.attention_bias],
        out_init=out_init,
    )
    feed_forward = partial(
        GatedFeedForward if config.mlp in GATED else FeedForward,
        config.hidden,
        {**GATED, "gelu": gelu, "relu2": squared_relu}[config.mlp],
        use_bias=config.bias,
        out_init=out_init,
    )
    blocks = tuple(
        partial(
            Block,
            norm,
            partial(attention, window=window or None),
            feed_forward,
            placement=config.placement,
            dropout=config.dropout,
        )
        for window in config.windows
    )
    return Decoder(config, vocab, length, blocks, norm, dtype)


def forward_flops(config: ModelConfig, vocab: int, batch: int, length: int) -> int:
    """Floating-point operations of the products of a forward pass over `[batch, length]` tokens.

    Two for each token and each parameter that multiplies it, the read-out's among them but no table's (Kaplan et al.
    2020, sec. 2.1), and attention's over the pairs that the causal mask and the windows show. A training step takes
    three times as many: each product has two in the backward pass (Chowdhery et al. 2022, app. B).
    """
    c, kv_heads = config, config.kv_heads or config.heads
    projections = projection_flops(batch, length, c.dim, c.heads, kv_heads, c.head_dim)
    feed_forward = 2 * batch * length * c.dim * c.hidden * (3 if c.mlp in GATED else 2)
    pairs = {window: visible_pairs(length, length, causal=True, window=window or None) for window in set(c.windows)}
    all_pairs = sum(pairs[c.windows[number % len(c.windows)]] for number in range(c.layers))
    attention = flops(all_pairs, batch, c.heads, c.head_dim, c.head_dim)
    return c.layers * (projections + feed_forward) + attention + 2 * batch * length * c.dim * vocab


def _embedding_std(config: ModelConfig) -> float:
    """0.02 (Radford et al. 2019); less where a wide tied read-out's logits would not start near 0."""
    return min(0.02, 0.15 / config.dim**0.5) if config.tied else 0.02
