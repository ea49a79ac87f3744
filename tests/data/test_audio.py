"""Samples out of WAV files, and out of the synthesiser where it is installed."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from jaxarch.data.audio import read_wav, resampled, spoken
from jaxarch.run.protocol import ConfigError


def riff(kind: int, bits: int, content: bytes, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV file written out by hand: kind 1 holds integers, 3 floats."""
    width = bits // 8 * channels
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * width, width, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@pytest.mark.parametrize(
    ("kind", "bits", "content", "expected"),
    [
        (1, 8, bytes([128, 192, 0, 255]), [0, 0.5, -1, 127 / 128]),
        (1, 16, struct.pack("<4h", 0, 2**14, -(2**15), 2**15 - 1), [0, 0.5, -1, 1 - 2**-15]),
        (1, 24, b"\0\0\0" + b"\0\0\x40" + b"\0\0\x80" + b"\x01\0\0", [0, 0.5, -1, 2**-23]),
        (1, 32, struct.pack("<3i", 2**30, -(2**31), 2**8), [0.5, -1, 2**-23]),
        (3, 32, struct.pack("<3f", 0.5, -1, 1e-9), [0.5, -1, np.float32(1e-9)]),
        (3, 64, struct.pack("<3d", 0.25, -1, 1e-9), [0.25, -1, np.float32(1e-9)]),
    ],
)
def test_each_kind_of_number(kind, bits, content, expected, tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(riff(kind, bits, content, rate=11_025))
    samples, rate = read_wav(tmp_path / "a.wav")
    assert rate == 11_025 and samples.dtype == np.float32
    np.testing.assert_array_equal(samples, np.array(expected, np.float32))


def test_channels_are_averaged_and_notes_passed_over(tmp_path: Path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(struct.pack("<4h", 2**14, 0, -(2**13), -(2**13)))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes() + b"note\x04\0\0\0abcd")
    samples, rate = read_wav(str(tmp_path / "a.wav"))
    assert rate == 8_000
    np.testing.assert_array_equal(samples, np.array([0.25, -0.25], np.float32))


def test_another_rate_keeps_the_sound():
    """A tone of 440 Hz is itself at any rate above 880 Hz, away from the ends; one of 6 kHz is gone at 8 kHz."""

    def tone(hertz: float, rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)

    for rate, wanted in (22_050, 16_000), (8_000, 16_000), (16_000, 16_000), (44_100, 8_000):
        found = resampled(tone(440, rate), rate, wanted)
        assert found.dtype == np.float32 and len(found) == wanted
        np.testing.assert_allclose(found[500:-500], tone(440, wanted)[500:-500], atol=3e-3)
    assert np.abs(resampled(tone(6_000, 16_000), 16_000, 8_000)[500:-500]).max() < 1e-2


def test_a_file_is_read_at_the_rate_that_is_asked_for(tmp_path: Path):
    samples = np.sin(np.arange(4_410) / 10).astype(np.float32)
    (tmp_path / "a.wav").write_bytes(riff(3, 32, samples.tobytes(), rate=44_100))
    found, rate = read_wav(tmp_path / "a.wav", 16_000)
    assert rate == 16_000
    np.testing.assert_array_equal(found, resampled(samples, 44_100, 16_000))


GOOD = riff(1, 16, struct.pack("<4h", 1, 2, 3, 4))
BAD = {
    "cannot read {}: No such file or directory.": None,
    "{} is not a WAV file that can be read (File format b'ID3\\x04' not understood.": b"ID3\x04" + bytes(40),
    "{} is not a WAV file that can be read (": b"",
    "{} is not a WAV file that can be read (unpack": GOOD[:22],
    "{} is not a WAV file that can be read (Unknown wave file format: DOLBY_AC2": riff(0x30, 16, b"\0\0"),
    "{} holds no sound: 0 samples at 16000 Hz.": riff(1, 16, b""),
    "{} holds samples that are no numbers.": riff(3, 32, struct.pack("<f", np.nan)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_read_is_one_line(message, tmp_path: Path):
    path = tmp_path / "a.wav"
    content = BAD[message]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_wav(path)
    assert str(caught.value).startswith(message.format(path)) and "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read .*: Is a directory."):
        read_wav(tmp_path)


def test_the_synthesiser():
    """The same words are the same samples, whatever was said between; slower speech is longer."""
    pytest.importorskip("espeakng_loader")
    samples, rate = spoken("one two three")
    assert rate == 22_050 and 0.5 < len(samples) / rate < 3 and 0.1 < np.abs(samples).max() <= 1
    other, _ = spoken("eins zwei drei", voice="de+f3", pitch=80)
    assert other.shape != samples.shape
    np.testing.assert_array_equal(spoken("one two three")[0], samples)
    assert len(spoken("one two three", speed=100)[0]) > 1.3 * len(samples)
    with pytest.raises(ConfigError, match="no voice 'xx'"):
        spoken("one", voice="xx")


def test_without_the_synthesiser(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match="espeakng-loader is not installed"):
        spoken("one")
