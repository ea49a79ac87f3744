"""The encoder-only Transformer, BERT (Devlin et al. 2019), composed: a body, and on it one of several heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxarch.attention.cost import flops, projection_flops
from jaxarch.run.protocol import ConfigError, check_least
from jaxarch.transformer.attention import PROJECTIONS, Rotary, SelfAttention
from jaxarch.transformer.blocks import Block, Context, Depth, MakeModule, stack
from jaxarch.transformer.layers import ACTIVATIONS, Dense, Embedding, FeedForward, LayerNorm
from jaxarch.transformer.positions import packed_positions, sinusoidal

Head = Literal["none", "pooler", "masked_lm", "classes", "token_classes"]


@dataclass(frozen=True)
class EncoderConfig:
    """The body of an encoder, in the words of the command line. Raises ConfigError where the numbers do not fit."""

    layers: int = 4
    heads: int = 4
    dim: int = 128
    """width of the residual stream"""
    mlp: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    """activation of the feed-forward layers; gelu is the exact one"""
    mlp_dim: int = 0
    """their hidden width (0: 4 dim)"""
    placement: Literal["post", "pre"] = "post"
    """of the norms: after each sum, or before each layer and once at the end"""
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"
    types: int = 2
    """kinds of token that are told apart, as the two sentences of a pair"""
    eps: float = 1e-12
    """of the norms"""
    dropout: float = 0.0
    """of the embedding, of what each attention and feed-forward layer adds, and of what a classifier reads"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """compile one layer and loop over it: compiles deep stacks sooner, runs slower on CPU"""

    def __post_init__(self) -> None:
        check_least(self, ("layers", "heads", "dim", "types"), 1, "model.")
        if self.mlp_dim < 0:
            raise ConfigError(f"--model.mlp-dim {self.mlp_dim} is below 0; 0 is the default.")
        if self.dim % self.heads:
            near = [n for n in range(1, self.dim + 1) if self.dim % n == 0]
            best = min(near, key=lambda n: abs(n - self.heads))
            raise ConfigError(f"--model.heads {self.heads} does not divide --model.dim {self.dim}; {best} would.")
        if self.positions == "rotary" and self.dim // self.heads % 2:
            raise ConfigError(
                f"--model.positions rotary needs heads of even width, not --model.dim {self.dim} / "
                f"--model.heads {self.heads} = {self.dim // self.heads}."
            )
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ConfigError(f"--model.dim {self.dim} is odd, but --model.positions sinusoidal needs pairs.")
        if self.eps <= 0:
            raise ConfigError(f"--model.eps {self.eps:g} is not above 0; 1e-12 is usual.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1); 0.1 is usual.")

    @property
    def hidden(self) -> int:
        """Width of a feed-forward layer."""
        return self.mlp_dim or 4 * self.dim


class Encoded(NamedTuple):
    """What an encoder without a classifier gives: each token's vector, and the first one's, pooled."""

    hidden: Float[Array, "batch length dim"]
    pooled: Float[Array, "batch dim"] | None


class Encoder(nn.Module):
    """Embeddings of tokens, types and positions, a stack of blocks, a head (Devlin et al. 2019, sec. 3).

    The parameters of the body are the same under every head.

    head: what is made of the tokens' vectors. none: nothing. pooler: beside them tanh of a dense layer on the first
        one. masked_lm: logits of the token at each place: dense, activation, norm, and the embedding of the tokens as
        read-out. classes: logits of the text, dense on what the pooler gives. token_classes: of each token.
    labels: the names of the classes.
    """

    config: EncoderConfig
    vocab: int
    length: int
    block: MakeModule
    norm: MakeModule
    head: Head = "none"
    labels: tuple[str, ...] = ()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        types: Int[Array | np.ndarray, "batch length"] | None = None,
        segments: Int[Array | np.ndarray, "batch length"] | None = None,
        positions: Int[Array | np.ndarray, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Encoded | Float[Array, "batch ..."]:
        """`Encoded`, or the head's logits in float32.

        types: 0 where None.
        segments: numbers of packed texts; a mask of 1 for tokens and 0 for padding is one. A head of the whole text
            reads the first slot, so that padding goes to the right.
        positions: where None, from 0 on in each segment.
        deterministic: no dropout; otherwise `rngs={"dropout": key}` are needed.
        """
        config = self.config
        if positions is None:
            length = tokens.shape[1]
            if config.positions == "learned" and length > self.length:
                raise ConfigError(f"{length} tokens do not fit the model's length; {self.length} would.")
            positions = jnp.arange(length)[None] if segments is None else packed_positions(segments)
        positions = jnp.asarray(positions)
        embedding = Embedding(self.vocab, config.dim, self.dtype, name="embedding")
        kinds = Embedding(config.types, config.dim, self.dtype, name="types")
        x = embedding(tokens) + kinds(jnp.zeros((1, 1), jnp.int32) if types is None else types)
        if config.positions == "learned":
            x = x + Embedding(self.length, config.dim, self.dtype, name="positions")(positions)
        elif config.positions == "sinusoidal":
            # The tokens are scaled up to the size of the sines (Vaswani et al. 2017, sec. 3.4).
            x = x * config.dim**0.5 + sinusoidal(positions, config.dim).astype(x.dtype)
        dropout = nn.Dropout(config.dropout)
        x = dropout(self.norm(name="embedding_norm")(x), deterministic)
        depth = Depth(config.layers, config.remat, config.scan_layers)
        context = Context(positions, segments=None if segments is None else jnp.asarray(segments))
        x, _ = stack(self, (self.block,), depth, x, context, deterministic=deterministic)
        if config.placement == "pre":
            x = self.norm(name="norm")(x)
        pooled = None
        if self.head in ("pooler", "classes"):
            pooled = jnp.tanh(Dense(config.dim, True, name="pooler")(x[:, 0]))
        if self.head in ("none", "pooler"):
            return Encoded(x, pooled)
        if self.head == "masked_lm":
            x = ACTIVATIONS[config.mlp](Dense(config.dim, True, name="transform")(x))
            x = self.norm(name="transform_norm")(x)
            bias = self.param("readout_bias", nn.initializers.zeros, (self.vocab,))
            logits = embedding.attend(x) + bias.astype(x.dtype)
        else:
            read = dropout(x if pooled is None else pooled, deterministic)
            logits = Dense(len(self.labels), True, name="classifier")(read)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def inputs(self) -> tuple[Int[Array, "1 1"]]:
        """The smallest inputs with which `init` makes all parameters."""
        return (jnp.zeros((1, 1), jnp.int32),)


def encoder(
    config: EncoderConfig,
    vocab: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    head: Head = "none",
    labels: tuple[str, ...] = (),
) -> Encoder:
    """The encoder that the configuration describes.

    length: the most tokens that learned positions can tell apart.
    dtype: of the computation, float32 or bfloat16; parameters are float32.
    head, labels: of `Encoder`.
    """
    if head.endswith("classes") != bool(labels):
        raise ValueError(f"the head {head} goes {'with' if not labels else 'without'} labels.")
    norm = partial(LayerNorm, use_bias=True, eps=config.eps)
    attention = partial(
        SelfAttention,
        config.heads,
        config.heads,
        config.dim // config.heads,
        causal=False,
        rotary=Rotary() if config.positions == "rotary" else None,
        alibi=config.positions == "alibi",
        biases=PROJECTIONS,
    )
    feed_forward = partial(FeedForward, config.hidden, ACTIVATIONS[config.mlp], use_bias=True)
    block = partial(Block, norm, attention, feed_forward, placement=config.placement, dropout=config.dropout)
    return Encoder(config, vocab, length, block, norm, head, labels, dtype)


def forward_flops(config: EncoderConfig, vocab: int, batch: int, length: int, head: Head = "none") -> int:
    """Floating-point operations of the products of a forward pass over `[batch, length]` tokens.

    Two for each token and each parameter that multiplies it, and attention's; those of one vector a text are left out.
    """
    c, tokens = config, batch * length
    projections = projection_flops(batch, length, c.dim, c.heads, c.heads, c.dim // c.heads)
    attention = flops(length * length, batch, c.heads, c.dim // c.heads, c.dim // c.heads)
    layer = projections + attention + 4 * tokens * c.dim * c.hidden
    return c.layers * layer + (2 * tokens * c.dim * (c.dim + vocab) if head == "masked_lm" else 0)
