"""The failures from end to end: members that diverge are counted, not fatal; the table says what the state holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gan_failures
from experiments.gan_failures import Config, experiment, finite, living
from tests.run.running import assert_same, exit_code, log, resumed, run

TINY = ["--width", 4, "--layers", 1, "--batch-size", 4, "--steps", 4, "--eval-every", 4, "--seeds", 2]
TINY += ["--rates", 1e-3, 1e30, "--gammas", 1.0, "--treatments", "packed", "relativistic_r1_r2"]


def test_stopped_and_resumed_is_uninterrupted_though_members_diverge(tmp_path):
    whole = run(gan_failures, tmp_path, *TINY, "--checkpoint-every", 2)
    assert_same(whole, resumed(gan_failures, whole, 2))
    said = log(whole)[-1]
    assert "val/grid[packed]" in said and "train/g_grad_norm/Dense_0[relativistic_r1_r2]" in said
    table = (whole / "samples" / "0000004" / "failures.md").read_text().splitlines()
    rows = [line.split(" | ")[0] for line in table[4:]]
    assert rows == ["| packed", "| relativistic_r1_r2"]
    assert (whole / "samples" / "0000004" / "failures.png").stat().st_size > 10_000


def test_a_member_that_is_not_finite_counts_as_diverged_and_in_no_mean():
    config = Config(treatments=("minimax",), seeds=3, rates=(1e-3,), gammas=(1.0,), width=4, layers=1, batch_size=4)
    built = experiment(config)
    state = jax.jit(built.init)(jax.random.key(0), ())
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.games["minimax"].average)
    params = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), state.games["minimax"].generator)
    games = {"minimax": state.games["minimax"].replace(generator=params, average=broken)}
    said = jax.jit(built.evaluate)(state.replace(games=games), jax.random.key(1))
    assert said["val/diverged[minimax]"] >= 1 / 3
    assert np.isfinite(said["val/reverse_kl[minimax]"].total)
    assert list(finite(params, 4)) == [True, False, True, True]
    assert living(jnp.array([1.0, jnp.nan, 3.0])) == (4.0, 2.0)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--treatments", "prayer"], "--treatments prayer: there are minimax"),
        (["--seeds", 0], "--seeds 0 is below 1"),
        (["--rates", 0.0], "--rates and --gammas are numbers above 0"),
    ],
)
def test_bad_options_are_told_in_a_line(options, said, tmp_path, capsys):
    assert exit_code(gan_failures, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err
