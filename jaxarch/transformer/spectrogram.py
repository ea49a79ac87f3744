"""The log-mel spectrogram that Whisper reads (Radford et al. 2022, sec. 2.2): samples to frames of bands.

At 16 kHz a frame is 25 ms under a Hann window, and one begins every 10 ms. All of it is computed with JAX, so that
it can be a part of a compiled step.
"""

from __future__ import annotations

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

RATE = 16_000  # samples a second
WINDOW = 400  # samples of a frame: 25 ms
HOP = 160  # samples from frame to frame: 10 ms
FLOOR = 1e-10  # of a band's energy, whose logarithm is taken
RANGE = 8.0  # decades of energy kept below the loudest


def log_mel(
    samples: Float[Array | np.ndarray, "*batch samples"], bands: int = 80
) -> Float[Array, "*batch frames bands"]:
    """One frame for each whole hop of samples in [-1, 1] at 16 kHz; frame i has its middle at sample 160 i.

    The logarithms to base 10 of the bands' energies, none more than 8 below the greatest of the recording, plus 4,
    over 4. At the ends the samples are reflected.
    """
    powers = power_spectrum(jnp.asarray(samples))
    decades = jnp.log10(jnp.maximum(powers @ mel_filters(bands), FLOOR))
    decades = jnp.maximum(decades, decades.max(axis=(-2, -1), keepdims=True) - RANGE)
    return (decades + 4) / 4


def fitted(samples: Float[np.ndarray, "samples"], count: int) -> Float[np.ndarray, "count"]:
    """The first `count` samples, or all of them and silence up to there."""
    return np.pad(samples[:count], (0, max(count - len(samples), 0)))


def power_spectrum(samples: Float[Array, "*batch samples"]) -> Float[Array, "*batch frames frequencies"]:
    """Squared magnitudes of the Fourier transform of each frame, under the window, at 0, 40, ... 8000 Hz."""
    frames, half = samples.shape[-1] // HOP, WINDOW // 2
    padded = jnp.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(half, half)], "reflect")
    framed = padded[..., HOP * np.arange(frames)[:, None] + np.arange(WINDOW)]
    # The periodic window, whose first sample alone is 0.
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(framed.dtype)
    spectrum = jnp.fft.rfft(framed * window)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


@lru_cache(maxsize=8)
def mel_filters(bands: int) -> Float32[np.ndarray, "frequencies bands"]:
    """Triangles between neighbouring centres on Slaney's scale of mels, from 0 to 8000 Hz, each of area 1.

    The scale (Slaney 1998, Auditory Toolbox) is linear up to 1000 Hz, 3 mels in 200 Hz, and logarithmic above,
    27 mels in a factor of 6.4.
    """
    frequencies = np.arange(WINDOW // 2 + 1) * (RATE / WINDOW)
    mels = np.linspace(0, _to_mels(RATE / 2), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - low) / (centre - low)
    falling = (high - frequencies[:, None]) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * 2 / (high - low)).astype(np.float32)


def _to_mels(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)
