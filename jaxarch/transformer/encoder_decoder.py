"""The Transformer as it was first drawn: an encoder of a source, and a decoder of a target that attends to it.

Vaswani et al. 2017, fig. 1, and T5 (Raffel et al. 2020), which has other norms, positions and read-outs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxarch.attention.cache import Cache, empty_cache, next_positions
from jaxarch.attention.cost import flops, projection_flops, visible_pairs
from jaxarch.data.pairs import Specials
from jaxarch.run.protocol import ConfigError, check_least
from jaxarch.transformer.attention import PROJECTIONS, CrossAttention, Rotary, SelfAttention
from jaxarch.transformer.beams import Beams, beam_search
from jaxarch.transformer.blocks import Block, Context, Depth, MakeModule, stack
from jaxarch.transformer.decoding import Prompts, decode
from jaxarch.transformer.layers import (
    ACTIVATIONS,
    Dense,
    Embedding,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    RelativeBias,
    RMSNorm,
)
from jaxarch.transformer.positions import sinusoidal


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder and a decoder, in the words of the command line. Raises ConfigError where the numbers do not fit."""

    layers: int = 2
    """of the encoder"""
    decoder_layers: int = 0
    """(0: as many)"""
    heads: int = 4
    dim: int = 128
    """width of the residual stream"""
    head_width: int = 0
    """of each head (0: dim / heads)"""
    activation: Literal["relu", "gelu_tanh", "gelu", "silu"] = "gelu_tanh"
    """of the feed-forward layers; gelu is the exact one"""
    gated: bool = False
    """a second product in the feed-forward layers, which the activation gates"""
    mlp_dim: int = 0
    """their hidden width (0: 4 dim)"""
    norm: Literal["layer", "rms"] = "layer"
    placement: Literal["pre", "post"] = "pre"
    """of the norms: before each part, and one more after the last layer, or after each sum"""
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "none"] = "rotary"
    """relative: T5's bias, one for all layers of the encoder and one for the decoder's"""
    buckets: int = 32
    """of relative positions"""
    max_distance: int = 128
    """from which on relative positions are one"""
    scaled_attention: bool = True
    """logits of the attention divided by the square root of a head's width"""
    tied: bool = True
    """read out with the embedding of the tokens"""
    scaled_readout: bool = False
    """what is read out is divided by the square root of dim"""
    bias: bool = False
    """biases in dense layers and LayerNorm"""
    eps: float = 1e-5
    """of the norms"""
    dropout: float = 0.0
    """of the embeddings and of what each part of a layer adds"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """compile one layer and loop over it: compiles deep stacks sooner, runs slower on CPU"""

    def __post_init__(self) -> None:
        check_least(self, ("layers", "heads", "dim"), 1, "model.")
        for name in ("decoder_layers", "head_width", "mlp_dim"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--model.{option} {getattr(self, name)} is below 0; 0 is the default.")
        if not self.head_width and self.dim % self.heads:
            more = self.heads * -(-self.dim // self.heads)
            raise ConfigError(
                f"--model.heads {self.heads} does not divide --model.dim {self.dim}; --model.dim {more} would do."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ConfigError(
                f"--model.positions rotary needs heads of even width, not {self.head_dim}; "
                f"--model.head-width {self.head_dim + 1} would do."
            )
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ConfigError(
                f"--model.dim {self.dim} is odd, but --model.positions sinusoidal needs pairs; "
                f"--model.dim {self.dim + 1} would do."
            )
        if self.positions == "relative":
            if self.buckets < 4:
                raise ConfigError(f"--model.buckets {self.buckets} are too few; 4 would do, 32 are usual.")
            if self.max_distance <= self.buckets // 2:
                raise ConfigError(
                    f"--model.max-distance {self.max_distance} is not above half of --model.buckets {self.buckets}, "
                    f"each of which holds one distance; 128 is usual."
                )
        if self.eps <= 0:
            raise ConfigError(f"--model.eps {self.eps:g} is not above 0; 1e-5 is usual.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1); 0.1 is usual.")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Width of a feed-forward layer."""
        return self.mlp_dim or 4 * self.dim

    @property
    def both(self) -> tuple[int, int]:
        """Layers of the encoder and of the decoder."""
        return self.layers, self.decoder_layers or self.layers


