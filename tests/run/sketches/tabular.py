"""Q-learning on a corridor: the environment in the state, no data, episodes that end when they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxarch.run import Experiment, Mean, main


class Hypers(NamedTuple):
    learning_rate: float = 0.5
    gamma: float = 0.9


@flax.struct.dataclass
class State:
    table: jax.Array
    position: jax.Array
    score: jax.Array
    key: jax.Array
    hypers: Hypers


@dataclass(frozen=True)
class Config:
    env_steps: int = 400
    length: int = 6

    @property
    def steps(self) -> int:
        return self.env_steps


def experiment(config: Config) -> Experiment:
    """Left and right in a corridor; reward 1 at its end, where the episode terminates."""

    def move(position, action):
        following = jnp.clip(position + 2 * action - 1, 0, config.length - 1)
        terminated = following == config.length - 1
        return following, terminated.astype(jnp.zeros(()).dtype), terminated

    def init(key, hypers):
        return State(jnp.zeros((config.length, 2)), jnp.zeros((), jnp.int32), jnp.zeros(()), key, hypers)

    def step(state, batch, index):
        action = jax.random.randint(jax.random.fold_in(state.key, index), (), 0, 2, jnp.int32)
        following, reward, terminated = move(state.position, action)
        target = reward + state.hypers.gamma * ~terminated * state.table[following].max()
        error = target - state.table[state.position, action]
        table = state.table.at[state.position, action].add(state.hypers.learning_rate * error)
        score, ended = state.score + reward, terminated.astype(reward.dtype)
        metrics = {"train/return": Mean(score * ended, ended), "train/error": jnp.abs(error)}
        position = jnp.where(terminated, 0, following)
        return state.replace(table=table, position=position, score=score * ~terminated), metrics

    def evaluate(state, key):
        exact = state.hypers.gamma ** (config.length - 2.0 - jnp.arange(config.length - 1))
        learned = state.table.max(-1)[:-1]
        return {"eval/error": jnp.abs(exact - learned).max(), "eval/first": learned[0]}

    return Experiment(init, step, evaluate, monitor="-eval/first", hypers=Hypers(), weights=("table",))


if __name__ == "__main__":
    main(experiment, Config)
