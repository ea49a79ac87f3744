"""An algorithm and an environment as an experiment: an iteration collects, then learns, all on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxarch.rl.agent import Agent
from jaxarch.rl.collecting import advance, begin, collect
from jaxarch.rl.environments import LONGEST, Environment
from jaxarch.rl.layout import LAYOUT, check_envs
from jaxarch.run import ConfigError, Experiment, Hypers, Index, Metrics

EPISODES = 32  # of an evaluation, by each policy
# Hypers by what they may be: in [0, 1], above 0, any number; the others 0 or above.
SHARES = ("gamma", "gae_lambda", "q_lambda", "tau", "epsilon", "beta", "risk")
POSITIVE = ("temperature", "risk")
SIGNED = ("target_entropy",)


@flax.struct.dataclass
class RLState:
    """All that a checkpoint holds."""

    learner: Any
    world: Any
    key: Any
    hypers: Any


@dataclass(frozen=True)
class Evaluation:
    """Returns of whole fresh episodes, by the greedy policy and by the sampled one; `(state, key) -> metrics`.

    It keeps what is played with, for those who take up a finished run.
    measure: more metrics.
    """

    environment: Environment
    agent: Agent
    episodes: int
    measure: Callable[[RLState, Key[Array, ""]], Metrics] | None = None

    def __call__(self, state: RLState, key: Key[Array, ""]) -> Metrics:
        metrics: Metrics = {}
        for number, (name, greedy) in enumerate((("eval/return", True), ("eval/return_sampled", False))):
            returns, lengths = play(
                self.environment, self.agent, state.learner, jax.random.fold_in(key, number), self.episodes, greedy
            )
            metrics[name] = jnp.mean(returns)
            if greedy:
                metrics["eval/episode_length"] = jnp.mean(lengths)
        return {**metrics, **self.measure(state, key)} if self.measure else metrics


def iterations(env_steps: int, envs: int, length: int) -> int:
    """How many times `length` steps of `envs` environments these are, the last one begun counted."""
    return -(-env_steps // (envs * length))


def make_experiment(
    environment: Environment,
    agent: Agent,
    hypers: Hypers,
    envs: int,
    length: int,
    episodes: int = EPISODES,
    measure: Callable[[RLState, Key[Array, ""]], Metrics] | None = None,
    **others: Any,
) -> Experiment:
    """Runs of `agent` on `envs` environments, `length` steps of each an iteration.

    measure: more metrics of an evaluation.
    others: more fields of the Experiment.
    Raises ConfigError for hypers that are none, as a discount above 1.
    """
    fields = {"layout": LAYOUT, "monitor": "-eval/return", "check": check_hypers, **others}
    fields["check"](hypers)

    def init(key: Key[Array, ""], hypers: Hypers) -> RLState:
        check_envs(envs)
        learner_key, world_key, key = jax.random.split(key, 3)
        return RLState(agent.init(learner_key, hypers), begin(environment, agent, envs, world_key), key, hypers)

    def step(state: RLState, batch: None, index: Index) -> tuple[RLState, Metrics]:
        # Both at once: of a small network's step, one more split after a fold takes a fiftieth.
        collect_key, learn_key = jax.vmap(jax.random.fold_in, (None, 0))(state.key, 2 * index + jnp.arange(2))
        world, rollout, seen = collect(environment, agent, state.learner, state.world, collect_key, index, length)
        learner, learned = agent.learn(state.learner, rollout, learn_key, index)
        return replace(state, learner=learner, world=world), {**seen, **learned}

    weights, newest_only = (tuple(f"learner.{name}" for name in names) for names in (agent.weights, agent.newest_only))
    evaluate = Evaluation(environment, agent, episodes, measure)
    return Experiment(init, step, evaluate, hypers=hypers, weights=weights, newest_only=newest_only, **fields)


def check_hypers(hypers: Hypers) -> None:
    for name in getattr(hypers, "_fields", ()):
        value, option = getattr(hypers, name), f"--agent.{name.replace('_', '-')}"
        if name in SHARES and not 0 <= value <= 1:
            raise ConfigError(f"{option} {value:g} is not in [0, 1].")
        if name in POSITIVE and not value > 0:
            raise ConfigError(f"{option} {value:g} is not above 0.")
        if not (math.isfinite(value) and (value >= 0 or name in SIGNED)):
            raise ConfigError(f"{option} {value:g} is not {'a number' if name in SIGNED else '0 or above'}.")


def play(
    environment: Environment, agent: Agent, learner: Any, key: Key[Array, ""], episodes: int, greedy: bool
) -> tuple[Array, Array]:
    """The returns and lengths of whole fresh episodes by the learned policy, `[episodes]`."""
    limit = environment.episode_length or LONGEST
    begin_key, key = jax.random.split(key)
    world = begin(environment, agent, episodes, begin_key)
    act = partial(agent.policy, learner)

    def going(carry: tuple) -> Array:
        _, done, _, _, t = carry
        return ~done.all() & (t < limit)

    def one(carry: tuple) -> tuple:
        world, done, returns, lengths, t = carry
        act_key, step_key = jax.random.split(jax.random.fold_in(key, t))
        action, memory = act(world.observation, act_key, world.memory, world.first, greedy)
        starts = world.observation, world.state  # what follows an end is not looked at
        world, _, seen = advance(environment, world, action, memory, jax.random.split(step_key, episodes), starts)
        returns = jnp.where(done, returns, seen.returns)
        lengths = jnp.where(done, lengths, seen.lengths)
        return world, done | seen.ended, returns, lengths, t + 1

    nothing = jnp.zeros(episodes)
    start = world, jnp.zeros(episodes, bool), nothing, nothing.astype(jnp.int32), jnp.zeros((), jnp.int32)
    _, _, returns, lengths, _ = jax.lax.while_loop(going, one, start)
    return returns, lengths
