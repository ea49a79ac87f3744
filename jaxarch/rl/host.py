"""The same `act` and `learn` around gymnasium's vector environments, which live on the host.

    envs = gymnasium.make_vec("CartPole-v1", 8, "sync", {"autoreset_mode": AutoresetMode.SAME_STEP})
    agent = ppo.make_agent(described(envs), config, envs.num_envs, length=128, iterations=100)
    learner, returns = train(agent, envs, config.hypers, length=128, iterations=100)

A plain loop: nothing here is pure, and nothing can be resumed bit for bit. Only the agent's functions are compiled.
Actions within bounds are given to it in [-1, 1], as by `environments.rescaled`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnax.environments import spaces
from jaxtyping import Float

from jaxarch.rl.agent import Agent, Learner, Rollout
from jaxarch.rl.environments import Environment, Step
from jaxarch.run import ConfigError, Hypers


def described(envs: VectorEnv) -> Environment:
    """What an agent asks of an environment: its name and its spaces. It cannot be stepped on the device.

    Raises ConfigError for a space that is neither of numbers nor of choices, and where an episode's end is not followed
    by the next one's start in the same step.
    """
    name = envs.spec.id if envs.spec is not None else "the environment"
    if envs.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ConfigError(
            f"{name}: make it with vectorization_mode='sync' (or 'async') and "
            "vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP}."
        )
    observations: Any = _space(name, envs.single_observation_space)
    actions: Any = _space(name, envs.single_action_space)
    if _bounded(envs.single_action_space):
        actions = spaces.Box(-1.0, 1.0, actions.shape, jnp.float32)

    def reset(key: Any) -> tuple[Any, tuple[()]]:
        return jnp.zeros(observations.shape, observations.dtype), ()

    def step(*_: Any) -> Step:
        raise TypeError(f"{name} lives on the host; jaxarch.rl.host.train steps it.")

    return Environment(name, observations, actions, reset, step)


def _space(name: str, space: gymnasium.Space) -> spaces.Space:
    if isinstance(space, gymnasium.spaces.Discrete) and space.start == 0:
        return spaces.Discrete(int(space.n))
    if isinstance(space, gymnasium.spaces.Box):
        dtype = jnp.uint8 if space.dtype == np.uint8 else jnp.float32
        return spaces.Box(jnp.asarray(space.low, dtype), jnp.asarray(space.high, dtype), space.shape, dtype)
    raise ConfigError(f"{name}: {space} is neither a box of numbers nor choices from 0 on.")


def _bounded(space: gymnasium.Space) -> bool:
    """Whether actions are numbers that all have bounds."""
    return isinstance(space, gymnasium.spaces.Box) and bool(np.isfinite([space.low, space.high]).all())


def train(
    agent: Agent, envs: VectorEnv, hypers: Hypers, length: int, iterations: int, seed: int = 0
) -> tuple[Learner, list[float]]:
    """`iterations` of `length` steps of each environment, and learning after each; the returns of the episodes that
    ended, in their order.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    learner = jax.jit(agent.init)(init_key, hypers)
    act, learn = jax.jit(agent.act), jax.jit(agent.learn, donate_argnums=0)
    world = _Host(agent, envs, seed)
    for index in range(iterations):
        act_key, learn_key = jax.random.split(jax.random.fold_in(key, index))
        begun, steps = world.memory, []
        for t in range(length):
            observation, first = world.observation, world.first
            noise = agent.noise(jax.random.fold_in(act_key, t), envs.num_envs)
            action, world.memory, extras = act(learner, observation, noise, world.memory, first, jnp.asarray(index))
            steps.append((observation, first, action, *world.step(action), extras))
        rollout = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
        learner, _ = learn(learner, Rollout(*rollout, begun), learn_key, jnp.asarray(index))
    return learner, world.returns


def evaluate(
    agent: Agent, learner: Learner, envs: VectorEnv, seed: int = 0, greedy: bool = True
) -> Float[np.ndarray, " envs"]:
    """The return of the first episode of each environment."""
    policy = jax.jit(agent.policy, static_argnums=5)
    world, key = _Host(agent, envs, seed), jax.random.key(seed)
    returns, t = np.full(envs.num_envs, np.nan), 0
    while np.isnan(returns).any():
        noise = jax.random.fold_in(key, t)
        action, world.memory = policy(learner, world.observation, noise, world.memory, world.first, greedy)
        world.step(action)
        returns, t = np.where(world.first & np.isnan(returns), world.totals, returns), t + 1
    return returns


class _Host:
    """Where gymnasium's environments stand.

    first: an episode of theirs has just begun.
    totals: the returns so far of the episodes that the last step was of.
    returns: of all that ended, in their order.
    """

    def __init__(self, agent: Agent, envs: VectorEnv, seed: int) -> None:
        self.envs: VectorEnv = envs
        self.returns: list[float] = []
        self.observation: Any = envs.reset(seed=seed)[0]
        self.first, self.totals = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs)
        self.memory = agent.memory(envs.num_envs)

    def step(self, action: Any) -> tuple[Any, ...]:
        """Rewards, terminated, truncated, and what the actions led to, before any reset."""
        chosen = np.asarray(action).reshape(self.envs.action_space.shape)
        space: Any = self.envs.single_action_space
        if _bounded(space):
            chosen = space.low + (np.clip(chosen, -1, 1) + 1) / 2 * (space.high - space.low)
        self.observation, reward, terminated, truncated, said = self.envs.step(chosen)
        following = np.array(self.observation)
        for number in np.flatnonzero(terminated | truncated):
            following[number] = said["final_obs"][number]
        self.totals = np.where(self.first, 0, self.totals) + reward
        self.first = terminated | truncated
        self.returns += self.totals[self.first].tolist()
        return reward.astype(np.float32), terminated, truncated & ~terminated, following
