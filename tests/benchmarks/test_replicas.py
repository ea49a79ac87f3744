"""The benchmark of many seeds: both ways run what they say, a failure is one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "benchmarks.replicas", "--experiment", "tests.run.sketches.line"]


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path):
    options = ["--seeds", "2", "--steps", "4", "--scan", "2", "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "replicas.json").read_text())["records"]
    assert [(r["implementation"], r["pass"]) for r in records] == [
        ("replicas", "cold"),
        ("runs", "cold"),
        ("replicas", "warm"),
        ("runs", "warm"),
    ]
    one, other = (r["seconds"]["median"] for r in records[2:])
    assert records[2]["ratio"]["median"] == pytest.approx(other / one)


def test_a_run_that_fails_is_one_line(tmp_path):
    done = subprocess.run([*COMMAND[:4], "tests.nothing", "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "tests.nothing" in done.stderr
