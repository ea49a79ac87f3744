"""Speech to text: the encoder-decoder of Whisper, on log-mel spectrograms (Radford et al. 2022, fig. 1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxarch.attention.cache import Cache, empty_cache, next_positions
from jaxarch.run.protocol import ConfigError, check_least
from jaxarch.transformer.attention import CrossAttention, SelfAttention
from jaxarch.transformer.blocks import Block, Context, Depth, MakeModule, stack
from jaxarch.transformer.layers import DEFAULT_INIT, Dense, Embedding, FeedForward, LayerNorm, dense, exact_gelu

BIASES = ("query", "value", "out")  # a bias of the keys would move all logits of a query alike


@dataclass(frozen=True)
class SpeechConfig:
    """An encoder of spectrograms and a decoder of text. Raises ConfigError where the numbers do not fit."""

    layers: int = 4
    """of the encoder"""
    decoder_layers: int = 4
    heads: int = 6
    """of the encoder"""
    decoder_heads: int = 6
    dim: int = 384
    """width of both residual streams"""
    mlp_dim: int = 0
    """hidden width of the encoder's feed-forward layers (0: 4 dim)"""
    decoder_mlp_dim: int = 0
    """of the decoder's (0: 4 dim)"""
    bands: int = 80
    """of the spectrogram"""
    readout: Literal["tied", "free", "none"] = "tied"
    """tied: with the embedding of the tokens; none: what would be read out is given instead of logits"""
    dropout: float = 0.0
    """of both inputs and of what each layer adds"""
    remat: bool = False
    """recompute each layer in the backward pass: less memory, more time"""
    scan_layers: bool = False
    """compile one layer and loop over it: compiles deep stacks sooner, runs slower on CPU"""

    def __post_init__(self) -> None:
        check_least(self, ("layers", "decoder_layers", "heads", "decoder_heads", "dim", "bands"), 1, "model.")
        for name in ("mlp_dim", "decoder_mlp_dim"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--model.{option} {getattr(self, name)} is below 0; 0 is the default.")
        for name in ("heads", "decoder_heads"):
            if self.dim % getattr(self, name):
                option = name.replace("_", "-")
                raise ConfigError(f"--model.{option} {getattr(self, name)} does not divide --model.dim {self.dim}.")
        if self.dim < 4 or self.dim % 2:
            raise ConfigError(f"--model.dim {self.dim} has no pairs of a sine and a cosine; an even one from 4 up has.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--model.dropout {self.dropout:g} is not in [0, 1); 0.1 is usual.")


def sinusoids(length: int, dim: int) -> Float[np.ndarray, "{length} {dim}"]:
    """Of the encoder's positions: dim / 2 sines, then as many cosines, of wavelengths from 2 pi to 20,000 pi.

    Unlike `positions.sinusoidal`, sines and cosines are not interleaved, and the last wavelength is reached.
    """
    rates = 10_000.0 ** -(np.arange(dim // 2) / (dim // 2 - 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Convolution(nn.Module):
    """Over time, 3 frames wide, silence of one frame on either side.

    As a product of patches with a matrix: on XLA:CPU 1.5 times as fast as its convolution, forward and backward.
    """

    features: int
    stride: int = 1
    kernel_init: Initializer = DEFAULT_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "batch frames features_in"]) -> Float[Array, "batch strided features"]:
        kernel = self.param("kernel", self.kernel_init, (3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padded = jnp.pad(x, [(0, 0), (1, 1), (0, 0)])
        patches = jnp.concatenate([padded[:, i : x.shape[1] + i : self.stride] for i in range(3)], axis=-1)
        return dense(patches, kernel.reshape(-1, self.features), bias)


class AudioEncoder(nn.Module):
    """Two convolutions, the second of which halves the frames, positions, a stack of blocks, a norm."""

    config: SpeechConfig
    length: int
    block: MakeModule
    norm: MakeModule
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array | np.ndarray, "batch frames bands"], deterministic: bool = True
    ) -> Float[Array, "batch source dim"]:
        config = self.config
        x = jnp.asarray(features, self.dtype)
        x = exact_gelu(Convolution(config.dim, name="first")(x))
        x = exact_gelu(Convolution(config.dim, stride=2, name="second")(x))
        if x.shape[1] > self.length:
            raise ConfigError(f"{features.shape[1]} frames do not fit the model; {2 * self.length} would.")
        # A parameter only because published folders hold it: training leaves it as it is.
        table = self.param("positions", lambda _: jnp.asarray(sinusoids(self.length, config.dim)))
        x = x + jax.lax.stop_gradient(table[: x.shape[1]]).astype(x.dtype)
        x = nn.Dropout(config.dropout)(x, deterministic)
        depth = Depth(config.layers, config.remat, config.scan_layers)
        x, _ = stack(self, (self.block,), depth, x, Context(jnp.arange(x.shape[1])[None]), None, deterministic)
        return self.norm(name="norm")(x)


class TextDecoder(nn.Module):
    """A decoder of text, whose blocks look at the encoder's output besides."""

    config: SpeechConfig
    vocab: int
    length: int
    block: MakeModule
    norm: MakeModule
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        memory: Float[Array, "batch source dim"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length features"], Cache | None]:
        config = self.config
        length = tokens.shape[1]
        if length > self.length:
            raise ConfigError(f"{length} tokens do not fit the model's length; {self.length} would.")
        positions = jnp.arange(length)[None] if cache is None else next_positions(cache, length)
        embedding = Embedding(self.vocab, config.dim, self.dtype, name="embedding")
        x = embedding(tokens) + Embedding(self.length, config.dim, self.dtype, name="positions")(positions)
        x = nn.Dropout(config.dropout)(x, deterministic)
        index, start = (0, None) if cache is None else (cache.index, cache.start)
        depth = Depth(config.decoder_layers, config.remat, config.scan_layers)
        context = Context(positions, index, start, memory=memory)
        x, cache = stack(self, (self.block,), depth, x, context, cache, deterministic)
        x = self.norm(name="norm")(x)
        if config.readout == "tied":
            x = embedding.attend(x)
        elif config.readout == "free":
            x = Dense(self.vocab, name="readout")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)), cache


