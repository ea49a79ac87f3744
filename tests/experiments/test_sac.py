"""SAC from end to end: resumed bitwise, over replicas, what is learned, bad options."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import sac
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--env-steps", 12, "--eval-every", 6, "--checkpoint-every", 6, "--episodes", 2]
TINY += ["--agent.random-steps", 3, "--agent.batch-size", 4, "--agent.capacity", 5, "--agent.model.width", 8]


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    """Two replicas; the ring of the replay has come round before and after the stop."""
    options = ["--env-options", "max_steps_in_episode=5", "--replicas", 2, "--scan", 2]
    whole = run(sac, tmp_path, *TINY, *options, copied_at=6)
    assert_same(whole, resumed(sac, whole, 6))
    last = log(whole)[-1]
    assert {"train/entropy", "train/temperature", "train/value_loss", "eval/return"} <= last.keys()
    assert last["env/outside[Pendulum-v1]"] == 0 and last["eval/episode_length"] == 5


@pytest.mark.slow
def test_pendulum_is_learned(tmp_path):
    folder = run(sac, tmp_path, "--replicas", 5, "--scan", 200)
    result = json.loads((folder / "result.json").read_text())
    assert np.sort(result["eval/return/replicas"])[1:4].mean() >= -200


@pytest.mark.parametrize(
    "options, said",
    [
        (["--envs", 0], "--envs 0 is below 1"),
        (["--agent.batch-size", 0], "--agent.batch-size 0 is below 1"),
        (["--agent.temperature", 0], "--agent.temperature 0 is not above 0"),
        (["--env", "Pendulum"], "--env Pendulum: there are"),
    ],
)
def test_bad_options_are_told_in_a_line(options, said, tmp_path, capsys):
    assert exit_code(sac, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err
