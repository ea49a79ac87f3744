"""Makes the recorded values of test_t5.py: small random models of `transformers`, and what they answer.

    python tests/transformer/record_t5.py

One file a variant in tests/transformer/pretrained/, as of record_pretrained.py, with `source`, `mask` and `tokens`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PLACE = Path(__file__).parent / "pretrained"
VOCAB = 17
# The eps of the norms is large, so that a wrong one shows; a head is not a part of the model's width.
T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "layer_norm_epsilon": 0.01,
    "decoder_start_token_id": 0,
}
V1_1 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# By name: the model's class and the fields of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5 | {"num_decoder_layers": 1}),
    "t5_v1_1": ("T5ForConditionalGeneration", V1_1 | {"d_kv": 4, "num_decoder_layers": 3}),
    "t5_unscaled": ("T5ForConditionalGeneration", V1_1 | {"feed_forward_proj": "gated-silu"}),  # but tied
    "mt5": ("MT5ForConditionalGeneration", T5),
    "t5_encoder": ("T5EncoderModel", T5 | {"feed_forward_proj": "gelu"}),
}
RECORDED = ("t5", "t5_v1_1", "t5_encoder")
RNG = np.random.default_rng(0)
# Longer than the greatest distance that has a bucket of its own.
SOURCE = RNG.integers(2, VOCAB, size=(2, 14)).astype(np.int32)
MASK = np.array([[1] * 14, [1] * 9 + [0] * 5], np.int32)
TOKENS = RNG.integers(2, VOCAB, size=(2, 13)).astype(np.int32)


def published(name: str) -> Any:
    """The random model of that variant, nothing in it at 0 or 1; the read-out of T5 1.1 and of mT5 is its own."""
    import torch
    import transformers

    kind, fields = VARIANTS[name]
    config = getattr(transformers, f"{kind.partition('5')[0]}5Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    if name in ("t5_v1_1", "mt5"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer(model: Any) -> Any:
    """Logits, or the last layer of an encoder alone."""
    import torch

    source, mask, tokens = (torch.tensor(array).long() for array in (SOURCE, MASK, TOKENS))
    if type(model).__name__ == "T5EncoderModel":
        return model(input_ids=source, attention_mask=mask).last_hidden_state
    return model(input_ids=source, attention_mask=mask, decoder_input_ids=tokens).logits


def main() -> None:
    import torch

    PLACE.mkdir(exist_ok=True)
    for name in RECORDED:
        model = published(name)
        with torch.no_grad():
            values = {"source": SOURCE, "mask": MASK, "tokens": TOKENS, "answer": answer(model).numpy()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
            config = json.dumps(json.loads((Path(folder) / "config.json").read_text()))
        save_file({**tensors, **values}, PLACE / f"{name}.safetensors", {"config": config})
        print(name, (PLACE / f"{name}.safetensors").stat().st_size, "lm_head.weight" in tensors)


if __name__ == "__main__":
    main()
