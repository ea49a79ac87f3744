"""Peaks are measured once, kept by what they depend on, and never a reason to fail."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from jaxarch.run import peaks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(monkeypatch):
    """What was measured, type by type, each time a tenth more than the last."""
    calls = []

    def measure(dtype):
        calls.append(dtype)
        return 1e9 * 1.1 ** len(calls)

    monkeypatch.setattr(peaks, "_measured_flops", measure)
    return calls


def test_the_peak_is_near_what_numpy_reaches(cache):
    """Another library's product on the same cores: within a factor of ten, however busy the machine is."""
    said = []
    found = peaks.flops("float32", said.append)
    x = np.ones((1024, 1024), np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    assert 0.1 < found / (2 * 1024**3 / min(seconds)) < 10
    assert said == [f"measured, once for this machine: {found / 1e9:.4g} GFLOP/s in float32"]


def test_the_bandwidth_is_near_what_numpy_reaches(cache):
    found = peaks.bandwidth()
    x, seconds = np.zeros(2**25, np.float32), []
    for _ in range(5):
        start = time.perf_counter()
        np.add(x, 1, out=x)
        seconds.append(time.perf_counter() - start)
    assert 0.1 < found / (8 * 2**25 / min(seconds)) < 10
    assert peaks.bandwidth() == found, "kept"


def test_measured_once(cache, measured):
    said = []
    first = peaks.flops("float32", said.append)
    assert peaks.flops(np.float32, said.append) == first and measured == ["float32"] and len(said) == 1
    peaks.flops("bfloat16")
    assert measured == ["float32", "bfloat16"]
    assert len(json.loads((cache / "peaks.json").read_text())) == 2


def test_other_cores_are_another_machine(cache, measured, monkeypatch):
    peaks.flops("float32")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(peaks.backend, "processor", lambda: "another")
    peaks.flops("float32")
    assert len(measured) == 2
    assert any(name.startswith("another, 1 cores, jax") for name in json.loads((cache / "peaks.json").read_text()))


BROKEN = [b"", b"{", b"[1]", b"7", b"\xff", b"{KEY: null}", b"{KEY: -1.0}", b"{KEY: NaN}", b'{KEY: "9"}']


@pytest.mark.parametrize("content", BROKEN)
def test_what_is_broken_is_measured_again(content, cache, measured):
    peaks.flops("float32")
    name = next(iter(json.loads((cache / "peaks.json").read_text())))
    (cache / "peaks.json").write_bytes(content.replace(b"KEY", json.dumps(name).encode()))
    found = peaks.flops("float32")
    assert len(measured) == 2 and peaks.flops("float32") == found and len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(cache, measured):
    cache.write_text("a file where the folder should be")
    assert peaks.flops("float32") == pytest.approx(1.1e9)


def test_the_largest_is_kept(cache, measured):
    peaks.keep("float32", 5e9)
    peaks.keep("float32", 4e9)
    assert peaks.flops("float32") == 5e9 and not measured
    assert [path.name for path in cache.iterdir()] == ["peaks.json"]


def test_seconds_at_peak_by_hand(monkeypatch):
    monkeypatch.setattr(peaks, "flops", lambda dtype, say: {"float32": 100.0, "bfloat16": 400.0}[dtype])
    assert peaks.seconds_at_peak({"float32": 200.0, "bfloat16": 400.0}) == 3
    assert peaks.seconds_at_peak({}) == 0
