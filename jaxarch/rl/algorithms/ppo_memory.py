"""Proximal policy optimisation with a policy that remembers (Schulman et al. 2017; a GRU, or Parisotto et al. 2020).

A minibatch is of whole sequences, each begun with what its environment's policy remembered then; episodes that end
within one are forgotten there. The value of what a step led to is that of the true final observation, seen with the
memory of its own episode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from gymnax.environments import spaces
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxarch.rl.agent import Agent, Memory, Rollout
from jaxarch.rl.distributions import Categorical, Gaussian
from jaxarch.rl.environments import Environment, action_size, actions_of, observation_shape
from jaxarch.rl.networks import NetworkConfig, Torso, orthogonal
from jaxarch.rl.recurrent import MemoryConfig, nothing_remembered, remembering
from jaxarch.rl.returns import generalized_advantages
from jaxarch.run import ConfigError, Index, Metrics, check_least, check_not_negative


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `MemoryPPOConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    gae_lambda: float | Float[Array, "*replicas"]
    clip: float | Float[Array, "*replicas"]
    entropy: float | Float[Array, "*replicas"]
    value: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class MemoryPPOConfig:
    learning_rate: float = 1e-3
    """Adam's, at the start"""
    anneal: bool = True
    """the learning rate falls linearly to 0 at the run's end"""
    gamma: float = 0.99
    """discount of a step"""
    gae_lambda: float = 0.95
    """of generalised advantage estimates"""
    clip: float = 0.2
    """how far the ratio of probabilities may move from 1 to some gain"""
    entropy: float = 0.01
    """weight of the entropy in the objective"""
    value: float = 0.5
    """weight of the value's loss"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 4
    """updates a pass, each of the sequences of some environments"""
    max_norm: float = 0.5
    """global norm to which gradients are clipped (0: they are not)"""
    model: NetworkConfig = NetworkConfig(layers=1)
    memory: MemoryConfig = MemoryConfig()

    def __post_init__(self) -> None:
        check_least(self, ("epochs", "minibatches"), 1, "agent.")
        check_not_negative(self, ("max_norm",), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.gae_lambda, self.clip, self.entropy, self.value)


@flax.struct.dataclass
class Learner:
    params: Any
    opt: Any
    hypers: Any


class Sequences(NamedTuple):
    """What is learned from, `[time, envs, ...]`; memory, `[envs, ...]`, is that before the first of these steps."""

    observation: Any
    first: Bool[Array, "time envs"]
    action: Any
    log_prob: Float[Array, "time envs"]
    advantage: Float[Array, "time envs"]
    target: Float[Array, "time envs"]


class RecurrentActorCritic(nn.Module):
    """`(observations [time, envs, ...], memory, first) -> (distributions, values, memory)`.

    outputs: numbers that a distribution is told by: logits, or the means of a Gaussian.
    """

    config: NetworkConfig
    memory: MemoryConfig
    shape: tuple[int, ...]
    categories: int
    outputs: int
    continuous: bool

    @nn.compact
    def __call__(self, observations: Any, memory: Memory, first: Bool[Array, "time envs"]) -> tuple:
        found = Torso(self.config, self.shape, self.categories, name="torso")(observations)
        found, memory = remembering(self.memory)(found, memory, first)
        told = nn.Dense(self.outputs, kernel_init=orthogonal(0.01), name="actor")(found)
        value = nn.Dense(1, kernel_init=orthogonal(1.0), name="critic")(found)[..., 0]
        if not self.continuous:
            return Categorical(told), value, memory
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(told, jnp.broadcast_to(log_std, told.shape)), value, memory


def make_agent(environment: Environment, config: MemoryPPOConfig, envs: int, iterations: int) -> Agent:
    """PPO on rollouts of `envs` environments.

    iterations: of the whole run, at whose end an annealed rate is 0.
    Raises ConfigError where the environments are not so many minibatches.
    """
    if envs % config.minibatches:
        raise ConfigError(
            f"--agent.minibatches {config.minibatches} does not divide --envs {envs}; a minibatch is whole sequences."
        )
    network = network_of(environment, config)
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam(eps=1e-5))

    def memory(envs: int) -> Memory:
        return nothing_remembered(config.memory, envs)

    def seen(params: PyTree, observations: Any, memory: Memory, first: Array) -> tuple:
        return network.apply({"params": params}, observations, memory, first)

    def one_step(params: PyTree, observation: Any, memory: Memory, first: Array) -> tuple:
        """Of `[envs, ...]`."""
        distribution, value, memory = seen(params, observation[None], memory, first[None])
        return jax.tree.map(lambda leaf: leaf[0], (distribution, value)), memory

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observation = environment.reset(key)[0][None, None]
        params = network.init(key, observation, memory(1), jnp.ones((1, 1), bool))["params"]
        return Learner(params, direction.init(params), hypers)

    def act(learner: Learner, observation: Any, key: Any, memory: Memory, first: Any, index: Index) -> tuple:
        (policy, _), memory = one_step(learner.params, observation, memory, first)
        action = policy.sample(key)
        return action, memory, policy.log_prob(action)

    def policy(learner: Learner, observation: Any, key: Any, memory: Memory, first: Any, greedy: bool) -> tuple:
        (policy, _), memory = one_step(learner.params, observation, memory, first)
        return policy.mode() if greedy else policy.sample(key), memory

    def values_of(params: PyTree, rollout: Rollout) -> tuple[Array, Array]:
        """Of each observation, and of what the step led to, which is seen with the memory of all before it."""
        going_on = jnp.zeros(envs, bool)

        def one(memory: Memory, step: tuple) -> tuple[Memory, tuple[Array, Array]]:
            observation, first, next_observation = step
            (_, value), memory = one_step(params, observation, memory, first)
            (_, next_value), _ = one_step(params, next_observation, memory, going_on)
            return memory, (value, next_value)

        steps = rollout.observation, rollout.first, rollout.next_observation
        return jax.lax.scan(one, rollout.memory, steps)[1]

    def loss(params: PyTree, batch: Sequences, memory: Memory, hypers: Hypers) -> tuple[Array, Metrics]:
        """The clipped objective, the value's loss and the entropy (Schulman et al. 2017, eq. 9)."""
        policy, value, _ = seen(params, batch.observation, memory, batch.first)
        log_ratio = policy.log_prob(batch.action) - batch.log_prob
        ratio = jnp.exp(log_ratio)
        advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - hypers.clip, 1 + hypers.clip) * advantage)
        policy_loss, entropy = -gain.mean(), policy.entropy().mean()
        value_loss = jnp.square(value - batch.target).mean() / 2
        total = policy_loss + hypers.value * value_loss - hypers.entropy * entropy
        return total, {
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "train/entropy": entropy,
            "train/approx_kl": jnp.mean(ratio - 1 - log_ratio),
            "train/clip_fraction": jnp.mean(jnp.abs(ratio - 1) > hypers.clip, dtype=jnp.float32),
        }

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers = learner.hypers
        values, next_values = values_of(learner.params, rollout)
        discounts = hypers.gamma * ~rollout.terminated
        advantages = generalized_advantages(
            rollout.reward, values, next_values, discounts, rollout.ended, hypers.gae_lambda
        )
        batch = Sequences(
            rollout.observation, rollout.first, rollout.action, rollout.extras, advantages, advantages + values
        )
        learning_rate = hypers.learning_rate * (1.0 - index / iterations if config.anneal else 1.0)

        def update(carry: tuple[PyTree, PyTree], some: Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
            params, opt = carry
            few = jax.tree.map(lambda leaf: leaf[:, some], batch)
            memory = jax.tree.map(lambda leaf: leaf[some], rollout.memory)
            grads, metrics = jax.grad(loss, has_aux=True)(params, few, memory, hypers)
            updates, opt = direction.update(grads, opt)
            return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt), metrics

        orders = jax.vmap(lambda key: jax.random.permutation(key, envs))(jax.random.split(key, config.epochs))
        orders = orders.reshape(config.epochs * config.minibatches, -1)
        (params, opt), metrics = jax.lax.scan(update, (learner.params, learner.opt), orders)
        return replace(learner, params=params, opt=opt), jax.tree.map(jnp.mean, metrics)

    return Agent(init, act, learn, policy, memory)


def network_of(environment: Environment, config: MemoryPPOConfig) -> RecurrentActorCritic:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    continuous = isinstance(environment.action_space, spaces.Box)
    outputs = (action_size if continuous else actions_of)(environment, "memory")
    shape = () if categories else observation_shape(environment)
    return RecurrentActorCritic(config.model, config.memory, shape, categories, outputs, continuous)