class Whisper(nn.Module):
    """length: tokens of a text. source: positions of the encoder, each two frames of the spectrogram."""

    config: SpeechConfig
    vocab: int
    length: int
    source: int
    encoder_block: MakeModule
    decoder_block: MakeModule
    norm: MakeModule
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder = AudioEncoder(self.config, self.source, self.encoder_block, self.norm, self.dtype)
        self.decoder = TextDecoder(self.config, self.vocab, self.length, self.decoder_block, self.norm, self.dtype)

    def __call__(
        self,
        features: Float[Array | np.ndarray, "batch frames bands"],
        tokens: Int[Array | np.ndarray, "batch length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length features"]:
        """Logits in float32 of the token after each, given the sound.

        features: of `spectrogram.log_mel`, two frames for each of the encoder's positions at the most.
        deterministic: no dropout; otherwise `rngs={"dropout": key}` are needed.
        Raises ConfigError where frames or tokens do not fit.
        """
        return self.decode(tokens, self.encode(features, deterministic), deterministic)

    def encode(
        self, features: Float[Array | np.ndarray, "batch frames bands"], deterministic: bool = True
    ) -> Float[Array, "batch source dim"]:
        """What the decoder looks at: `memory`."""
        return self.encoder(features, deterministic)

    def decode(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        memory: Float[Array, "batch source dim"] | None = None,
        deterministic: bool = True,
        cache: Cache | None = None,
    ) -> Any:
        """Logits; with a cache, `(logits, cache)`, the tokens having followed those in the cache.

        memory: the encoder's output; None where an earlier call has put its keys and values into the cache.
        """
        logits, kept = self.decoder(tokens, memory, deterministic, cache)
        return logits if cache is None else (logits, kept)

    def inputs(self) -> tuple[Float[Array, "1 2 bands"], Int[Array, "1 1"]]:
        """The smallest with which `init` makes all parameters."""
        return jnp.zeros((1, 2, self.config.bands)), jnp.zeros((1, 1), jnp.int32)

    def empty_cache(self, slots: int, start: Int[Array, "batch"]) -> Cache:
        """Room for `slots` tokens of rows whose first real token will stand in slot `start`."""
        c = self.config
        heads, dim = c.decoder_heads, c.dim // c.decoder_heads
        return empty_cache(c.decoder_layers, slots, heads, dim, self.dtype, start, c.scan_layers)


def whisper(
    config: SpeechConfig, vocab: int, length: int = 448, source: int = 1500, dtype: DTypeLike = jnp.float32
) -> Whisper:
    """The model that the config describes; by default for 30 s of sound and 448 tokens."""
    norm = partial(LayerNorm, use_bias=True)

    def block(heads: int, hidden: int, layers: int, decoder: bool) -> MakeModule:
        out_init = nn.initializers.normal(0.02 / (2 * layers) ** 0.5)
        width = config.dim // heads
        return partial(
            Block,
            norm,
            partial(SelfAttention, heads, heads, width, causal=decoder, biases=BIASES, out_init=out_init),
            partial(FeedForward, hidden or 4 * config.dim, exact_gelu, use_bias=True, out_init=out_init),
            cross=partial(CrossAttention, heads, width, biases=BIASES, out_init=out_init) if decoder else None,
            dropout=config.dropout,
        )

    encoder_block = block(config.heads, config.mlp_dim, config.layers, False)
    decoder_block = block(config.decoder_heads, config.decoder_mlp_dim, config.decoder_layers, True)
    return Whisper(config, vocab, length, source, encoder_block, decoder_block, norm, dtype)
