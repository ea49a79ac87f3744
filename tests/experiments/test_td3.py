"""TD3 and DDPG from end to end: resumed bitwise, what is learned, bad options."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments import td3
from jaxarch.run import load
from jaxarch.run.command import weights_of
from jaxarch.run.console import Console
from jaxarch.run.program import Programs, members
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--env-steps", 12, "--eval-every", 6, "--checkpoint-every", 6, "--episodes", 2]
TINY += [
    "--agent.random-steps",
    3,
    "--agent.batch-size",
    4,
    "--agent.capacity",
    5,
    "--agent.model.width",
    8,
    "--agent.model.layers",
    1,
]


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    """The ring of the replay has come round before and after the stop."""
    whole = run(td3, tmp_path, *TINY, "--env-options", "max_steps_in_episode=5", copied_at=6)
    assert_same(whole, resumed(td3, whole, 6))
    last = log(whole)[-1]
    assert {"train/td_error", "train/policy_loss", "train/value_loss", "eval/return"} <= last.keys()
    # The networks alone are what another run begins with; the count is that of the policy, of numbers 3 to 8 and 1.
    loaded = load(whole)
    found = weights_of(whole, Programs(loaded.experiment, members(loaded.experiment.hypers, [], 1, 1)), Console())
    names = "policy", "critics", "policy_target", "critic_targets"
    assert found.keys() == {f"learner.networks.{name}" for name in names}
    for name in names:
        wanted = getattr(loaded.state.learner.networks, name)
        jax.tree.map(np.testing.assert_array_equal, found[f"learner.networks.{name}"], wanted)
    assert json.loads((whole / "result.json").read_text())["parameters"] == 3 * 8 + 8 + 8 + 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["td3", "ddpg"])
def test_pendulum_is_learned(algorithm, tmp_path):
    folder = run(td3, tmp_path, "--algorithm", algorithm, "--replicas", 5, "--scan", 200)
    result = json.loads((folder / "result.json").read_text())
    assert np.sort(result["eval/return/replicas"])[1:4].mean() >= -200


@pytest.mark.parametrize(
    "options, said",
    [
        (["--env", "CartPole-v1"], "td3 gives continuous actions; those of CartPole-v1 are discrete"),
        (["--env", "CartPole-v1", "--algorithm", "ddpg"], "ddpg gives continuous actions"),
        (["--algorithm", "ddpg", "--sweep", "target-noise=0,0.1"], "target-noise=0,0.1: --algorithm ddpg has no"),
        (["--agent.delay", 0], "--agent.delay 0 is below 1"),
        (["--agent.target-noise", -1], "--agent.target-noise -1 is not 0 or above"),
    ],
)
def test_bad_options_are_told_in_a_line(options, said, tmp_path, capsys):
    assert exit_code(td3, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err
