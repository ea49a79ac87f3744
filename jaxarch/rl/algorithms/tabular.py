"""Algorithms whose values are a table: value iteration, which knows the process, and three that learn from steps.

All keep Q, `[states, actions]`, and act by it epsilon-greedily. Of an episode that a time limit cut short they take
what would have followed to be worth its value in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import spaces
from jaxtyping import Array, Float, Int, Key

from jaxarch.rl.agent import Agent, Memory, Rollout
from jaxarch.rl.environments import Environment, actions_of
from jaxarch.rl.tables import Table
from jaxarch.run import ConfigError, Index, Metrics

Values = Float[Array, "states actions"]


class Hypers(NamedTuple):
    """The rate of a state's and action's n-th update is `learning_rate / n ** decay`.

    gamma: the discount.
    epsilon, epsilon_final: share of actions drawn at random, at the run's beginning and its end.
    """

    learning_rate: float = 1.0
    decay: float = 0.8
    gamma: float = 0.99
    epsilon: float = 1.0
    epsilon_final: float = 0.1


@dataclass(frozen=True)
class TabularConfig:
    method: Literal["q_learning", "sarsa", "monte_carlo", "value_iteration"] = "q_learning"
    """what Q is learned by: the best action that could follow, the one that does, whole returns, or sweeps over the
    known process"""


class Learner(NamedTuple):
    """visits: how often each value was updated.

    episodes: of Monte Carlo, of the episodes under way.
    """

    values: Values
    visits: Values
    episodes: Episodes | None
    hypers: Hypers


class Episodes(NamedTuple):
    """What every-visit Monte Carlo needs of episodes under way, without keeping their steps.

    traces: of each state and action the sum of gamma^(steps since) over its visits.
    returns: the sum over its visits of the discounted rewards since.
    visits: how many they are.
    """

    traces: Float[Array, "envs states actions"]
    returns: Float[Array, "envs states actions"]
    visits: Float[Array, "envs states actions"]


# --- of a known process ---------------------------------------------------------------------------


def backed_up(table: Table, values: Values, gamma: float | Array) -> Values:
    """One sweep of Bellman's optimality equation (Sutton & Barto 2018, eq. 4.2); 0 at terminal states."""
    following = jnp.where(table.terminal, 0.0, values.max(axis=-1))
    found = jnp.einsum("san,san->sa", table.chances, table.rewards + gamma * following)
    return jnp.where(table.terminal[:, None], 0.0, found)


def value_iteration(table: Table, gamma: float | Array, tolerance: float = 1e-6) -> Values:
    """The optimal values, swept until none changes by more than the tolerance."""

    def one(carry: tuple[Values, Values]) -> tuple[Values, Values]:
        values, _ = carry
        return backed_up(table, values, gamma), values

    nothing = jnp.zeros(table.rewards.shape[:2])
    start = backed_up(table, nothing, gamma), nothing
    return jax.lax.while_loop(lambda carry: jnp.abs(carry[0] - carry[1]).max() > tolerance, one, start)[0]


def policy_values(table: Table, policy: Values, gamma: float | Array) -> Values:
    """The values of a policy, `policy[s]` the chances of its actions: Bellman's linear equations (eq. 4.4) solved."""
    states = len(table.terminal)
    going_on = jnp.where(table.terminal, 0.0, 1.0)
    moves = jnp.einsum("sa,san->sn", policy, table.chances) * going_on[:, None]
    rewards = jnp.einsum("sa,san,san->s", policy, table.chances, table.rewards) * going_on
    values = jnp.linalg.solve(jnp.eye(states) - gamma * moves, rewards)
    found = jnp.einsum("san,san->sa", table.chances, table.rewards + gamma * values)
    return jnp.where(table.terminal[:, None], 0.0, found)


def epsilon_greedy(values: Float[Array, "*batch actions"], epsilon: float | Array) -> Float[Array, "*batch actions"]:
    """The chances of the actions. Equal best ones share: the first of them alone would keep to one side for long."""
    best = (values == values.max(axis=-1, keepdims=True)).astype(jnp.float32)
    return (1 - epsilon) * best / best.sum(axis=-1, keepdims=True) + epsilon / values.shape[-1]


# --- from steps -----------------------------------------------------------------------------------


