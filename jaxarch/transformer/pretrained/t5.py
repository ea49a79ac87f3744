"""T5 (Raffel et al. 2020), 1.0 and 1.1, and mT5 (Xue et al. 2021), as `T5ForConditionalGeneration` names their parts.

A folder's tokens that stand for no text are in its config.json: `specials` reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxarch.data.pairs import Specials
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.encoder_decoder import Encoder, EncoderDecoder, EncoderDecoderConfig, encoder, encoder_decoder
from jaxarch.transformer.pretrained.family import Family, Names, Settings, entry, obstacles, sizes
from jaxarch.transformer.pretrained.tensors import Tensors

HEAD, EMBEDDING = "lm_head.weight", "shared.weight"
FIXED = {"norm": "rms", "positions": "relative", "scaled_attention": False}
FREE = (
    "layers decoder_layers heads dim head_width activation gated mlp_dim buckets max_distance tied scaled_readout eps "
    "dropout remat scan_layers"
)
# `gelu` alone is the exact form, but `gated-gelu` the tanh form, as T5 1.1 was trained.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
# What `transformers` takes where config.json leaves it out, if it is not what T5 would take.
DEFAULTS: dict[str, dict[str, Any]] = {"MT5": {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}}


def names_of(params: Collection[str]) -> Names:
    names: dict[str, str] = {EMBEDDING: "embedding.embedding", HEAD: "readout.kernel.T"}
    gated = any(".gate." in name for name in params)
    parts = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    for side in ("encoder", "decoder"):
        own = {"0": "attention"} | ({"1": "cross", "2": "feed_forward"} if side == "decoder" else {"1": "feed_forward"})
        for number, part in own.items():
            theirs, ours = f"{side}.block.#.layer.{number}", f"{side}.layers_#.{part}"
            names[f"{theirs}.layer_norm.weight"] = f"{ours}_norm.scale"
            if part == "feed_forward":
                products, module = parts, "DenseReluDense"
            else:
                products = {"q": "query", "k": "key", "v": "value", "o": "out"}
                module = "EncDecAttention" if part == "cross" else "SelfAttention"
            names |= {f"{theirs}.{module}.{one}.weight": f"{ours}.{name}.kernel.T" for one, name in products.items()}
        # Of each stack the first layer has the table that all of them share.
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names |= {bias: f"{side}.relative_bias.embedding", f"{side}.final_layer_norm.weight": f"{side}.norm.scale"}
    return names


def completed(settings: Settings, tensors: Tensors) -> Settings:
    """transformers 5 always says that the read-out is tied, and leaves it free where its numbers are others."""
    names = tensors.names()
    if settings.get("tie_word_embeddings") is False or not {HEAD, EMBEDDING} <= set(names):
        return settings
    tied = np.array_equal(tensors.whole(HEAD), tensors.whole(EMBEDDING))
    return settings if tied else {"scale_decoder_outputs": True, **_filled(settings), "tie_word_embeddings": False}


def _filled(settings: Settings) -> dict[str, Any]:
    return DEFAULTS.get(settings["architectures"][0].split("5")[0] + "5", {}) | dict(settings)


def config_of(settings: Settings) -> EncoderDecoderConfig:
    settings = _filled(settings)
    layers, heads, dim, width, hidden = sizes(settings, "num_layers", "num_heads", "d_model", "d_kv", "d_ff")
    kind = entry(settings, "feed_forward_proj", str, "relu")
    gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    activation: Any = "gelu_tanh" if kind == "gated-gelu" else ACTIVATIONS.get(name)
    if activation is None:
        raise ConfigError(f"feed_forward_proj {kind} cannot be expressed here, only {', '.join(ACTIVATIONS)}.")
    tied = entry(settings, "tie_word_embeddings", bool, True)
    decoder_layers = entry(settings, "num_decoder_layers", int, layers)
    return EncoderDecoderConfig(
        layers,
        0 if decoder_layers == layers else decoder_layers,
        heads,
        dim,
        head_width=0 if width * heads == dim else width,
        activation=activation,
        gated=gated,
        mlp_dim=hidden,
        norm="rms",
        positions="relative",
        buckets=entry(settings, "relative_attention_num_buckets", int, 32),
        max_distance=entry(settings, "relative_attention_max_distance", int, 128),
        scaled_attention=False,
        tied=tied,
        # transformers 4 scales what is read out with the embedding; 5 says so apart.
        scaled_readout=entry(settings, "scale_decoder_outputs", bool, tied),
        eps=entry(settings, "layer_norm_epsilon", float, 1e-6),
    )


def model(settings: Settings, dtype: DTypeLike) -> EncoderDecoder:
    length = entry(settings, "n_positions", int, 512)  # relative positions have no end: this bounds nothing
    (vocab,) = sizes(settings, "vocab_size")
    return encoder_decoder(config_of(settings), vocab, (length, length), dtype)


def encoder_model(settings: Settings, dtype: DTypeLike) -> Encoder:
    (vocab,) = sizes(settings, "vocab_size")
    return encoder(config_of(settings), vocab, entry(settings, "n_positions", int, 512), dtype)


def against(model: EncoderDecoder | Encoder) -> list[str]:
    config = model.config
    found = obstacles(config, FIXED, FREE.split())
    if config.gated and config.activation == "gelu":
        found.append("--model.activation gelu with --model.gated")
    return found


def settings_of(model: EncoderDecoder | Encoder) -> dict[str, Any]:
    config = model.config
    of_encoder = isinstance(model, Encoder)
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    kind = f"gated-{activation}" if config.gated else activation
    return {
        "model_type": "t5",
        "architectures": ["T5EncoderModel" if of_encoder else "T5ForConditionalGeneration"],
        "is_encoder_decoder": not of_encoder,
        "vocab_size": model.vocab,
        "n_positions": model.length if of_encoder else model.lengths[0],
        "d_model": config.dim,
        "d_kv": config.head_dim,
        "d_ff": config.hidden,
        "num_layers": config.layers,
        "num_decoder_layers": config.both[1],
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": "gated-gelu" if kind == "gated-gelu_new" else kind,
        "dense_act_fn": activation,
        "is_gated_act": config.gated,
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,  # read by transformers 4
        "scale_decoder_outputs": config.scaled_readout,  # and by 5
        "dropout_rate": config.dropout,
    }


def specials(settings: Settings) -> Specials:
    """The tokens that stand for no text: those of config.json, or else T5's own."""
    pad = entry(settings, "pad_token_id", int, 0)
    return Specials(pad, entry(settings, "decoder_start_token_id", int, pad), entry(settings, "eos_token_id", int, 1))


T5 = Family(
    title="T5",
    kind=EncoderDecoder,
    architectures=("T5ForConditionalGeneration", "MT5ForConditionalGeneration"),
    bodies=("T5Model", "MT5Model"),
    names=names_of,
    prefix="",
    heads=("lm_head.",),
    copies={HEAD: EMBEDDING, "encoder.embed_tokens.weight": EMBEDDING, "decoder.embed_tokens.weight": EMBEDDING},
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # never used
    model=model,
    obstacles=against,
    settings=settings_of,
    completed=completed,
)
T5_ENCODER = T5._replace(
    title="T5's encoder",
    kind=Encoder,
    architectures=("T5EncoderModel", "MT5EncoderModel"),
    bodies=(*T5.architectures, *T5.bodies),
    heads=(),
    copies={"encoder.embed_tokens.weight": EMBEDDING},
    ignored=r"(decoder|lm_head)\..*",  # it is asked for without them
    model=encoder_model,
    completed=lambda settings, tensors: settings,
)
