"""The benchmark of deep Q-learning as a whole, small."""

from __future__ import annotations

import json

import pytest

from benchmarks import dqn_step


def test_as_a_whole(tmp_path, monkeypatch, capsys):
    small = ("--width", 4, "--steps", 20, "--rounds", 1, "--output", tmp_path)
    monkeypatch.setattr("sys.argv", ["dqn_step", *map(str, small)])
    dqn_step.main()
    records = json.loads((tmp_path / "dqn_step.json").read_text())["records"]
    assert [record["implementation"] for record in records] == ["jaxarch", "peer"]
    for record in records:
        assert record["steps_per_second"]["median"] == pytest.approx(20 / record["seconds"]["median"])
    ours, peer = (record["seconds"]["median"] for record in records)
    assert records[0]["speed_over_peer"]["median"] == pytest.approx(peer / ours)
    assert "x as fast" in capsys.readouterr().out
