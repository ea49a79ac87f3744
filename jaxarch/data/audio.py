"""Sound as samples: WAV files, other sampling rates, and a synthesiser that says any words.

Samples are float32 in [-1, 1], one channel.
"""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jaxarch.run.protocol import ConfigError

Samples = Float32[np.ndarray, " samples"]


def read_wav(path: str | Path, rate: int | None = None) -> tuple[Samples, int]:
    """The samples of a WAV file, their channels averaged, and its sampling rate in Hz.

    rate: what it is to be resampled to; None leaves it as it is.
    Reads integers of 8, 16, 24 and 32 bits and floats of 32 and 64.
    Raises ConfigError where there is no such file, or it is no WAV file with samples.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of notes
            found, samples = wavfile.read(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # a damaged header brings whatever its numbers bring
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"{path} is not a WAV file that can be read ({reason}).") from None
    if samples.size == 0 or found < 1:
        raise ConfigError(f"{path} holds no sound: {samples.size} samples at {found} Hz.")
    samples = _scaled(samples)
    samples = samples if samples.ndim == 1 else samples.mean(axis=1)
    samples = samples.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ConfigError(f"{path} holds samples that are no numbers.")
    return (samples, int(found)) if rate is None else (resampled(samples, int(found), rate), rate)


def _scaled(samples: np.ndarray) -> np.ndarray:
    """As floats, full scale being 1. Integers of 24 bits come as those of 32, their last byte being 0."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float64) / 2.0 ** (8 * samples.dtype.itemsize - 1)
    return samples.astype(np.float64)


def resampled(samples: Samples, rate: int, wanted: int) -> Float32[np.ndarray, " resampled"]:
    """The same sound at another sampling rate, what lies above half of either rate being filtered out."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


# --- a synthesiser ------------------------------------------------------------------------------

# Of eSpeak NG's speak_lib.h.
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
SYNCHRONOUS, DO_NOT_EXIT, POSITION_CHARACTER, UTF8 = 2, 0x8000, 1, 1
SPEED, PITCH = 1, 3
BUSY = threading.Lock()  # the library has one state for the whole process


def spoken(text: str, voice: str = "en", speed: int = 175, pitch: int = 50) -> tuple[Samples, int]:
    """The text as eSpeak NG says it, and the sampling rate in Hz. The same arguments give the same samples.

    voice: a language or one of its voices, as "en", "en-us+f3", "de".
    speed: words a minute, from 80 to 450.
    pitch: from 0 to 100.
    Raises ConfigError where the extra `data` is not installed, and where there is no such voice.
    """
    pieces: list[np.ndarray] = []

    @CALLBACK
    def keep(samples: Any, count: int, events: Any) -> int:
        if count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with BUSY, _espeak() as (library, rate):
        if library.espeak_SetVoiceByName(voice.encode()):
            raise ConfigError(f"eSpeak NG has no voice {voice!r}; en, en-us+f3 or de would do.")
        library.espeak_SetSynthCallback(keep)
        library.espeak_SetParameter(SPEED, speed, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        content = ctypes.create_string_buffer(text.encode())
        size = ctypes.c_size_t(len(content))
        failed = library.espeak_Synth(content, size, 0, POSITION_CHARACTER, 0, UTF8, None, None)
        if failed or library.espeak_Synchronize() or not pieces:
            raise ConfigError(f"eSpeak NG could not say {text!r}.")
    return np.concatenate(pieces).astype(np.float32) / 2**15, rate


@contextmanager
def _espeak() -> Iterator[tuple[ctypes.CDLL, int]]:
    """The library, just loaded, and its sampling rate. What it has said shifts the phase of what it says next, and
    only unloading it (7 ms in all) makes it forget.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise ConfigError(
            "the synthesiser espeakng-loader is not installed; it comes with the extra: pip install 'jaxarch[data]'."
        ) from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), DO_NOT_EXIT)
        if rate < 1:
            raise ConfigError("eSpeak NG does not start; its data are not where espeakng-loader says.")
        yield library, rate
    finally:
        library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
