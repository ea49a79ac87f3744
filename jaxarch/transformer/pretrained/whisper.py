"""Whisper (Radford et al. 2022)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run.command import write_json
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.pretrained.family import Family, Settings, entry, must_be, obstacles, sizes
from jaxarch.transformer.pretrained.tensors import read_json
from jaxarch.transformer.spectrogram import HOP, RATE, WINDOW
from jaxarch.transformer.speech import SpeechConfig, Whisper, whisper
from jaxarch.transformer.transcription import Markers, named_markers

ATTENTION = {
    "q_proj.weight": "query.kernel.T",
    "q_proj.bias": "query.bias",
    "k_proj.weight": "key.kernel.T",
    "v_proj.weight": "value.kernel.T",
    "v_proj.bias": "value.bias",
    "out_proj.weight": "out.kernel.T",
    "out_proj.bias": "out.bias",
}
LAYER = {
    **{f"self_attn.{theirs}": f"attention.{ours}" for theirs, ours in ATTENTION.items()},
    "self_attn_layer_norm.weight": "attention_norm.scale",
    "self_attn_layer_norm.bias": "attention_norm.bias",
    **{f"encoder_attn.{theirs}": f"cross.{ours}" for theirs, ours in ATTENTION.items()},
    "encoder_attn_layer_norm.weight": "cross_norm.scale",
    "encoder_attn_layer_norm.bias": "cross_norm.bias",
    "fc1.weight": "feed_forward.up.kernel.T",
    "fc1.bias": "feed_forward.up.bias",
    "fc2.weight": "feed_forward.down.kernel.T",
    "fc2.bias": "feed_forward.down.bias",
    "final_layer_norm.weight": "feed_forward_norm.scale",
    "final_layer_norm.bias": "feed_forward_norm.bias",
}
NAMES = {
    "model.encoder.conv1.weight": "encoder.first.kernel@210",
    "model.encoder.conv1.bias": "encoder.first.bias",
    "model.encoder.conv2.weight": "encoder.second.kernel@210",
    "model.encoder.conv2.bias": "encoder.second.bias",
    "model.encoder.embed_positions.weight": "encoder.positions",
    "model.decoder.embed_tokens.weight": "decoder.embedding.embedding",
    "model.decoder.embed_positions.weight": "decoder.positions.embedding",
    **{
        f"model.{side}.layers.#.{theirs}": f"{side}.layers_#.{ours}"
        for side in ("encoder", "decoder")
        for theirs, ours in LAYER.items()
    },
    **{
        f"model.{side}.layer_norm.{theirs}": f"{side}.norm.{ours}"
        for side in ("encoder", "decoder")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    },
    "proj_out.weight": "decoder.readout.kernel.T",
}
FREE = "layers decoder_layers heads decoder_heads dim mlp_dim decoder_mlp_dim bands readout dropout remat scan_layers"


def model(settings: Settings, dtype: DTypeLike) -> Whisper:
    must_be(settings, "activation_function", "gelu")
    tied = entry(settings, "tie_word_embeddings", bool, True)
    config = SpeechConfig(
        layers=entry(settings, "encoder_layers", int),
        decoder_layers=entry(settings, "decoder_layers", int),
        heads=entry(settings, "encoder_attention_heads", int),
        decoder_heads=entry(settings, "decoder_attention_heads", int),
        dim=entry(settings, "d_model", int),
        mlp_dim=entry(settings, "encoder_ffn_dim", int),
        decoder_mlp_dim=entry(settings, "decoder_ffn_dim", int),
        bands=entry(settings, "num_mel_bins", int, 80),
        readout="none" if settings["architectures"][0] == "WhisperModel" else "tied" if tied else "free",
    )
    vocab, length, source = sizes(settings, "vocab_size", "max_target_positions", "max_source_positions")
    return whisper(config, vocab, length, source, dtype)


def against(model: Whisper) -> list[str]:
    return obstacles(model.config, {}, FREE.split())


def settings_of(model: Whisper) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["WhisperModel" if config.readout == "none" else "WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": model.vocab,
        "max_target_positions": model.length,
        "max_source_positions": model.source,
        "num_mel_bins": config.bands,
        "d_model": config.dim,
        "encoder_layers": config.layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.decoder_heads,
        "encoder_ffn_dim": config.mlp_dim or 4 * config.dim,
        "decoder_ffn_dim": config.decoder_mlp_dim or 4 * config.dim,
        "activation_function": "gelu",
        "dropout": config.dropout,
        "tie_word_embeddings": config.readout != "free",
        # The default, 50256, is no token of a small vocabulary.
        **({} if model.vocab > 50_256 else {"pad_token_id": None}),
    }


# --- what stands beside the weights -------------------------------------------------------------

GENERATION, PREPROCESSOR = "generation_config.json", "preprocessor_config.json"


def load_markers(folder: str | Path, tokenizer: Tokenizer | None = None) -> Markers:
    """The tokens that frame a transcription, by the folder's generation_config.json, or else by config.json and the
    names that the tokeniser has for them.

    Raises ConfigError where they are not found, and where the folder's spectrogram is another one than `log_mel`.
    """
    folder = Path(folder)
    if (folder / PREPROCESSOR).exists():
        try:
            found = read_json(folder / PREPROCESSOR)
            for name, value in (("sampling_rate", RATE), ("n_fft", WINDOW), ("hop_length", HOP)):
                must_be(found, name, value)
        except ConfigError as error:
            raise ConfigError(f"{folder / PREPROCESSOR}: {error}") from None
    if not (folder / GENERATION).exists() and tokenizer is not None:
        suppressed = _suppressed(read_json(folder / "config.json"))
        return named_markers(tokenizer)._replace(suppressed=suppressed[0], suppressed_first=suppressed[1])
    file = GENERATION if (folder / GENERATION).exists() else "config.json"
    settings = read_json(folder / file)
    end = settings.get("eos_token_id")
    settings["eos_token_id"] = end[0] if isinstance(end, list) and end else end
    try:
        return Markers(
            entry(settings, "decoder_start_token_id", int),
            entry(settings, "eos_token_id", int),
            tuple((name.strip("<|>"), token) for name, token in (settings.get("lang_to_id") or {}).items()),
            tuple((settings.get("task_to_id") or {}).items()),
            settings.get("no_timestamps_token_id"),
            *_suppressed(settings),
        )
    except ConfigError as error:
        raise ConfigError(f"{folder / file}: {error}") from None


def _suppressed(settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(settings.get("suppress_tokens") or ()), tuple(settings.get("begin_suppress_tokens") or ())


def save_markers(folder: str | Path, model: Whisper, markers: Markers) -> None:
    """Writes, beside what `save_pretrained` writes, generation_config.json and preprocessor_config.json."""
    known: dict[str, Any] = {
        "no_timestamps_token_id": markers.no_timestamps,
        "lang_to_id": {f"<|{name}|>": token for name, token in markers.languages},
        "task_to_id": dict(markers.tasks),
    }
    generation = {
        "decoder_start_token_id": markers.start,
        "eos_token_id": markers.end,
        "pad_token_id": markers.end,
        "bos_token_id": markers.end,
        "is_multilingual": bool(markers.languages),
        "suppress_tokens": list(markers.suppressed),
        "begin_suppress_tokens": list(markers.suppressed_first),
        "max_length": model.length,
        # What is there at all is used there.
        **{name: value for name, value in known.items() if value not in (None, {})},
    }
    write_json(Path(folder) / GENERATION, generation)
    seconds = 2 * model.source * HOP / RATE
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": model.config.bands,
        "sampling_rate": RATE,
        "n_fft": WINDOW,
        "hop_length": HOP,
        "chunk_length": int(seconds) if seconds == int(seconds) else seconds,
    }
    write_json(Path(folder) / PREPROCESSOR, preprocessor)


WHISPER = Family(
    title="Whisper",
    kind=Whisper,
    architectures=("WhisperForConditionalGeneration", "WhisperModel"),
    bodies=("WhisperModel",),
    names=NAMES,
    prefix="model.",
    heads=("proj_out.",),
    copies={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ignored=r"(?!)",
    model=model,
    obstacles=against,
    settings=settings_of,
)