def transformer(layers: int = 6, heads: int = 8, dim: int = 512, dropout: float = 0.1) -> EncoderDecoderConfig:
    """Vaswani et al. 2017, sec. 3; by default table 3's base model."""
    return EncoderDecoderConfig(
        layers,
        heads=heads,
        dim=dim,
        activation="relu",
        placement="post",
        positions="sinusoidal",
        bias=True,
        dropout=dropout,
    )


def t5(layers: int = 6, heads: int = 8, dim: int = 512, head_width: int = 64, mlp_dim: int = 0) -> EncoderDecoderConfig:
    """T5 1.0 (Raffel et al. 2020, sec. 2.1); by default the small one."""
    return EncoderDecoderConfig(
        layers,
        heads=heads,
        dim=dim,
        head_width=head_width,
        activation="relu",
        mlp_dim=mlp_dim,
        norm="rms",
        positions="relative",
        scaled_attention=False,
        scaled_readout=True,
        eps=1e-6,
    )


def t5_v1_1(
    layers: int = 8, heads: int = 6, dim: int = 512, head_width: int = 64, mlp_dim: int = 1024
) -> EncoderDecoderConfig:
    """T5 1.1: a gated feed-forward layer (Shazeer 2020, eq. 6) and a free read-out; by default the small one."""
    return EncoderDecoderConfig(
        layers,
        heads=heads,
        dim=dim,
        head_width=head_width,
        activation="gelu_tanh",
        gated=True,
        mlp_dim=mlp_dim,
        norm="rms",
        positions="relative",
        scaled_attention=False,
        tied=False,
        eps=1e-6,
    )


class Side(nn.Module):
    """An encoder or a decoder from embedded tokens on: positions, layers and, where they are pre-norm, a last norm.

    length: the most tokens that learned positions can tell apart.
    """

    config: EncoderDecoderConfig
    causal: bool
    layers: int
    length: int
    block: MakeModule
    norm: MakeModule

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        context: Context,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length dim"], Cache | None]:
        config, positions = self.config, context.positions
        if config.positions == "learned":
            table = Embedding(self.length, config.dim, x.dtype, nn.initializers.normal(_std(config)), name="positions")
            x = x + table(positions)
        elif config.positions == "sinusoidal":
            # The tokens are scaled up to the size of the sines (Vaswani et al. 2017, sec. 3.4).
            x = x * config.dim**0.5 + sinusoidal(positions, config.dim).astype(x.dtype)
        elif config.positions == "relative":
            key_positions = positions
            if cache is not None:
                slots = jax.tree.leaves(cache.layers)[0].shape[-2]
                key_positions = jnp.arange(slots)[None] - cache.start[:, None]
            make = partial(RelativeBias, config.heads, not self.causal, config.buckets, config.max_distance)
            context = context._replace(bias=make(name="relative_bias")(positions, key_positions))
        x = nn.Dropout(config.dropout)(x, deterministic)
        depth = Depth(self.layers, config.remat, config.scan_layers)
        x, cache = stack(self, (self.block,), depth, x, context, cache, deterministic)
        return self.norm(name="norm")(x) if config.placement == "pre" else x, cache


