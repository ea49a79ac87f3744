"""Algorithms side by side: what is played, and what the tables say of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rl_compare
from experiments.rl_compare import Config, Game, found, improvements, played, table
from jaxarch.run import ConfigError, Experiment
from tests.run.running import log, run

TWO = Config(algorithms=("ppo", "dqn"), environments=("CartPole-v1", "Acrobot-v1"), seeds=4, steps=2)


def test_tables_by_hand():
    """Of four seeds the interquartile mean is that of the middle two; of pairs the larger return wins."""
    first = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 4.0, 90.0]])
    second = np.array([[5.0, 5.0, 5.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
    returns = {"ppo, CartPole-v1": first, "dqn, CartPole-v1": second, "ppo, Acrobot-v1": -first}
    rows = table(returns, TWO).splitlines()
    assert rows[-2].startswith("| CartPole-v1 | 3.0 (") and "| 3.0 (3.0 to 3.0) |" in rows[-2]
    assert rows[-1].startswith("| Acrobot-v1 | -3.0 (") and rows[-1].endswith("|  |")
    # Two of ppo's four seeds are above dqn's 3, on the one environment that both play.
    rows = improvements(returns, TWO).splitlines()
    assert rows[-2].startswith("| ppo |  | 0.50 (") and rows[-1].startswith("| dqn | 0.50 (")


def test_a_return_that_is_no_number_is_not_compared():
    returns = {"ppo, CartPole-v1": np.array([[1.0, np.nan]]), "dqn, CartPole-v1": np.array([[1.0, 2.0]])}
    assert improvements(returns, TWO).splitlines()[-1] == "| dqn |  |  |"
    assert "1 of 2 seeds are numbers" in table(returns, TWO)


def test_an_environment_that_is_none_is_said():
    with pytest.raises(ConfigError, match="^--environments Nope: there are "):
        found(Config(environments=("Nope",)))


def test_who_does_not_take_the_actions_is_left_out(capsys):
    config = Config(algorithms=("dqn", "td3"), environments=("Pendulum-v1",), seeds=1, env_steps=400, steps=2)
    assert [name for name, _ in found(config)] == ["td3, Pendulum-v1"]
    assert "dqn on Pendulum-v1: left out" in capsys.readouterr().out


@pytest.mark.parametrize(("iterations", "parts"), [(7, 3), (3, 5), (12, 4)])
def test_the_parts_of_a_game_are_all_its_iterations(iterations, parts):
    """No fewer, and none beyond the end, where an annealed rate is below 0."""
    counting = Experiment(
        init=lambda key, hypers: jnp.zeros(iterations, int),
        step=lambda state, batch, index: (state.at[index].add(1, mode="drop"), {}),
        evaluate=lambda state, key: {},
    )
    states = jnp.zeros((2, iterations + 1), int)
    for part in range(parts):
        states = jax.jit(lambda states, part: played(Game(counting, iterations, parts), states, part))(
            states, jnp.asarray(part)
        )
    np.testing.assert_array_equal(states, [[1] * iterations + [0]] * 2)


@pytest.mark.slow
def test_from_end_to_end(tmp_path):
    folder = run(
        rl_compare, tmp_path, "--algorithms", "reinforce", "a2c", "--environments", "CartPole-v1", "--seeds", 2,
        "--env-steps", 4000, "--steps", 2,
    )  # fmt: skip
    assert {"eval/return[a2c, CartPole-v1]", "eval/return[reinforce, CartPole-v1]"} <= log(folder)[-1].keys()
    last = folder / "samples" / "0000002"
    assert {path.name for path in last.iterdir()} == {"returns.md", "improvement.md", "returns.png", "profiles.png"}
