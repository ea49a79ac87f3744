"""The failures from end to end: members that diverge are counted, not fatal; the table says what the state holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gan_failures
from experiments.gan_failures import Config, experiment, finite, living
from jaxarch.gan.toy import Modes
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


def test_a_member_that_is_not_finite_counts_as_diverged_and_in_no_mean(monkeypatch):
    """Five members with known figures: three seeds, the second of which makes noise, the third not a number; two of
    the grid, the first of which has lost modes.
    """
    config = Config(
        treatments=("minimax",), seeds=3, rates=(1e-3, 4e-3), gammas=(0.5,), width=4, layers=1, batch_size=4
    )
    monkeypatch.setattr(gan_failures.gan_toy.toy, "modes_of", lambda samples, _: Modes(jnp.int32(9), *samples[0]))
    built = experiment(config)
    state = jax.jit(built.init)(jax.random.key(0), ())
    game = state.games["minimax"]
    np.testing.assert_allclose(game.hypers.learning_rate, [config.optim.learning_rate] * 3 + [1e-3, 4e-3], rtol=1e-6)
    np.testing.assert_allclose(game.hypers.gamma, [config.gamma] * 3 + [0.5] * 2, rtol=1e-6)
    assert len(np.unique(game.generator["Dense_0"]["kernel"])) == 5 * 2 * 4
    average = jax.tree.map(jnp.zeros_like, game.average)
    quality, divergence = jnp.array([0.5, 0.005, jnp.nan, 0.5, 0.5]), jnp.array([0.1, 0.1, jnp.nan, 0.3, 0.1])
    average["Dense_1"]["bias"] = jnp.stack([quality, divergence], axis=1)
    params = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), game.generator)
    state = state.replace(games={"minimax": game.replace(generator=params, average=average)})
    said, (_, metrics) = jax.jit(
        lambda state: (built.evaluate(state, jax.random.key(1)), built.step(state, None, jnp.int32(0)))
    )(state)
    shares = [said[f"val/{name}[minimax]"] for name in ("diverged", "converged", "grid")]
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 1 / 2], rtol=1e-6)
    means = [said[f"val/{name}[minimax]"] for name in ("modes", "high_quality", "reverse_kl")]
    np.testing.assert_allclose([mean.total / mean.weight for mean in means], [9, 0.505 / 2, 0.1], rtol=1e-5)
    assert metrics["train/g_grad_norm[minimax]"].weight == 2  # of the seeds, the living ones
    assert list(finite(params, 5)) == [True, True, False, True, True]
    assert living(jnp.array([1.0, jnp.nan, 3.0])) == (4.0, 2.0)


def test_the_table_by_hand():
    """Two seeds and a grid of 2; a seed whose figures are no numbers is in no mean of them."""
    nan = np.nan
    values = {
        "val/modes": np.array([10, 21, 0, 0]),
        "val/high_quality": np.array([0.5, 0.25, 0, 0]),
        "val/reverse_kl": np.array([1.5, nan, 0, 0]),
        "diverged": np.array([True, True, False, False]),
        "converged": np.array([False, False, True, False]),
        "train/d_accuracy": np.array([0.75, nan, 0, 0]),
        "train/g_grad_norm": np.array([9.0, 9, 0, 0]),
        "train/g_grad_norm/Dense_0": np.array([0.25, 0.75, 0, 0]),
        "train/g_grad_norm/Dense_1": np.array([8.0, 8, 0, 0]),
        "train/g_grad_norm/Dense_2": np.array([3.0, nan, 0, 0]),
    }
    lines = gan_failures.table({"packed": values}, Config(seeds=2, rates=(1e-3, 2e-3), gammas=(1.0,))).splitlines()
    assert lines[2].startswith(
        "| game | modes of 25 | high quality | reverse KL | diverged | converged | of the grid |"
    )
    assert lines[4:] == ["| packed | 15.5 | 37.5 % | 1.50 | 100 % | 0 % | 50 % | 75 % | 0.5, 3 |"]


def test_treatments_are_their_games():
    config = Config(gamma=0.3)
    games = {name: config.toy(name).game for name in gan_failures.TREATMENTS}
    assert {game.gamma for game in games.values()} == {0.3}
    assert {name for name, game in games.items() if game.penalty == "none"} == {
        *("minimax", "non_saturating", "least_squares", "hinge", "wasserstein_clip", "unrolled", "packed"),
        "relativistic",
    }
    assert (games["packed"].pack, games["unrolled"].unroll, games["wasserstein_clip"].clip) == (4, 5, 0.1)
    objectives = {name: game.objective for name, game in games.items()}
    assert all(
        name.startswith(objective) for name, objective in objectives.items() if name not in ("packed", "unrolled")
    )
    assert objectives["packed"] == objectives["unrolled"] == "non_saturating"


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
