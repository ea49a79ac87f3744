"""Markov decision processes small enough to be written down: those whose optimal values are known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from jaxtyping import Array, Bool, Float, Int, Key

from jaxarch.rl.environments import Environment, Step, make
from jaxarch.run import ConfigError

FROZEN_LAKE = "FrozenLake-misc"
CLIFF = "CliffWalking"
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))  # rows and columns of left, down, right, up: FrozenLake's order
CLIFF_MAP = ("............", "............", "............", "SCCCCCCCCCCG")


class Table(NamedTuple):
    """All of a process.

    chances: of the state that follows.
    rewards: of going there.
    terminal: an episode ends there; what this state has for chances is without meaning.
    starts: the chance that an episode begins there.
    grid: the map, a letter for each state (G goal, H hole, S start, C cliff), for drawing.
    """

    chances: Float[Array, "states actions following"]
    rewards: Float[Array, "states actions following"]
    terminal: Bool[Array, " states"]
    starts: Float[Array, " states"]
    grid: tuple[str, ...] = ()


class Place(NamedTuple):
    """The state of an environment that is a table."""

    position: Int[Array, ""]
    time: Int[Array, ""]


def make_table(name: str, options: Mapping[str, Any] | None = None) -> tuple[Environment, Table]:
    """An environment whose table is known. Raises ConfigError for any other."""
    if name == CLIFF:
        if options:
            raise ConfigError(f"--env-options: {CLIFF} has none.")
        table = cliff_walking()
        return as_environment(table, CLIFF, 100), table
    if name != FROZEN_LAKE:
        raise ConfigError(f"--env {name}: tables are known of {FROZEN_LAKE} and {CLIFF}.")
    environment = make(name, options)
    return environment, frozen_lake(environment)


def frozen_lake(environment: Environment) -> Table:
    """The table of gymnax's FrozenLake: on ice a move goes to either side with half of what is left of its chance."""
    assert environment.source is not None
    lake, _ = environment.source
    grid = tuple("".join("SFHG"[tile] for tile in row) for row in np.asarray(lake.desc))
    straight = lake.success_rate if lake.is_slippery else 1.0
    goal, hole, frozen = np.asarray(lake.reward_schedule)
    letters = "".join(grid)
    states = len(letters)
    chances = np.zeros((states, 4, states))
    for state in range(states):
        for action in range(4):
            for turn, chance in ((0, straight), (-1, (1 - straight) / 2), (1, (1 - straight) / 2)):
                chances[state, action, _moved(state, (action + turn) % 4, grid)] += chance
    of_landing = np.array([{"G": goal, "H": hole}.get(letter, frozen) for letter in letters])
    return _table(chances, np.broadcast_to(of_landing, chances.shape), "GH", grid)


def cliff_walking() -> Table:
    """A walk along a cliff (Sutton & Barto 2018, example 6.6): -1 a step, -100 and back to the start over the edge."""
    letters = "".join(CLIFF_MAP)
    states = len(letters)
    chances, rewards = np.zeros((states, 4, states)), np.full((states, 4, states), -1.0)
    for state in range(states):
        for action in range(4):
            reached = _moved(state, action, CLIFF_MAP)
            if letters[reached] == "C":
                reached = letters.index("S")
                rewards[state, action, reached] = -100.0
            chances[state, action, reached] = 1.0
    return _table(chances, rewards, "G", CLIFF_MAP)


def _moved(state: int, move: int, grid: tuple[str, ...]) -> int:
    rows, columns = len(grid), len(grid[0])
    row = min(max(state // columns + MOVES[move][0], 0), rows - 1)
    column = min(max(state % columns + MOVES[move][1], 0), columns - 1)
    return row * columns + column


def _table(chances: np.ndarray, rewards: np.ndarray, ends: str, grid: tuple[str, ...]) -> Table:
    letters = "".join(grid)
    terminal = np.array([letter in ends for letter in letters])
    starts = np.array([float(letter == "S") for letter in letters])
    return Table(
        jnp.asarray(chances, jnp.float32),
        jnp.asarray(rewards, jnp.float32),
        jnp.asarray(terminal),
        jnp.asarray(starts, jnp.float32),
        grid,
    )


def as_environment(table: Table, name: str, episode_length: int) -> Environment:
    """Observes the state's number; truncated after so many steps."""
    states, actions = table.rewards.shape[:2]

    def drawn(key: Key[Array, ""], chances: Float[Array, " states"]) -> Int[Array, ""]:
        return jax.random.categorical(key, jnp.log(chances)).astype(jnp.int32)

    def reset(key: Key[Array, ""]) -> tuple[Array, Place]:
        position = drawn(key, table.starts)
        return position, Place(position, jnp.zeros((), jnp.int32))

    def step(key: Key[Array, ""], state: Place, action: Array, start: tuple[Array, Place]) -> Step:
        reached = drawn(key, table.chances[state.position, action])
        reward = table.rewards[state.position, action, reached]
        following = Place(reached, state.time + 1)
        terminated = table.terminal[reached]
        truncated = ~terminated & (following.time >= episode_length)
        observation, kept = jax.tree.map(
            lambda new, old: jnp.where(terminated | truncated, new, old), start, (reached, following)
        )
        return Step(observation, kept, reward, terminated, truncated, reached, following)

    return Environment(
        name, spaces.Discrete(states), spaces.Discrete(actions), reset, step, episode_length, (table, None)
    )
