"""GPT-2 (Radford et al. 2019), as `GPT2LMHeadModel` names its parts."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from jaxarch.transformer.decoder import Decoder, ModelConfig, decoder
from jaxarch.transformer.pretrained.family import Family, Settings, entry, must_be, obstacles, sizes

NAMES = {
    "transformer.wte.weight": "embedding.embedding",
    "transformer.wpe.weight": "positions.embedding",
    "transformer.h.#.ln_1.weight": "layers_#.attention_norm.scale",
    "transformer.h.#.ln_1.bias": "layers_#.attention_norm.bias",
    "transformer.h.#.attn.c_attn.weight": (
        "layers_#.attention.query.kernel",
        "layers_#.attention.key.kernel",
        "layers_#.attention.value.kernel",
    ),
    "transformer.h.#.attn.c_attn.bias": (
        "layers_#.attention.query.bias",
        "layers_#.attention.key.bias",
        "layers_#.attention.value.bias",
    ),
    "transformer.h.#.attn.c_proj.weight": "layers_#.attention.out.kernel",
    "transformer.h.#.attn.c_proj.bias": "layers_#.attention.out.bias",
    "transformer.h.#.ln_2.weight": "layers_#.feed_forward_norm.scale",
    "transformer.h.#.ln_2.bias": "layers_#.feed_forward_norm.bias",
    "transformer.h.#.mlp.c_fc.weight": "layers_#.feed_forward.up.kernel",
    "transformer.h.#.mlp.c_fc.bias": "layers_#.feed_forward.up.bias",
    "transformer.h.#.mlp.c_proj.weight": "layers_#.feed_forward.down.kernel",
    "transformer.h.#.mlp.c_proj.bias": "layers_#.feed_forward.down.bias",
    "transformer.ln_f.weight": "norm.scale",
    "transformer.ln_f.bias": "norm.bias",
    "lm_head.weight": "readout.kernel.T",
}
FIXED = {"positions": "learned", "norm": "layer", "mlp": "gelu"}
# Without biases a model is one whose biases are 0; the base of rotary positions has no effect.
FREE = "layers heads dim kv_heads head_width mlp_dim tied bias attention_bias eps rotary dropout remat scan_layers"


def model(settings: Settings, dtype: DTypeLike) -> Decoder:
    # Three names of the tanh form.
    must_be(settings, "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    must_be(settings, "scale_attn_weights", True)
    must_be(settings, "scale_attn_by_inverse_layer_idx", False)
    must_be(settings, "add_cross_attention", False)
    config = ModelConfig(
        entry(settings, "n_layer", int),
        entry(settings, "n_head", int),
        entry(settings, "n_embd", int),
        mlp_dim=entry(settings, "n_inner", int, 0),
        tied=entry(settings, "tie_word_embeddings", bool, True),
        bias=True,
        eps=entry(settings, "layer_norm_epsilon", float, 1e-5),
    )
    vocab, length = sizes(settings, "vocab_size", "n_positions")
    return decoder(config, vocab, length, dtype)


def against(model: Decoder) -> list[str]:
    config = model.config
    found = obstacles(config, FIXED, FREE.split())
    if config.kv_heads not in (0, config.heads):
        found.append(f"--model.kv-heads {config.kv_heads}")
    if config.head_dim * config.heads != config.dim:
        found.append(f"--model.head-width {config.head_width}")
    return found


def settings_of(model: Decoder) -> dict[str, Any]:
    config = model.config
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab,
        "n_positions": model.length,
        "n_embd": config.dim,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_dim or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.eps,
        "tie_word_embeddings": config.tied,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


GPT2 = Family(
    title="GPT-2",
    kind=Decoder,
    architectures=("GPT2LMHeadModel",),
    bodies=("GPT2Model",),
    names=NAMES,
    prefix="transformer.",
    heads=("lm_head.",),
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
    model=model,
    obstacles=against,
    settings=settings_of,
)
