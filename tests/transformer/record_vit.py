"""Makes the recorded values of test_vision.py, as record_pretrained.py does for the models of text.

    python tests/transformer/record_vit.py

One file a variant in tests/transformer/pretrained/: the tensors of the folder under their own names, and `pictures`
`[batch, height, width, channels]` with what the model gives of them. Of the square one, also of larger pictures and of
smaller ones, its positions interpolated.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PLACE = Path(__file__).parent / "pretrained"
# The eps of the norms is large, so that a wrong one shows.
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "layer_norm_eps": 0.01,
    "image_size": [8, 12],
    "patch_size": [4, 2],
    "num_channels": 2,
    "id2label": {0: "cat", 1: "dog", 2: "eel"},
    "label2id": {"cat": 0, "dog": 1, "eel": 2},
}
SQUARE = VIT | {"image_size": 8, "patch_size": 2, "num_channels": 3}
BODY = SQUARE | {"qkv_bias": False, "hidden_act": "quick_gelu", "pooler_output_size": 6}
# By name: the model's class without its ViT, and the fields of its configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ForImageClassification", VIT),
    "vit_body": ("Model", BODY),
    "vit_relu": ("ForImageClassification", SQUARE | {"hidden_act": "relu"}),
    "vit_silu": ("Model", SQUARE | {"hidden_act": "silu", "pooler_act": "gelu"}),
    "vit_tanh": ("ForImageClassification", VIT | {"hidden_act": "gelu_new", "qkv_bias": False}),
}
RECORDED = ("vit", "vit_body")
OTHER_SIZES = {"larger": (12, 10), "smaller": (6, 6)}  # of pictures, for the square ones


def pictures(name: str, height: int = 0, width: int = 0) -> np.ndarray:
    fields = VARIANTS[name][1]
    size = fields["image_size"]
    own = size if isinstance(size, list) else (size, size)
    shape = (2, height or own[0], width or own[1], fields["num_channels"])
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def published(name: str) -> Any:
    """The random model of that variant, nothing in it at 0 or 1, so that no part is without effect."""
    import torch
    import transformers

    kind, fields = VARIANTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"ViT{kind}")(transformers.ViTConfig(**fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer(model: Any, pixels: np.ndarray, **options: Any) -> Any:
    """Logits, or what the pooler gives."""
    import torch

    found = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), **options)
    return found.logits if hasattr(found, "logits") else found.pooler_output


def main() -> None:
    import torch

    for name in RECORDED:
        model = published(name)
        extra = {"pictures": pictures(name)}
        with torch.no_grad():
            extra["answer"] = answer(model, extra["pictures"]).numpy()
            if name == "vit_body":
                for other, size in OTHER_SIZES.items():
                    found = answer(model, pictures(name, *size), interpolate_pos_encoding=True)
                    extra |= {f"{other}.pictures": pictures(name, *size), f"{other}.answer": found.numpy()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(Path(folder) / "model.safetensors")
            config = json.dumps(json.loads((Path(folder) / "config.json").read_text()))
        extra = {f"recorded.{key}": np.ascontiguousarray(value) for key, value in extra.items()}
        save_file({**tensors, **extra}, PLACE / f"{name}.safetensors", {"config": config})
        print(name, (PLACE / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
