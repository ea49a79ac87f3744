"""Makes the recorded values of the tests of speech: what `transformers` makes of the same sounds and weights.

    python tests/transformer/record_speech.py

Needs torch and transformers; the tests that read the files do not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    values = {f"bands_{bands}": spectrograms(bands)[0] for bands in BANDS}
    save_file(values, PLACE / "spectrogram.safetensors")
    for file in (PLACE / "spectrogram.safetensors",):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
