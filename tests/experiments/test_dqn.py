"""Deep Q-learning from end to end: resumed bitwise, what is learned, bad options."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments import dqn, pqn
from jaxarch.run import load
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--env-steps", 24, "--envs", 2, "--eval-every", 6, "--checkpoint-every", 6, "--episodes", 2]
TINY += ["--env-options", "max_steps_in_episode=5", "--agent.model.width", 8]
EXTENDED = ["--agent.double", True, "--agent.prioritized", True, "--agent.horizon", 2]


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    """Two replicas; the ring of the replay has come round before and after the stop."""
    options = ["--agent.starts", 4, "--agent.replay", 10, "--agent.batch-size", 4, "--agent.target-every", 8, *EXTENDED]
    whole = run(dqn, tmp_path, *TINY, *options, "--replicas", 2, "--scan", 2, copied_at=6)
    assert_same(whole, resumed(dqn, whole, 6))
    last = log(whole)[-1]
    assert {"train/td_error", "train/value_loss", "eval/return"} <= last.keys()
    assert last["env/outside[CartPole-v1]"] == 0 and last["eval/episode_length"] <= 5
    # The replay stands in the newest checkpoint alone; the one before it can be evaluated, not gone on from.
    before, newest = (load(whole, step).state.learner for step in (6, "newest"))
    assert (
        not before.replay.reward.any() and newest.replay.reward.any() and before.params.keys() == newest.params.keys()
    )
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (before.params, newest.params))))
    # Of numbers 4 to 8, 8 and 2.
    assert json.loads((whole / "result.json").read_text())["parameters"] == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2


def test_pqn_stopped_and_resumed_is_uninterrupted(tmp_path):
    whole = run(pqn, tmp_path, *TINY, "--length", 2, "--agent.minibatches", 2, "--checkpoint-every", 3)
    assert_same(whole, resumed(pqn, whole, 3))
    assert {"train/td_error", "train/value_loss", "train/epsilon", "eval/return"} <= log(whole)[-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "least"), [("cartpole", 475), ("mountaincar", -120)])
def test_what_is_learned(preset, least, tmp_path):
    folder = run(dqn, tmp_path, preset, "--replicas", 5, "--scan", 500)
    result = json.loads((folder / "result.json").read_text())
    assert np.sort(result["eval/return/replicas"])[1:4].mean() >= least


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (dqn, ["--envs", 0], "--envs 0 is below 1"),
        (dqn, ["--agent.atoms", 1], "--agent.atoms 1 is below 2"),
        (dqn, ["--env", "Pendulum-v1"], "dqn chooses among discrete actions"),
        (pqn, ["--agent.minibatches", 3], "--agent.minibatches 3 does not divide the 2048 steps"),
    ],
)
def test_bad_options_are_told_in_a_line(module, options, said, tmp_path, capsys):
    assert exit_code(module, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err
