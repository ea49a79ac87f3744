"""BERT (Devlin et al. 2019), bare and with the heads of `Encoder`."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.encoder import Encoder, EncoderConfig, Head, encoder
from jaxarch.transformer.pretrained.family import Family, Settings, entry, must_be, obstacles, sizes

NAMES = {
    "bert.embeddings.word_embeddings.weight": "embedding.embedding",
    "bert.embeddings.position_embeddings.weight": "positions.embedding",
    "bert.embeddings.token_type_embeddings.weight": "types.embedding",
    "bert.embeddings.LayerNorm.weight": "embedding_norm.scale",
    "bert.embeddings.LayerNorm.bias": "embedding_norm.bias",
    "bert.encoder.layer.#.attention.self.query.weight": "layers_#.attention.query.kernel.T",
    "bert.encoder.layer.#.attention.self.query.bias": "layers_#.attention.query.bias",
    "bert.encoder.layer.#.attention.self.key.weight": "layers_#.attention.key.kernel.T",
    "bert.encoder.layer.#.attention.self.key.bias": "layers_#.attention.key.bias",
    "bert.encoder.layer.#.attention.self.value.weight": "layers_#.attention.value.kernel.T",
    "bert.encoder.layer.#.attention.self.value.bias": "layers_#.attention.value.bias",
    "bert.encoder.layer.#.attention.output.dense.weight": "layers_#.attention.out.kernel.T",
    "bert.encoder.layer.#.attention.output.dense.bias": "layers_#.attention.out.bias",
    "bert.encoder.layer.#.attention.output.LayerNorm.weight": "layers_#.attention_norm.scale",
    "bert.encoder.layer.#.attention.output.LayerNorm.bias": "layers_#.attention_norm.bias",
    "bert.encoder.layer.#.intermediate.dense.weight": "layers_#.feed_forward.up.kernel.T",
    "bert.encoder.layer.#.intermediate.dense.bias": "layers_#.feed_forward.up.bias",
    "bert.encoder.layer.#.output.dense.weight": "layers_#.feed_forward.down.kernel.T",
    "bert.encoder.layer.#.output.dense.bias": "layers_#.feed_forward.down.bias",
    "bert.encoder.layer.#.output.LayerNorm.weight": "layers_#.feed_forward_norm.scale",
    "bert.encoder.layer.#.output.LayerNorm.bias": "layers_#.feed_forward_norm.bias",
    "bert.pooler.dense.weight": "pooler.kernel.T",
    "bert.pooler.dense.bias": "pooler.bias",
    "cls.predictions.transform.dense.weight": "transform.kernel.T",
    "cls.predictions.transform.dense.bias": "transform.bias",
    "cls.predictions.transform.LayerNorm.weight": "transform_norm.scale",
    "cls.predictions.transform.LayerNorm.bias": "transform_norm.bias",
    "cls.predictions.bias": "readout_bias",
    "classifier.weight": "classifier.kernel.T",
    "classifier.bias": "classifier.bias",
}
HEADS: dict[str, Head] = {
    "BertModel": "pooler",
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "classes",
    "BertForTokenClassification": "token_classes",
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
FIXED = {"positions": "learned", "placement": "post"}
FREE = "layers heads dim mlp mlp_dim types eps dropout remat scan_layers"


def model(settings: Settings, dtype: DTypeLike) -> Encoder:
    """An entry of our own, `pooler`, is false for a BertModel without one; to `transformers` that is an argument."""
    head = HEADS[settings["architectures"][0]]
    if head == "pooler" and not entry(settings, "pooler", bool, True):
        head = "none"
    if head == "masked_lm":
        must_be(settings, "tie_word_embeddings", True)
    must_be(settings, "hidden_act", *ACTIVATIONS)
    must_be(settings, "position_embedding_type", "absolute")
    must_be(settings, "is_decoder", False)
    must_be(settings, "add_cross_attention", False)
    config = EncoderConfig(
        *sizes(settings, "num_hidden_layers", "num_attention_heads", "hidden_size"),
        mlp=ACTIVATIONS[entry(settings, "hidden_act", str, "gelu")],  # type: ignore[reportArgumentType]
        mlp_dim=sizes(settings, "intermediate_size")[0],
        types=entry(settings, "type_vocab_size", int, 2),
        eps=entry(settings, "layer_norm_eps", float, 1e-12),
    )
    vocab, length = sizes(settings, "vocab_size", "max_position_embeddings")
    return encoder(config, vocab, length, dtype, head, labels(settings) if head.endswith("classes") else ())


def labels(settings: Settings) -> tuple[str, ...]:
    """The names of the classes in their order: LABEL_0 ... where num_labels is not their number."""
    named = settings.get("id2label") or {}
    try:
        names = tuple(str(named[number]) for number in sorted(named, key=int))
    except (TypeError, ValueError):
        raise ConfigError(f"id2label is {named!r}, not an object of names by number.") from None
    count = entry(settings, "num_labels", int, len(names) or 2)
    return names if len(names) == count else tuple(f"LABEL_{number}" for number in range(count))


def against(model: Encoder) -> list[str]:
    return obstacles(model.config, FIXED, FREE.split())


def settings_of(model: Encoder) -> dict[str, Any]:
    config = model.config
    architecture = next((name for name, head in HEADS.items() if head == model.head), "BertModel")
    settings: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [architecture],
        "vocab_size": model.vocab,
        "max_position_embeddings": model.length,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu_new" if config.mlp == "gelu_tanh" else config.mlp,
        "type_vocab_size": config.types,
        "layer_norm_eps": config.eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": True,
    }
    if model.head == "none":
        settings["pooler"] = False
    if model.labels:
        settings["id2label"] = {str(number): name for number, name in enumerate(model.labels)}
        settings["label2id"] = {name: number for number, name in enumerate(model.labels)}
    return settings


BERT = Family(
    title="BERT",
    kind=Encoder,
    architectures=tuple(HEADS),
    bodies=("BertModel",),
    names=NAMES,
    prefix="bert.",
    heads=("cls.", "classifier.", "bert.pooler."),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # Positions are numbers. Pretraining leaves a head for next sentences, and a pooler that a masked LM does not read.
    ignored=r"bert\.embeddings\.position_ids|cls\.seq_relationship\.(weight|bias)|bert\.pooler\.dense\.(weight|bias)",
    model=model,
    obstacles=against,
    settings=settings_of,
    older={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
)