def make_agent(
    environment: Environment, config: TabularConfig, envs: int, iterations: int, table: Table | None = None
) -> Agent:
    """table: of value iteration, which learns from it alone.

    Raises ConfigError where states or actions are not numbered, or value iteration lacks the table.
    """
    who = config.method.replace("_", " ")
    actions = actions_of(environment, who)
    if not isinstance(environment.observation_space, spaces.Discrete):
        raise ConfigError(f"{who} needs numbered states; what {environment.name} observes is not a number of a state.")
    if config.method == "value_iteration" and table is None:
        raise ConfigError(f"value iteration needs the table of {environment.name}.")
    shape = (int(environment.observation_space.n), actions)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        episodes = Episodes(*(jnp.zeros((envs, *shape)) for _ in Episodes._fields))
        return Learner(jnp.zeros(shape), jnp.zeros(shape), episodes if config.method == "monte_carlo" else None, hypers)

    def epsilon(hypers: Hypers, index: Index) -> Array:
        return hypers.epsilon + (hypers.epsilon_final - hypers.epsilon) * jnp.minimum(index / iterations, 1.0)

    def drawn(key: Key[Array, ""], values: Values, states: Array, share: float | Array) -> Int[Array, "..."]:
        chances = epsilon_greedy(values[states], share)
        return jax.random.categorical(key, jnp.log(chances), axis=-1).astype(jnp.int32)

    def act(learner: Learner, observation: Array, key: Key[Array, ""], memory: Memory, first: Array, index: Index):
        return drawn(key, learner.values, observation, epsilon(learner.hypers, index)), memory, ()

    def policy(learner: Learner, observation: Array, key: Key[Array, ""], memory: Memory, first: Array, greedy: bool):
        if greedy:
            return learner.values[observation].argmax(axis=-1).astype(jnp.int32), memory
        return drawn(key, learner.values, observation, learner.hypers.epsilon_final), memory

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        if config.method == "value_iteration":
            assert table is not None
            values = backed_up(table, learner.values, learner.hypers.gamma)
            return learner._replace(values=values), {"train/td_error": jnp.abs(values - learner.values).max()}
        if config.method == "monte_carlo":
            return monte_carlo(learner, rollout)
        chosen = rollout.action
        if config.method == "sarsa":
            chosen = drawn(key, learner.values, rollout.next_observation, epsilon(learner.hypers, index))
            # Inside an episode what follows is what was done; after its end, or the rollout's, it has to be drawn.
            done = jnp.concatenate([rollout.action[1:], chosen[-1:]])
            chosen = jnp.where(rollout.ended, chosen, done)
        return temporal_differences(learner, rollout, chosen, greedy=config.method == "q_learning")

    return Agent(init, act, learn, policy, weights=("values",))


def temporal_differences(
    learner: Learner, rollout: Rollout, next_action: Int[Array, "time envs"], greedy: bool
) -> tuple[Learner, Metrics]:
    """One step after another, each environment's in turn (Sutton & Barto 2018, eq. 6.7 and 6.8).

    greedy: what follows is worth its best action (Q-learning), not `next_action` (SARSA).
    """
    hypers = learner.hypers

    def one(carry: tuple[Values, Values], step: tuple) -> tuple[tuple[Values, Values], Array]:
        values, visits = carry
        state, action, reward, terminated, next_state, next_action = step
        following = values[next_state].max() if greedy else values[next_state, next_action]
        error = reward + hypers.gamma * jnp.where(terminated, 0.0, following) - values[state, action]
        visits = visits.at[state, action].add(1)
        rate = hypers.learning_rate / visits[state, action] ** hypers.decay
        return (values.at[state, action].add(rate * error), visits), jnp.abs(error)

    steps = (
        rollout.observation,
        rollout.action,
        rollout.reward,
        rollout.terminated,
        rollout.next_observation,
        next_action,
    )
    steps = jax.tree.map(lambda x: x.reshape(-1), steps)
    (values, visits), errors = jax.lax.scan(one, (learner.values, learner.visits), steps)
    return learner._replace(values=values, visits=visits), {"train/td_error": errors.mean()}


def monte_carlo(learner: Learner, rollout: Rollout) -> tuple[Learner, Metrics]:
    """Every-visit Monte Carlo control (Sutton & Barto 2018, sec. 5.4): at an episode's end each value moves towards the
    returns that followed its visits.

    The sum of the returns after all visits is that of each reward times the trace of those before it, so that no step
    has to be kept (sec. 12.4).
    """
    hypers = learner.hypers
    each = jnp.arange(rollout.reward.shape[1])

    def one(carry: tuple[Values, Values, Episodes], step: tuple) -> tuple[tuple[Values, Values, Episodes], Array]:
        values, visits, under_way = carry
        state, action, reward, terminated, truncated, next_state = step
        beyond = jnp.where(truncated & ~terminated, hypers.gamma * values[next_state].max(axis=-1), 0.0)
        traces = (hypers.gamma * under_way.traces).at[each, state, action].add(1.0)
        returns = under_way.returns + (reward + beyond)[:, None, None] * traces
        times = under_way.visits.at[each, state, action].add(1.0)
        ended = (terminated | truncated)[:, None, None]
        new = jnp.where(ended, times, 0.0).sum(axis=0)
        errors = jnp.where(ended, returns, 0.0).sum(axis=0) - new * values
        visits = visits + new
        # Several visits count as so many updates; together they go no further than to their mean.
        rate = jnp.minimum(hypers.learning_rate / jnp.maximum(visits, 1.0) ** hypers.decay, 1 / jnp.maximum(new, 1.0))
        under_way = Episodes(*(jnp.where(ended, 0.0, part) for part in (traces, returns, times)))
        return (values + rate * errors, visits, under_way), jnp.abs(errors).sum() / jnp.maximum(new.sum(), 1.0)

    assert learner.episodes is not None
    steps = (
        rollout.observation,
        rollout.action,
        rollout.reward,
        rollout.terminated,
        rollout.truncated,
        rollout.next_observation,
    )
    start = learner.values, learner.visits, learner.episodes
    (values, visits, under_way), errors = jax.lax.scan(one, start, steps)
    return learner._replace(values=values, visits=visits, episodes=under_way), {"train/td_error": errors.mean()}
