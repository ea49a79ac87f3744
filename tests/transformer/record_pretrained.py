"""Makes the recorded values of test_pretrained.py: small random models of `transformers`, and what they answer.

    python tests/transformer/record_pretrained.py

One file a variant in tests/transformer/pretrained/: the tensors of the folder under their own names, `tokens` and
`logits`; config.json is in the file's metadata. Needs torch and transformers; the tests that read the files do not.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PLACE = Path(__file__).parent / "pretrained"
VOCAB, LENGTH = 17, 12
# The eps of the norms is large, so that a wrong one shows.
GPT2 = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 0.01}
LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.01,
}
WIDE = {"head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}


def scaled(kind: str, base: float = 50.0, factor: float = 4.0, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, "factor": factor, **numbers}}


# Scales shorter than the text, so that lengths beyond those of training are seen, and frequencies of all three kinds:
# kept, divided and between.
LLAMA3 = scaled("llama3", 5.0, original_max_position_embeddings=11, low_freq_factor=0.5, high_freq_factor=1.5)
YARN = scaled("yarn", 5.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.5)
GEMMA = LLAMA | WIDE | {"pad_token_id": None, "num_attention_heads": 2, "num_key_value_heads": 1}
# By name: the model's class without LMHeadModel or ForCausalLM, and the fields of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2_free": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 20}),
    "llama": ("Llama", LLAMA),
    "llama_tied": ("Llama", LLAMA | WIDE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", LLAMA | LLAMA3 | {"head_dim": 6, "attention_bias": True}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "mistral_window": ("Mistral", LLAMA | scaled("linear") | {"sliding_window": 5}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        LLAMA
        | scaled("dynamic")
        | {"max_position_embeddings": 8, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", LLAMA | WIDE),
    "qwen3_window": (
        "Qwen3",
        LLAMA
        | YARN
        | {"head_dim": 6, "attention_bias": True, "use_sliding_window": True, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        GEMMA
        | {"sliding_window": 4, "query_pre_attn_scalar": 11, "final_logit_softcapping": 3.0}
        | {"attn_logit_softcapping": 2.0},
    ),
}
RECORDED = [name for name in VARIANTS if name != "mistral"]  # without a window it is a Llama in all but its name
TOKENS = np.random.default_rng(0).integers(0, VOCAB, size=(2, LENGTH)).astype(np.int32)


def published(name: str) -> Any:
    """The random model of that variant, nothing in it at 0 or 1, so that no part is without effect."""
    import torch
    import transformers

    kind, fields = VARIANTS[name]
    fields = copy.deepcopy(fields)  # `transformers` writes into them
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**fields, **ends)
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def main() -> None:
    import torch

    PLACE.mkdir(exist_ok=True)
    for name in RECORDED:
        model = published(name)
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS).long()).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
            config = json.dumps(json.loads((Path(folder) / "config.json").read_text()))
        save_file({**tensors, "tokens": TOKENS, "logits": logits}, PLACE / f"{name}.safetensors", {"config": config})
        print(name, (PLACE / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
