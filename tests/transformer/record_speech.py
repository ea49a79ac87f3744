"""Makes the recorded values of the tests of speech: what `transformers` makes of the same sounds and weights.

    python tests/transformer/record_speech.py

In tests/transformer/pretrained/: spectrogram.safetensors, and whisper.safetensors with the tensors of a small random
model under their own names, what it answers, and its config.json and generation_config.json in the metadata.
Needs torch and transformers; the tests that read the files do not.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PLACE = Path(__file__).parent / "pretrained"
RATE, BANDS = 16_000, (80, 128)


def sounds() -> np.ndarray:
    """[2, samples], 0.3 s: a voice of many harmonics that breaks off, and a rising tone over faint noise."""
    seconds = np.arange(4_800) / RATE
    voice = sum(np.sin(2 * np.pi * 130 * k * seconds + k * k) / k for k in range(1, 50)) * 0.1 * (seconds < 0.2)
    rising = 0.4 * np.sin(2 * np.pi * (200 + 8_000 * seconds) * seconds)
    noise = np.random.default_rng(0).uniform(-1e-3, 1e-3, seconds.shape)
    return np.stack([voice, rising + noise]).astype(np.float32)


def spectrograms(bands: int) -> tuple[np.ndarray, np.ndarray]:
    """[2, bands, frames], by the code for numpy and by that for torch."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=bands)
    return (
        extractor._np_extract_fbank_features(sounds(), "cpu"),
        extractor._torch_extract_fbank_features(sounds(), "cpu"),
    )


# --- a model ------------------------------------------------------------------------------------

VOCAB, LENGTH, SOURCE, MELS = 60, 20, 10, 8
END, START, LANGUAGES, TASKS, NO_TIMESTAMPS = 15, 41, {"en": 42, "de": 43}, {"transcribe": 45, "translate": 44}, 46
SUPPRESSED, SUPPRESSED_FIRST = [1, 2, *range(41, 60)], [3, END]
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_mel_bins": MELS,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 24,
    "max_source_positions": SOURCE,
    "max_target_positions": LENGTH,
    "decoder_start_token_id": START,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), END),
}
FEATURES = np.random.default_rng(0).normal(size=(5, 2 * SOURCE, MELS)).astype(np.float32)
# Without the end, which is also the padding: its embedding learns nothing there.
TOKENS = np.random.default_rng(1).integers(16, VOCAB, (5, LENGTH)).astype(np.int32)
ASKED = [("en", "transcribe"), ("de", "translate")]
NEW_TOKENS, BEAMS = 10, 3


def published(kind: str = "WhisperForConditionalGeneration", seed: int = 0, **fields: Any) -> Any:
    """A random model with nothing in it at 0 or 1, whose tokens vary and whose texts end early now and then."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind)(transformers.WhisperConfig(**FIELDS | fields)).eval()
    for name, parameter in model.named_parameters():
        spread = 0.7 if ".layers." in name and "norm" not in name else 0.3
        torch.nn.init.normal_(parameter, float("norm.weight" in name), spread)
    torch.nn.init.normal_(model.get_decoder().embed_positions.weight)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=START,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), END),
        lang_to_id={f"<|{name}|>": token for name, token in LANGUAGES.items()},
        task_to_id=TASKS,
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=True,
        suppress_tokens=SUPPRESSED,
        begin_suppress_tokens=SUPPRESSED_FIRST,
        max_length=LENGTH,
    )
    return model


def answers(model: Any) -> dict[str, np.ndarray]:
    """Its logits for TOKENS, the language it hears, and what it writes and finds by beams where it is asked for ASKED.

    The logits are computed in float64: in float32 they are off by 6e-6 of the greatest.
    """
    import torch

    features = torch.tensor(FEATURES.swapaxes(1, 2))
    with torch.no_grad():
        inputs = {"input_features": features.double(), "decoder_input_ids": torch.tensor(TOKENS).long()}
        logits = copy.deepcopy(model).double()(**inputs).logits.float().numpy()
        found = {"logits": logits, "languages": model.detect_language(features).numpy()}
        for language, task in ASKED:
            asked = {"language": language, "task": task, "max_new_tokens": NEW_TOKENS}
            found[f"written_{language}_{task}"] = model.generate(features, **asked).numpy()
            searched = model.generate(features, **asked, num_beams=BEAMS, length_penalty=2.0).numpy()
            # It is as long as the longest of its rows.
            missing = NEW_TOKENS - searched.shape[1]
            found[f"searched_{language}_{task}"] = np.pad(searched, [(0, 0), (0, missing)], constant_values=END)
    return found


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    values = {f"bands_{bands}": spectrograms(bands)[0] for bands in BANDS}
    save_file(values, PLACE / "spectrogram.safetensors")
    model = published()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        texts = {name: (Path(folder) / f"{name}.json").read_text() for name in ("config", "generation_config")}
    save_file({**tensors, **answers(model)}, PLACE / "whisper.safetensors", texts)
    for name in "spectrogram", "whisper":
        print(name, (PLACE / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
