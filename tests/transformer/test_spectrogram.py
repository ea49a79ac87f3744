"""Log-mel spectrograms. record_speech.py makes the recorded values, and the live ones where it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxarch.transformer.spectrogram import fitted, log_mel, mel_filters, power_spectrum
from tests.transformer.record_speech import BANDS, PLACE, sounds, spectrograms

compiled = jax.jit(log_mel, static_argnums=1)


def tone(hertz: float, amplitude: float = 0.5, samples: int = 4_800) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(samples) / 16_000)).astype(np.float32)


def mels(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def hertz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def by_definition(samples: np.ndarray, bands: int) -> np.ndarray:
    """Frame by frame, frequency by frequency, band by band, in float64."""
    samples = samples.astype(np.float64)
    edges = [hertz(mels(8000) * i / (bands + 1)) for i in range(bands + 2)]
    filters = np.zeros((201, bands))
    for k in range(201):
        for band, (low, centre, high) in enumerate(zip(edges[:-2], edges[1:-1], edges[2:], strict=True)):
            f = 40 * k
            if low < f < high:
                height = (f - low) / (centre - low) if f <= centre else (high - f) / (high - centre)
                filters[k, band] = height * 2 / (high - low)
    n = np.arange(400)
    window = np.sin(np.pi * n / 400) ** 2
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(201), n) / 400)
    frames = []
    for frame in range(len(samples) // 160):
        indices = np.abs(160 * frame + n - 200)
        indices = np.where(indices < len(samples), indices, 2 * (len(samples) - 1) - indices)
        frames.append(np.log10(np.maximum(np.abs(fourier @ (window * samples[indices])) ** 2 @ filters, 1e-10)))
    decades = np.stack(frames)
    return (np.maximum(decades, decades.max() - 8) + 4) / 4


@pytest.mark.parametrize("bands", BANDS)
def test_it_is_the_definition_and_what_whisper_was_trained_on(bands):
    found = np.asarray(compiled(sounds(), bands))
    assert found.shape == (2, 30, bands)
    recorded = load_file(PLACE / "spectrogram.safetensors")[f"bands_{bands}"].swapaxes(1, 2)
    np.testing.assert_allclose(found, recorded, rtol=0, atol=1e-4)
    for row, samples in zip(found, sounds(), strict=True):
        np.testing.assert_allclose(row, by_definition(samples, bands), rtol=0, atol=1e-4)
        np.testing.assert_allclose(compiled(samples, bands), row, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bands", BANDS)
def test_transformers_agrees(bands):
    """Live, by its code for numpy and by that for torch."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = np.asarray(compiled(sounds(), bands)).swapaxes(1, 2)
    for expected in spectrograms(bands):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_power_of_a_tone():
    """Amplitude A at a frequency of the transform: half of it times the window's sum, 200; the neighbours half."""
    powers = power_spectrum(jnp.asarray(tone(1000, 0.5)))[5]
    np.testing.assert_allclose(powers[24:27], [0.25 * 50**2, 50**2, 0.25 * 50**2], rtol=1e-4)
    assert np.delete(powers, [24, 25, 26]).max() < 1e-4


@pytest.mark.parametrize(
    ("frequency", "bands", "band"),
    # From 0 to 8000 Hz are 15 + 27 log(8) / log(6.4) = 45.2457 mels: 0.55859 from centre to centre of 80 bands, 0.35074
    # of 128. 200 Hz are 3 mels, 1000 are 15, 6400 are 42: 5.37, 26.85 and 75.19 steps from 0 with 80 bands, and band i
    # has its centre at i + 1 of them.
    [(200, 80, 4), (1000, 80, 26), (6400, 80, 74), (1000, 128, 42), (6400, 128, 119)],
)
def test_a_tone_peaks_in_its_band(frequency, bands, band):
    assert set(np.asarray(compiled(tone(frequency), bands)[2:-2].argmax(axis=-1)).tolist()) == {band}


def test_each_band_passes_as_much_of_white_noise():
    """Triangles of area 1, sampled every 40 Hz: wide ones sum to 1 / 40."""
    for bands, first in (80, 50), (128, 90):
        filters = mel_filters(bands)
        assert filters.shape == (201, bands)
        np.testing.assert_allclose(filters[:, first:].sum(axis=0), 1 / 40, rtol=0.05)


def test_ten_times_louder_is_two_decades():
    samples = np.random.default_rng(0).normal(0, 0.01, 4_800).astype(np.float32)
    np.testing.assert_allclose(compiled(10 * samples, 80) - compiled(samples, 80), 2 / 4, atol=1e-5)


def test_a_hop_later_is_a_frame_later():
    samples = np.random.default_rng(0).normal(0, 0.1, 4_960).astype(np.float32)
    early, late = compiled(samples[160:], 80), compiled(samples[:-160], 80)
    assert early.shape[0] == 30
    # The outermost two see the reflected ends.
    np.testing.assert_allclose(early[2:-3], late[3:-2], rtol=0, atol=1e-5)


def test_eight_decades_below_the_loudest_is_the_floor():
    loud, silent = compiled(tone(1000), 80), compiled(np.zeros(4_800, np.float32), 80)
    np.testing.assert_allclose(loud.max() - loud.min(), 8 / 4, rtol=1e-6)
    np.testing.assert_allclose(silent, (-10 + 4) / 4)


def test_cut_or_filled_with_silence():
    samples = np.arange(1, 6, dtype=np.float32)
    np.testing.assert_array_equal(fitted(samples, 3), [1, 2, 3])
    np.testing.assert_array_equal(fitted(samples, 7), [1, 2, 3, 4, 5, 0, 0])
