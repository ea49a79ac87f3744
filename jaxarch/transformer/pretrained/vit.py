"""The Vision Transformer (Dosovitskiy et al. 2021), as `ViTModel` and `ViTForImageClassification` name its parts."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.layers import ActivationName
from jaxarch.transformer.pretrained.family import Family, Settings, entry, must_be, sizes
from jaxarch.transformer.vision import Size, VisionConfig, VisionTransformer, vision

LAYER = "vit.encoder.layer.#."
NAMES = {
    "vit.embeddings.cls_token": "class_token",
    "vit.embeddings.position_embeddings": "positions",
    "vit.embeddings.patch_embeddings.projection.weight": "patches.kernel@2310",
    "vit.embeddings.patch_embeddings.projection.bias": "patches.bias",
    LAYER + "layernorm_before.weight": "layers_#.attention_norm.scale",
    LAYER + "layernorm_before.bias": "layers_#.attention_norm.bias",
    LAYER + "attention.attention.query.weight": "layers_#.attention.query.kernel.T",
    LAYER + "attention.attention.query.bias": "layers_#.attention.query.bias",
    LAYER + "attention.attention.key.weight": "layers_#.attention.key.kernel.T",
    LAYER + "attention.attention.key.bias": "layers_#.attention.key.bias",
    LAYER + "attention.attention.value.weight": "layers_#.attention.value.kernel.T",
    LAYER + "attention.attention.value.bias": "layers_#.attention.value.bias",
    LAYER + "attention.output.dense.weight": "layers_#.attention.out.kernel.T",
    LAYER + "attention.output.dense.bias": "layers_#.attention.out.bias",
    LAYER + "layernorm_after.weight": "layers_#.feed_forward_norm.scale",
    LAYER + "layernorm_after.bias": "layers_#.feed_forward_norm.bias",
    LAYER + "intermediate.dense.weight": "layers_#.feed_forward.up.kernel.T",
    LAYER + "intermediate.dense.bias": "layers_#.feed_forward.up.bias",
    LAYER + "output.dense.weight": "layers_#.feed_forward.down.kernel.T",
    LAYER + "output.dense.bias": "layers_#.feed_forward.down.bias",
    "vit.layernorm.weight": "norm.scale",
    "vit.layernorm.bias": "norm.bias",
    "vit.pooler.dense.weight": "head.dense.kernel.T",
    "vit.pooler.dense.bias": "head.dense.bias",
    "classifier.weight": "head.kernel.T",
    "classifier.bias": "head.bias",
}
# What `transformers` calls the activations; written is the first name of each.
ACTIVATIONS: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def model(settings: Settings, dtype: DTypeLike) -> VisionTransformer:
    dim, heads, channels = sizes({"num_channels": 3, **settings}, "hidden_size", "num_attention_heads", "num_channels")
    must_be(settings, "head_dim", dim // heads)
    config = VisionConfig(
        entry(settings, "num_hidden_layers", int),
        heads,
        dim,
        sides(settings, "patch_size", 16),
        entry(settings, "intermediate_size", int),
        activation(settings, "hidden_act", "gelu"),
        qkv_bias=entry(settings, "qkv_bias", bool, True),
        eps=entry(settings, "layer_norm_eps", float, 1e-12),
    )
    image = (*sides(settings, "image_size", 224), channels)
    if settings["architectures"][0] == "ViTForImageClassification":
        return vision(config, image, labels(settings), dtype=dtype)
    pooler = entry(settings, "pooler_output_size", int, dim), activation(settings, "pooler_act", "tanh")
    return vision(config, image, pooler=pooler, dtype=dtype)


def sides(settings: Settings, name: str, default: int) -> Size:
    """Height and width: two numbers, or one for both."""
    value = settings.get(name)
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ConfigError(f"{name} is {value!r}, not a height and a width.")
        height, width = value
    else:
        height = width = default if value is None else value
    return sizes({f"{name}[0]": height, f"{name}[1]": width}, f"{name}[0]", f"{name}[1]")  # type: ignore[return-value]


def activation(settings: Settings, name: str, default: str) -> ActivationName:
    must_be({name: default, **settings}, name, *ACTIVATIONS)
    return ACTIVATIONS[entry(settings, name, str, default)]


def labels(settings: Settings) -> tuple[str, ...]:
    """The names in `id2label`; where `num_labels` says otherwise, or there are none, LABEL_0, LABEL_1 ..."""
    names = settings.get("id2label")
    if names is not None and not (isinstance(names, dict) and sorted(map(str, range(len(names)))) == sorted(names)):
        raise ConfigError(f"id2label is {names!r}, not the names of the labels 0, 1 ...")
    count = entry(settings, "num_labels", int, len(names) if names else 2)
    if count < 1:
        raise ConfigError(f"num_labels {count} is below 1.")
    if names is None or len(names) != count:
        return tuple(f"LABEL_{number}" for number in range(count))
    return tuple(names[str(number)] for number in range(count))


def against(model: VisionTransformer) -> list[str]:
    found = [f"--model.pooling {model.config.pooling}"] if model.config.pooling != "class" else []
    return found if model.labels or model.pooler else [*found, "that it has no head"]


def settings_of(model: VisionTransformer) -> dict[str, Any]:
    config, (height, width, channels) = model.config, model.image
    ours: dict[str, str] = {name: theirs for theirs, name in reversed(ACTIVATIONS.items())}
    settings: dict[str, Any] = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if model.labels else "ViTModel"],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch[0] if config.patch[0] == config.patch[1] else list(config.patch),
        "num_channels": channels,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim or 4 * config.dim,
        "hidden_act": ours[config.activation],
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    if model.pooler is not None and not model.labels:
        settings |= {"pooler_output_size": model.pooler[0], "pooler_act": ours[model.pooler[1]]}
    if model.labels:
        settings["id2label"] = {str(number): name for number, name in enumerate(model.labels)}
        settings["label2id"] = {name: number for number, name in enumerate(model.labels)}
    return settings


VIT = Family(
    title="ViT",
    kind=VisionTransformer,
    architectures=("ViTForImageClassification", "ViTModel"),
    bodies=("ViTModel",),
    names=NAMES,
    prefix="vit.",
    heads=("classifier.", "vit.pooler."),
    copies={},
    ignored="",
    model=model,
    obstacles=against,
    settings=settings_of,
)
