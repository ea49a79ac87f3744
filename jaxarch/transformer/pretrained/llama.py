"""Llama (Touvron et al. 2023) and what differs from it by an option: Mistral, Qwen2 and Qwen3.

Mistral gives the attention a window, Qwen2 biases to queries, keys and values, Qwen3 a norm to each head's queries and
keys; the layers of both may differ in their windows.
"""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder, ModelConfig, decoder, in_turn
from jaxarch.transformer.pretrained.family import Family, Settings, entry, must_be, obstacles, sizes
from jaxarch.transformer.pretrained.rotary import read_rotary, write_rotary

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
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
FIXED = {"positions": "rotary", "norm": "rms", "mlp": "swiglu"}
FREE = (
    "layers heads dim kv_heads head_width window mlp_dim rotary qk_norm tied bias attention_bias eps dropout remat "
    "scan_layers"
)
FULL, SLIDING = "full_attention", "sliding_attention"


def model(settings: Settings, dtype: DTypeLike) -> Decoder:
    architecture = settings["architectures"][0]
    settings = DEFAULTS[architecture] | dict(settings)
    must_be(settings, "hidden_act", "silu", "swish")
    bias = "none"
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        bias = "all" if entry(settings, "attention_bias", bool, False) else "none"
    elif architecture == "Qwen2ForCausalLM":
        bias = "qkv"
    everywhere = architecture == "LlamaForCausalLM" and entry(settings, "mlp_bias", bool, False)
    if everywhere and bias == "none":
        raise ConfigError("mlp_bias True with attention_bias False cannot be expressed here, only with both True.")
    config = ModelConfig(
        **shape(settings),
        window=read_window(settings, architecture),
        mlp="swiglu",
        norm="rms",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=entry(settings, "tie_word_embeddings", bool, False),
        bias=everywhere,
        attention_bias="none" if everywhere else bias,
    )
    vocab, length = sizes(settings, "vocab_size", "max_position_embeddings")
    return decoder(config, vocab, length, dtype)


def shape(settings: Settings) -> dict[str, Any]:
    """The options of a `ModelConfig` that Gemma says alike."""
    heads, dim = entry(settings, "num_attention_heads", int), entry(settings, "hidden_size", int)
    width = entry(settings, "head_dim", int, 0)
    return {
        "layers": entry(settings, "num_hidden_layers", int),
        "heads": heads,
        "dim": dim,
        "kv_heads": entry(settings, "num_key_value_heads", int, heads),
        "head_width": 0 if width * heads == dim else width,
        "mlp_dim": entry(settings, "intermediate_size", int),
        "positions": "rotary",
        "rotary": read_rotary(settings),
        "eps": entry(settings, "rms_norm_eps", float, 1e-6),
    }


def read_window(settings: Settings, architecture: str) -> tuple[int, ...]:
    """Those of the layers, in turn. Raises ConfigError."""
    layers, window = entry(settings, "num_hidden_layers", int), entry(settings, "sliding_window", int, 0)
    kinds = [FULL] * layers
    if architecture == "MistralForCausalLM":
        kinds = [SLIDING if window else FULL] * layers
    elif architecture == "Gemma2ForCausalLM":
        kinds = [FULL if number % 2 else SLIDING for number in range(layers)]
    elif architecture != "LlamaForCausalLM" and entry(settings, "use_sliding_window", bool, False):
        full = entry(settings, "max_window_layers", int, 28) if window else layers
        kinds = [SLIDING if number >= full else FULL for number in range(layers)]
    elif architecture != "LlamaForCausalLM":
        window = 0
    said = settings.get("layer_types")
    if said is not None and (not isinstance(said, list) or len(said) != layers):
        raise ConfigError(f"layer_types is {said!r}, not a list of {layers}.")
    # Of these two `transformers` does not read it.
    fixed = architecture in ("LlamaForCausalLM", "MistralForCausalLM")
    for kind in said or ():
        if kind not in (kinds[:1] if fixed else (FULL, SLIDING)):
            expressed = kinds[0] if fixed else f"{FULL} or {SLIDING}"
            raise ConfigError(f"layer_types {kind} cannot be expressed here, only {expressed}.")
    kinds = said or kinds
    if SLIDING in kinds and window < 1:
        raise ConfigError(f"layer_types {SLIDING} needs a window, and sliding_window is none.")
    return in_turn([window if kind == SLIDING else 0 for kind in kinds])


def write_window(config: ModelConfig) -> dict[str, Any]:
    each = [config.windows[number % len(config.windows)] for number in range(config.layers)]
    return {"sliding_window": max(each) or None, "layer_types": [SLIDING if window else FULL for window in each]}


def against(model: Decoder) -> list[str]:
    config = model.config
    found = obstacles(config, FIXED, FREE.split())
    name = name_of(config)
    biases = config.bias, config.attention_bias
    if name == "Qwen3" and biases not in ((False, "none"), (False, "all")):
        found.append("--model.qk-norm with biases of other layers than all of the attention")
    if name == "Mistral" and biases != (False, "none"):
        found.append("--model.window with biases of other layers than queries, keys and values")
    if name == "Mistral" and len(config.windows) > 1:
        found.append("--model.window that differs from layer to layer")
    return found + two_windows(config)


def two_windows(config: ModelConfig) -> list[str]:
    return ["--model.window of two lengths beside 0"] if len({*config.windows} - {0}) > 1 else []


def name_of(config: ModelConfig) -> str:
    """A Mistral without a window is a Llama, and is written as one."""
    if config.qk_norm:
        return "Qwen3"
    if config.attention_bias == "qkv" and not config.bias:
        return "Qwen2"
    return "Mistral" if any(config.windows) else "Llama"


def settings_of(model: Decoder) -> dict[str, Any]:
    config, name = model.config, name_of(model.config)
    settings = settings_of_shape(model) | {
        "model_type": name.lower(),
        "architectures": [f"{name}ForCausalLM"],
        "hidden_act": "silu",
    }
    window = write_window(config)
    if name in ("Qwen2", "Qwen3"):
        full = window["layer_types"].index(SLIDING) if any(config.windows) else config.layers
        settings |= window | {"use_sliding_window": any(config.windows), "max_window_layers": full}
    if name == "Mistral":
        settings |= {"sliding_window": window["sliding_window"]}
    if name in ("Llama", "Qwen3"):
        settings |= {"attention_bias": config.bias or config.attention_bias == "all", "mlp_bias": config.bias}
    return settings


def settings_of_shape(model: Decoder) -> dict[str, Any]:
    """The entries of a config.json that Gemma says alike."""
    config = model.config
    return {
        "vocab_size": model.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        **write_rotary(config.rotary, model.length),
    }


LLAMA = Family(
    title="Llama, Mistral, Qwen2 or Qwen3",
    kind=Decoder,
    architectures=tuple(DEFAULTS),
    bodies=tuple(name.replace("ForCausalLM", "Model") for name in DEFAULTS),
    names=NAMES,
    prefix="model.",
    heads=("lm_head.",),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # computed from the base
    model=model,
    obstacles=against,
    settings=settings_of,
)
