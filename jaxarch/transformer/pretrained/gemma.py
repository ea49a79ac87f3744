"""Gemma (Gemma Team 2024) and Gemma 2 (2024): Llama's parts with scales of the norms about 0, an embedding that is
scaled up and geglu; Gemma 2 also has norms after each layer, windows in every other one and soft caps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from jax.typing import DTypeLike

from jaxarch.transformer.decoder import Decoder, ModelConfig, decoder
from jaxarch.transformer.pretrained import llama
from jaxarch.transformer.pretrained.family import Settings, entry, must_be, obstacles, sizes

NORM = "model.layers.#.{}_layernorm.weight"
NAMES = llama.NAMES | {
    NORM.format("post_attention"): "layers_#.attention_post_norm.scale",
    NORM.format("pre_feedforward"): "layers_#.feed_forward_norm.scale",
    NORM.format("post_feedforward"): "layers_#.feed_forward_post_norm.scale",
}
FIXED = {"positions": "rotary", "norm": "zero_centered_rms", "mlp": "geglu", "scale_embedding": True}
FREE = "layers heads dim kv_heads head_width mlp_dim rotary tied attention_bias eps dropout remat scan_layers"
FREE_2 = f"{FREE} window soft_cap attention_scale attention_soft_cap"
# What `transformers` takes where config.json leaves it out, if it is not what it would take of a Llama.
COMMON = {"head_dim": 256, "tie_word_embeddings": True}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GemmaForCausalLM": {**COMMON, "num_key_value_heads": 16},
    "Gemma2ForCausalLM": {
        **COMMON,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}


def model(settings: Settings, dtype: DTypeLike) -> Decoder:
    architecture = settings["architectures"][0]
    settings = DEFAULTS[architecture] | dict(settings)
    must_be(settings, "use_bidirectional_attention", False)
    second: dict[str, Any] = {}
    if architecture == "Gemma2ForCausalLM":
        width = entry(settings, "query_pre_attn_scalar", float)
        second = {
            "placement": "both",
            "window": llama.read_window(settings, architecture),
            "soft_cap": entry(settings, "final_logit_softcapping", float, 0.0),
            "attention_scale": 0.0 if width == entry(settings, "head_dim", float) else width**-0.5,
            "attention_soft_cap": entry(settings, "attn_logit_softcapping", float, 0.0),
        }
    else:
        must_be(settings, "hidden_act", "gelu_pytorch_tanh", "gelu")  # in a Gemma both mean the tanh form
    must_be(settings, "hidden_activation", "gelu_pytorch_tanh")
    config = ModelConfig(
        **llama.shape(settings),
        mlp="geglu",
        norm="zero_centered_rms",
        scale_embedding=True,
        tied=entry(settings, "tie_word_embeddings", bool),
        attention_bias="all" if entry(settings, "attention_bias", bool, False) else "none",
        **second,
    )
    vocab, length = sizes(settings, "vocab_size", "max_position_embeddings")
    return decoder(config, vocab, length, dtype)


def against(version: int, model: Decoder) -> list[str]:
    config = model.config
    second = {"placement": "both"} if version == 2 else {}
    found = obstacles(config, FIXED | second, (FREE_2 if version == 2 else FREE).split())
    if config.attention_bias == "qkv":
        found.append("--model.attention-bias qkv")
    if config.attention_scale and whole(config.attention_scale) ** -0.5 != config.attention_scale:
        found.append(f"--model.attention-scale {config.attention_scale:g}, which is not 1 / sqrt(a whole number)")
    return found + llama.two_windows(config)


def whole(scale: float) -> int:
    """The number whose inverse root is nearest to this scale."""
    return max(1, round(scale**-2))


def settings_of(version: int, model: Decoder) -> dict[str, Any]:
    config = model.config
    name = "Gemma2" if version == 2 else "Gemma"
    settings = llama.settings_of_shape(model) | {
        "model_type": name.lower(),
        "architectures": [f"{name}ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias == "all",
    }
    if version == 1:
        return settings
    return {
        **settings,
        **llama.write_window(config),
        "query_pre_attn_scalar": whole(config.attention_scale) if config.attention_scale else config.head_dim,
        "final_logit_softcapping": config.soft_cap or None,
        "attn_logit_softcapping": config.attention_soft_cap or None,
    }


GEMMA, GEMMA_2 = (
    llama.LLAMA._replace(
        title="Gemma" if version == 1 else "Gemma 2",
        architectures=(f"{name}ForCausalLM",),
        bodies=(f"{name}Model",),
        names=names,
        model=model,
        obstacles=partial(against, version),
        settings=partial(settings_of, version),
    )
    for version, name, names in ((1, "Gemma", llama.NAMES), (2, "Gemma2", NAMES))
)
