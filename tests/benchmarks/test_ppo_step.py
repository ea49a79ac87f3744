"""The benchmark of PPO runs as a whole, tiny."""

from __future__ import annotations

import json

import pytest

from benchmarks import ppo_step


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_both_are_measured(seeds, tmp_path, monkeypatch):
    options = ["--envs", "2", "--length", "8", "--steps", "32", "--rounds", "1", "--seeds", str(seeds)]
    monkeypatch.setattr("sys.argv", ["ppo_step", *options, "--output", str(tmp_path)])
    ppo_step.main()
    ours, peer = json.loads((tmp_path / "ppo_step.json").read_text())["records"]
    assert (ours["implementation"], peer["implementation"], ours["seeds"]) == ("jaxarch", "peer", seeds)
    assert ours["speed_over_peer"]["median"] > 0 and peer["steps_per_second"]["median"] > 0