class Encoder(nn.Module):
    """The encoder alone, as published embeddings of texts have it; its parameters are a part of an encoder-decoder's.

    length: the most tokens that learned positions can tell apart.
    """

    config: EncoderDecoderConfig
    vocab: int
    length: int
    side: MakeModule
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(_std(self.config))
        self.embedding = Embedding(self.vocab, self.config.dim, self.dtype, init)
        self.encoder = self.side()

    def inputs(self) -> tuple[Int[Array, "1 1"]]:
        """The smallest inputs with which `init` makes all parameters."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def __call__(
        self,
        source: Int[Array | np.ndarray, "batch source"],
        segments: Int[Array | np.ndarray, "batch source"] | None = None,
        positions: Int[Array | np.ndarray, "#batch source"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch source dim"]:
        """As `EncoderDecoder.encode`."""
        positions = _positions(self.config, source, positions, self.length)
        context = Context(positions, segments=None if segments is None else jnp.asarray(segments))
        return self.encoder(self.embedding(source), context, None, deterministic)[0]


class EncoderDecoder(nn.Module):
    """`encode` makes a memory of the source, `decode` says what follows a target's tokens; called, both.

    One embedding serves the source, the target and, tied, the read-out. Padding stands on the right of a source and of
    a target, on the left of one that a cache goes on with.

    lengths: the most tokens of a source and of a target that learned positions can tell apart.
    """

    config: EncoderDecoderConfig
    vocab: int
    lengths: tuple[int, int]
    sides: tuple[MakeModule, MakeModule]
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.embedding = Embedding(self.vocab, config.dim, self.dtype, nn.initializers.normal(_std(config)))
        self.encoder, self.decoder = (make() for make in self.sides)
        if not config.tied:
            self.readout = Dense(self.vocab, kernel_init=nn.initializers.zeros)

    def inputs(self) -> tuple[Int[Array, "1 1"], Int[Array, "1 1"]]:
        """The smallest inputs with which `init` makes all parameters."""
        return jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)

    def __call__(
        self,
        source: Int[Array | np.ndarray, "batch source"],
        tokens: Int[Array | np.ndarray, "batch length"],
        source_segments: Int[Array | np.ndarray, "batch source"] | None = None,
        segments: Int[Array | np.ndarray, "batch length"] | None = None,
        source_positions: Int[Array | np.ndarray, "#batch source"] | None = None,
        positions: Int[Array | np.ndarray, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length vocab"]:
        """The logits of what follows each of `tokens`, in float32.

        source_segments, segments: numbers of packed pairs, from 1 on; 0 is padding. None: all one. A target's padding
            needs no number, since no token before it sees it.
        source_positions, positions: where None, 0, 1, ...; of packed pairs give them where positions are learned or
            sinusoidal.
        deterministic: no dropout; otherwise `rngs={"dropout": key}` are needed.
        """
        memory = self.encode(source, source_segments, source_positions, deterministic)
        logits = self.decode(tokens, memory, source_segments, segments, positions, deterministic)
        assert not isinstance(logits, tuple)
        return logits

    def encode(
        self,
        source: Int[Array | np.ndarray, "batch source"],
        segments: Int[Array | np.ndarray, "batch source"] | None = None,
        positions: Int[Array | np.ndarray, "#batch source"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch source dim"]:
        """What the decoder attends to, in the type of the computation."""
        positions = _positions(self.config, source, positions, self.lengths[0])
        context = Context(positions, segments=None if segments is None else jnp.asarray(segments))
        return self.encoder(self.embedding(source), context, None, deterministic)[0]

    def decode(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        memory: Float[Array, "batch source dim"] | None = None,
        memory_segments: Int[Array | np.ndarray, "batch source"] | None = None,
        segments: Int[Array | np.ndarray, "batch length"] | None = None,
        positions: Int[Array | np.ndarray, "#batch length"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
    ) -> Float[Array, "batch length vocab"] | tuple[Float[Array, "batch length vocab"], Cache]:
        """Logits in float32; with a cache, `(logits, cache)`, the tokens having followed those in the cache.

        memory, memory_segments: what `encode` gave, and its segments. A cache keeps what is made of them: its later
            calls go without.
        segments: numbers of packed targets; not with a cache.
        """
        positions = _positions(self.config, tokens, positions, self.lengths[1], cache)
        context = Context(
            positions,
            *((0, None) if cache is None else (cache.index, cache.start)),
            segments=None if segments is None else jnp.asarray(segments),
            memory=memory,
            memory_segments=None if memory_segments is None else jnp.asarray(memory_segments),
        )
        if cache is not None:
            if context.memory_segments is None:
                context = context._replace(memory_segments=cache.memory_segments)
            cache = cache._replace(memory_segments=context.memory_segments)
        x, cache = self.decoder(self.embedding(tokens), context, cache, deterministic)
        if self.config.scaled_readout:
            x = x * self.config.dim**-0.5
        logits = self.embedding.attend(x) if self.config.tied else self.readout(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if cache is None else (logits, cache)

    def empty_cache(self, slots: int, start: Int[Array, "batch"]) -> Cache:
        """Room for `slots` tokens of targets whose first real token will stand in slot `start`."""
        config = self.config
        size = config.both[1], slots, config.heads, config.head_dim
        return empty_cache(*size, self.dtype, start, stacked=config.scan_layers)


def encoder_decoder(
    config: EncoderDecoderConfig, vocab: int, lengths: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> EncoderDecoder:
    """The model that the configuration describes.

    lengths: the most tokens of a source and of a target that learned positions can tell apart.
    dtype: of the computation, float32 or bfloat16; parameters are float32.
    """
    norm = partial(RMSNorm, eps=config.eps)
    if config.norm == "layer":
        norm = partial(LayerNorm, use_bias=config.bias, eps=config.eps)
    scale = None if config.scaled_attention else 1.0
    biases = PROJECTIONS if config.bias else ()
    turn = Rotary() if config.positions == "rotary" else None
    activation = ACTIVATIONS[config.activation]
    size = config.heads, config.head_dim
    sides = []
    for causal, layers, length in zip((False, True), config.both, lengths, strict=True):
        # What each layer adds to the residual stream shrinks with their number (Radford et al. 2019, sec. 2.3).
        init = nn.initializers.normal(0.02 / ((3 if causal else 2) * layers) ** 0.5)
        attention = partial(
            SelfAttention, config.heads, *size, causal, scale=scale, rotary=turn, biases=biases, out_init=init
        )
        cross = partial(CrossAttention, *size, scale, biases, init) if causal else None
        make = GatedFeedForward if config.gated else FeedForward
        feed_forward = partial(make, config.hidden, activation, use_bias=config.bias, out_init=init)
        block = partial(Block, norm, attention, feed_forward, cross, config.placement, config.dropout)
        sides.append(partial(Side, config, causal, layers, length, block, norm))
    return EncoderDecoder(config, vocab, lengths, (sides[0], sides[1]), dtype)


def encoder(config: EncoderDecoderConfig, vocab: int, length: int, dtype: DTypeLike = jnp.float32) -> Encoder:
    """The encoder of `encoder_decoder` alone."""
    return Encoder(config, vocab, length, encoder_decoder(config, vocab, (length, 0), dtype).sides[0], dtype)


def _positions(
    config: EncoderDecoderConfig,
    tokens: Array | np.ndarray,
    positions: Array | np.ndarray | None,
    most: int,
    cache: Cache | None = None,
) -> Int[Array, "#batch length"]:
    """Those given, or on from where the cache stands. Raises ConfigError where learned ones are too few."""
    length = tokens.shape[1]
    if positions is not None:
        return jnp.asarray(positions)
    if config.positions == "learned" and length > most:
        raise ConfigError(f"{length} tokens do not fit the model's length; {most} would.")
    return jnp.arange(length)[None] if cache is None else next_positions(cache, length)


def _std(config: EncoderDecoderConfig) -> float:
    """Of the embeddings at the start: 1 where a scaled read-out asks for it, so that T5's logits are of size 1; else
    0.02, or less where a wide tied read-out's logits would not start near 0.
    """
    if config.scaled_readout:
        return 1.0
    return min(0.02, 0.15 / config.dim**0.5) if config.tied else 0.02


def prefill(
    model: EncoderDecoder,
    variables: PyTree,
    source: Int[Array | np.ndarray, "batch source"],
    source_segments: Int[Array | np.ndarray, "batch source"] | None,
    prompts: Prompts,
    slots: int,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits of each target's next token, and a cache of `slots` that holds what is made of the source.

    prompts: what the targets begin with.
    Raises ConfigError where learned positions are fewer than slots.
    """
    if model.config.positions == "learned" and slots > model.lengths[1]:
        raise ConfigError(f"targets of {slots} tokens do not fit the model's length; {model.lengths[1]} would.")
    memory = model.apply(variables, source, source_segments, method="encode")
    cache = model.empty_cache(slots, prompts.tokens.shape[1] - prompts.lengths)
    given = prompts.tokens, memory, source_segments
    logits, cache = cast(Any, model.apply(variables, *given, cache=cache, method="decode"))
    return logits[:, -1], cache


