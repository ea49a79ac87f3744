"""Llama (Touvron et al. 2023) and what differs from it by an option: Mistral, Qwen2 and Qwen3.

Qwen2 adds biases to queries, keys and values, Qwen3 a norm on each head's queries and keys and heads of a width of
their own. Mistral's window of attention is refused where it would act.
"""

from __future__ import annotations

from typing import Any

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder, ModelConfig
from jaxarch.transformer.positions import Rotary
from jaxarch.transformer.pretrained.family import Described, Family, Settings, entry, must_be, obstacles

NAMES = {
    "model.embed_tokens.weight": "embedding.embedding",
    "model.layers.#.input_layernorm.weight": "layers_#.attention_norm.scale",
    "model.layers.#.self_attn.q_proj.weight": "layers_#.attention.query.kernel.T",
    "model.layers.#.self_attn.q_proj.bias": "layers_#.attention.query.bias",
    "model.layers.#.self_attn.q_norm.weight": "layers_#.attention.query_norm.scale",
    "model.layers.#.self_attn.k_proj.weight": "layers_#.attention.key.kernel.T",
    "model.layers.#.self_attn.k_proj.bias": "layers_#.attention.key.bias",
    "model.layers.#.self_attn.k_norm.weight": "layers_#.attention.key_norm.scale",
    "model.layers.#.self_attn.v_proj.weight": "layers_#.attention.value.kernel.T",
    "model.layers.#.self_attn.v_proj.bias": "layers_#.attention.value.bias",
    "model.layers.#.self_attn.o_proj.weight": "layers_#.attention.out.kernel.T",
    "model.layers.#.self_attn.o_proj.bias": "layers_#.attention.out.bias",
    "model.layers.#.post_attention_layernorm.weight": "layers_#.feed_forward_norm.scale",
    "model.layers.#.mlp.gate_proj.weight": "layers_#.feed_forward.gate.kernel.T",
    "model.layers.#.mlp.gate_proj.bias": "layers_#.feed_forward.gate.bias",
    "model.layers.#.mlp.up_proj.weight": "layers_#.feed_forward.up.kernel.T",
    "model.layers.#.mlp.up_proj.bias": "layers_#.feed_forward.up.bias",
    "model.layers.#.mlp.down_proj.weight": "layers_#.feed_forward.down.kernel.T",
    "model.layers.#.mlp.down_proj.bias": "layers_#.feed_forward.down.bias",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "readout.kernel.T",
}
# What `transformers` takes where config.json leaves it out, if it is not what Llama would take.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}
FIXED = {"positions": "rotary", "norm": "rms", "mlp": "swiglu"}
FREE = (
    "layers heads dim kv_heads head_width mlp_dim qk_norm tied bias attention_bias eps rotary dropout remat scan_layers"
)


def described(settings: Settings) -> Described:
    architecture = settings["architectures"][0]
    settings = DEFAULTS[architecture] | dict(settings)
    must_be(settings, "hidden_act", "silu", "swish")
    length = entry(settings, "max_position_embeddings", int)
    check_window(settings, architecture, length)
    bias = architecture == "LlamaForCausalLM" and entry(settings, "mlp_bias", bool, False)
    has_option = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    if has_option and entry(settings, "attention_bias", bool, False) != bias:
        raise ConfigError(f"attention_bias {not bias} with mlp_bias {bias} cannot be expressed here, only the same.")
    heads, dim = entry(settings, "num_attention_heads", int), entry(settings, "hidden_size", int)
    width = entry(settings, "head_dim", int, 0)
    config = ModelConfig(
        entry(settings, "num_hidden_layers", int),
        heads,
        dim,
        entry(settings, "num_key_value_heads", int, heads),
        head_width=0 if width * heads == dim else width,
        mlp="swiglu",
        mlp_dim=entry(settings, "intermediate_size", int),
        norm="rms",
        positions="rotary",
        rotary=Rotary(rotary_base(settings)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=entry(settings, "tie_word_embeddings", bool, False),
        bias=bias,
        attention_bias="qkv" if architecture == "Qwen2ForCausalLM" else "none",
        eps=entry(settings, "rms_norm_eps", float, 1e-6),
    )
    return Described(config, entry(settings, "vocab_size", int), length)


def check_window(settings: Settings, architecture: str, length: int) -> None:
    """Raises ConfigError where some layer would not see all of the past."""
    window = entry(settings, "sliding_window", int, length)
    asked = architecture == "MistralForCausalLM" or entry(settings, "use_sliding_window", bool, False)
    layers = settings.get("layer_types") or ()
    if (asked or "sliding_attention" in layers) and window < length:
        raise ConfigError(f"sliding_window {window} cannot be expressed here, only attention to all of the past.")
    other = set(layers) - {"full_attention", "sliding_attention"}
    if other:
        raise ConfigError(f"layer_types {min(other)} cannot be expressed here, only full_attention.")


def rotary_base(settings: Settings) -> float:
    """In `rope_parameters` (transformers 5) or beside `rope_scaling` (4). Raises ConfigError for scaled rotations."""
    rope: dict[str, Any] = {"rope_theta": settings.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        given = settings.get(name) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{name} is {given!r}, not an object.")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in given.values()):
            raise ConfigError(f"{name} {kind} cannot be expressed here, only rotations that are not scaled.")
        rope |= given
    must_be({**settings, **rope}, "partial_rotary_factor", 1.0)
    return entry(rope, "rope_theta", float, 10000.0)


def against(config: ModelConfig) -> list[str]:
    found = obstacles(config, FIXED, FREE.split())
    if config.qk_norm and (config.bias or config.attention_bias != "none"):
        found.append("--model.qk-norm with biases")
    if config.attention_bias == "all" and not config.bias:
        found.append("--model.attention-bias all")
    if config.rotary.scaling != "none":
        found.append(f"--model.rotary.scaling {config.rotary.scaling}")
    return found


def settings_of(model: Decoder) -> dict[str, Any]:
    """A Mistral without a window is a Llama, and is written as one."""
    config = model.config
    name = "Qwen3" if config.qk_norm else "Qwen2" if config.attention_bias == "qkv" and not config.bias else "Llama"
    settings = {
        "model_type": name.lower(),
        "architectures": [f"{name}ForCausalLM"],
        "vocab_size": model.vocab,
        "max_position_embeddings": model.length,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "rope_theta": config.rotary.base,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary.base},  # and by 5
        "tie_word_embeddings": config.tied,
    }
    return settings if name == "Qwen2" else settings | {"attention_bias": config.bias, "mlp_bias": config.bias}


LLAMA = Family(
    title="Llama, Qwen2 or Qwen3",
    architectures=tuple(DEFAULTS),
    names=NAMES,
    prefix="model.",
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # computed from the base
    described=described,
    obstacles=against,
    settings=settings_of,
)
