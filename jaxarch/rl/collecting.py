"""Steps of many environments at once, on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxarch.rl.agent import Agent, Learner, Memory, Rollout
from jaxarch.rl.environments import Environment, Step, outside
from jaxarch.run import Index, Mean, Metrics


class World(NamedTuple):
    """Where the environments stand, `[envs, ...]`.

    first: the observation is the first of an episode.
    returns, lengths: undiscounted, of the episodes under way.
    memory: the policy's.
    """

    state: PyTree
    observation: Any
    first: Bool[Array, " envs"]
    returns: Float[Array, " envs"]
    lengths: Int[Array, " envs"]
    memory: Memory


class Episodes(NamedTuple):
    """Of the steps at which one ended, its return and length; elsewhere without meaning."""

    ended: Bool[Array, "*steps"]
    returns: Float[Array, "*steps"]
    lengths: Int[Array, "*steps"]


def begin(environment: Environment, agent: Agent, envs: int, key: Key[Array, ""]) -> World:
    observation, state = jax.vmap(environment.reset)(jax.random.split(key, envs))
    nothing = jnp.zeros(envs)
    return World(state, observation, jnp.ones(envs, bool), nothing, nothing.astype(jnp.int32), agent.memory(envs))


def advance(
    environment: Environment, world: World, action: Any, memory: Memory, keys: Key[Array, " envs"], starts: PyTree
) -> tuple[World, Step, Episodes]:
    """One step of each. starts: what `reset` gave, `[envs, ...]`, for those whose episode ends."""
    made = jax.vmap(environment.step)(keys, world.state, action, starts)
    ended = made.terminated | made.truncated
    returns, lengths = world.returns + made.reward, world.lengths + 1
    following = World(
        made.state, made.observation, ended, jnp.where(ended, 0, returns), jnp.where(ended, 0, lengths), memory
    )
    return following, made, Episodes(ended, returns, lengths)


def collect(
    environment: Environment,
    agent: Agent,
    learner: Learner,
    world: World,
    key: Key[Array, ""],
    index: Index,
    length: int,
) -> tuple[World, Rollout, Metrics]:
    """`length` steps of each environment by `agent.act`.

    Two metrics have the environment's name: `env/sound`, which a reward or an observation that is no number makes
    one itself, and so ends the run; and `env/outside`, the share of observed numbers outside the space.
    """
    envs = len(world.first)
    # Drawn at once: inside the loop they would cost as much as a step, and so would a split for each kind.
    keys = jax.random.split(key, (length, 2 * envs + 1))
    start_keys, step_keys, act_keys = keys[:, :envs], keys[:, envs:-1], keys[:, -1]
    starts = jax.vmap(jax.vmap(environment.reset))(start_keys)
    noise = jax.vmap(lambda key: agent.noise(key, envs))(act_keys)

    def one(world: World, drawn: tuple[Any, Any, Any]) -> tuple[World, tuple[Rollout, Episodes]]:
        keys, start, noise = drawn
        action, memory, extras = agent.act(learner, world.observation, noise, world.memory, world.first, index)
        following, made, episodes = advance(environment, world, action, memory, keys, start)
        seen = Rollout(
            world.observation,
            world.first,
            action,
            made.reward,
            made.terminated,
            made.truncated,
            made.next_observation,
            extras,
            (),
        )
        return following, (seen, episodes)

    following, (rollout, episodes) = jax.lax.scan(one, world, (step_keys, starts, noise))
    weight = episodes.ended.astype(jnp.float32)
    sound = jnp.isfinite(rollout.reward).all() & jnp.isfinite(rollout.next_observation).all()
    metrics: Metrics = {
        "train/return": Mean(jnp.sum(episodes.returns * weight), weight.sum()),
        "train/episode_length": Mean(jnp.sum(episodes.lengths * weight), weight.sum()),
        f"env/sound[{environment.name}]": jnp.where(sound, 1.0, jnp.nan),
        f"env/outside[{environment.name}]": jnp.mean(
            outside(environment.observation_space, rollout.next_observation), dtype=jnp.float32
        ),
    }
    return following, rollout._replace(memory=world.memory), metrics