def step(
    model: EncoderDecoder, variables: PyTree, tokens: Int[Array | np.ndarray, "batch length"], cache: Cache
) -> tuple[Float[Array, "batch length vocab"], Cache]:
    """The logits after each of the tokens, and the cache with them in it. Pure: compile it, and donate the cache."""
    return cast(Any, model.apply(variables, tokens, cache=cache, method="decode"))


GREEDY = Beams(1)


def translate(
    model: EncoderDecoder,
    variables: PyTree,
    source: Int[Array | np.ndarray, "batch source"],
    specials: Specials,
    new_tokens: int,
    beams: Beams = GREEDY,
) -> Int[Array, "batch new_tokens"]:
    """The best target of each source that a search finds, up to its end, which fills its rest.

    One compiled program, kept for the next call with the same model, numbers and shapes.

    beams: of one beam, the most probable token at a time.
    Raises ConfigError where learned positions are fewer than new tokens.
    """
    # Linen modules do have a hash, by their fields, which their type does not tell.
    return _program(model, specials, new_tokens, beams)(variables, source)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=8)
def _program(model: EncoderDecoder, specials: Specials, new_tokens: int, beams: Beams) -> Callable:
    @jax.jit
    def run(variables: PyTree, source: Array) -> Array:
        prompts = Prompts(jnp.full((len(source), 1), specials.begin), jnp.ones(len(source), jnp.int32))
        segments = (source != specials.pad).astype(jnp.int32)
        # The last token is chosen, but no longer read: so the beginning has a slot.
        logits, cache = prefill(model, variables, source, segments, prompts, new_tokens)
        each = partial(step, model, variables)
        if beams.width == 1:
            return decode(each, logits, cache, prompts, new_tokens, jax.random.key(0), stop_token=specials.end)
        return beam_search(each, logits, cache, prompts, new_tokens, beams, specials.end).tokens[:, 0]

    return run


def forward_flops(config: EncoderDecoderConfig, vocab: int, batch: int, source: int, length: int) -> int:
    """Floating-point operations of the products of a forward pass over `[batch, source]` and `[batch, length]` tokens.

    Counted as by `decoder.forward_flops`.
    """
    c, (encoder, decoder) = config, config.both

    def projections(tokens: int) -> int:
        return projection_flops(batch, tokens, c.dim, c.heads, c.heads, c.head_dim)

    def attention(pairs: int) -> int:
        return flops(pairs, batch, c.heads, c.head_dim, c.head_dim)

    def feed_forward(tokens: int) -> int:
        return 2 * batch * tokens * c.dim * c.hidden * (3 if c.gated else 2)

    # Of cross-attention's four projections two are of the target's tokens and two of the source's.
    cross = (projections(source) + projections(length)) // 2 + attention(source * length)
    of_encoder = projections(source) + attention(source * source) + feed_forward(source)
    of_decoder = projections(length) + attention(visible_pairs(length, length, causal=True)) + feed_forward(length)
    return encoder * of_encoder + decoder * (of_decoder + cross) + 2 * batch * length * c.dim * vocab
