"""Parallelised Q-network (Gallici et al. 2025): Q-learning without replay and without a target network.

Layer normalisation keeps it stable; many environments take the place of replay; targets are lambda-returns of the
greedy values (Peng's Q(lambda), not cut where an action was random). An episode that a time limit cut off is
bootstrapped from its true final observation.
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
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.convolution import convolve
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.algorithms.ppo import permutations
from jaxarch.rl.environments import Environment, actions_of, observation_shape
from jaxarch.rl.layout import grouped, shuffled
from jaxarch.rl.networks import ACTIVATIONS, NetworkConfig, orthogonal
from jaxarch.rl.returns import lambda_returns
from jaxarch.run import ConfigError, Index, Metrics, check_least, check_not_negative


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `PQNConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    q_lambda: float | Float[Array, "*replicas"]
    epsilon: float | Float[Array, "*replicas"]
    reward_scale: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class PQNConfig:
    learning_rate: float = 1e-4
    """RAdam's, at the start"""
    anneal: bool = True
    """the learning rate falls linearly to 0 at the run's end"""
    gamma: float = 0.99
    """discount of a step"""
    q_lambda: float = 0.95
    """of the lambda-returns"""
    epsilon: float = 0.2
    """share of random actions at the end of exploration"""
    epsilon_steps: int = 100_000
    """steps of all environments in which it falls linearly from 1"""
    reward_scale: float = 1.0
    """what rewards are multiplied by before they are learned from"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 16
    """updates a pass"""
    groups: int = 1
    """of environments, within which steps are shuffled: as many devices share the work and send gradients alone"""
    max_norm: float = 10.0
    """global norm to which gradients are clipped (0: they are not)"""
    normalized: bool = True
    """layer normalisation after each hidden layer"""
    model: NetworkConfig = NetworkConfig(width=128, activation="relu")

    def __post_init__(self) -> None:
        check_least(self, ("epochs", "minibatches", "groups", "epsilon_steps"), 1, "agent.")
        check_not_negative(self, ("max_norm",), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.q_lambda, self.epsilon, self.reward_scale)


@flax.struct.dataclass
class Learner:
    params: Any
    opt: Any
    hypers: Any


class QNetwork(nn.Module):
    """Values of actions, `[*batch, actions]`; each hidden layer is normalised before its activation."""

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    actions: int
    normalized: bool

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch actions"]:
        config = self.config

        def hidden(x: Array) -> Array:
            return ACTIVATIONS[config.activation](nn.LayerNorm()(x) if self.normalized else x)

        batch = observations.shape[: observations.ndim - len(self.shape)]
        if self.categories:
            x = nn.one_hot(observations, self.categories)
        elif len(self.shape) == 3 and min(self.shape[:2]) >= 3:
            kernel = self.param("kernel", orthogonal(), (3, 3, self.shape[-1], config.channels))
            bias = self.param("bias", nn.initializers.zeros, (config.channels,))
            x = hidden(convolve(observations.reshape(-1, *self.shape).astype(jnp.float32), kernel) + bias)
            x = x.reshape(*batch, -1)
        else:
            x = observations.reshape(*batch, -1).astype(jnp.float32)
        for _ in range(config.layers):
            x = hidden(nn.Dense(config.width, kernel_init=orthogonal())(x))
        return nn.Dense(self.actions)(x)


def make_agent(environment: Environment, config: PQNConfig, envs: int, length: int, iterations: int) -> Agent:
    """PQN on rollouts of `length` steps of `envs` environments.

    iterations: of the whole run, at whose end an annealed rate is 0.
    Raises ConfigError where a rollout is not so many minibatches.
    """
    steps = envs * length
    if envs % config.groups:
        raise ConfigError(f"--agent.groups {config.groups} does not divide --envs {envs}.")
    if steps // config.groups % config.minibatches:
        raise ConfigError(
            f"--agent.minibatches {config.minibatches} does not divide the {steps} steps of a rollout "
            f"(--envs {envs} times --length {length})."
        )
    network = network_of(environment, config)
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_radam())

    def values(params: PyTree, observations: Any) -> Any:
        return network.apply({"params": params}, observations)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observations = jax.vmap(environment.reset)(key[None])[0]
        params = network.init(key, observations)["params"]
        return Learner(params, direction.init(params), hypers)

    def epsilon_at(index: Index, last: float | Array) -> Array:
        return jnp.maximum(last, 1 - (1 - last) * index * steps / config.epsilon_steps)

    def chosen(params: PyTree, observation: Any, key: Key[Array, ""], epsilon: float | Array) -> Array:
        greedy = values(params, observation).argmax(axis=-1)
        drawn, other = jax.random.uniform(key, (2, *greedy.shape))
        return jnp.where(drawn < epsilon, (other * network.actions).astype(greedy.dtype), greedy)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        return chosen(learner.params, observation, key, epsilon_at(index, learner.hypers.epsilon)), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        if greedy:
            return values(learner.params, observation).argmax(axis=-1), memory
        return chosen(learner.params, observation, key, learner.hypers.epsilon), memory

    def loss(params: PyTree, batch: tuple[Any, Array, Array]) -> tuple[Array, Array]:
        observation, action, target = batch
        error = jnp.sum(values(params, observation) * jax.nn.one_hot(action, network.actions), axis=-1) - target
        return jnp.square(error).mean() / 2, jnp.abs(error).mean()

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers = learner.hypers
        targets = lambda_returns(
            rollout.reward * hypers.reward_scale,
            values(learner.params, rollout.next_observation).max(axis=-1),
            hypers.gamma * ~rollout.terminated,
            rollout.ended,
            hypers.q_lambda,
        )
        batch = grouped((rollout.observation, rollout.action, targets), config.groups)
        rate = hypers.learning_rate * (1 - index / iterations if config.anneal else 1.0)

        def update(carry: tuple[PyTree, PyTree], few: tuple) -> tuple[tuple[PyTree, PyTree], Metrics]:
            params, opt = carry
            (value, error), grads = jax.value_and_grad(loss, has_aux=True)(params, few)
            updates, opt = direction.update(grads, opt)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, opt), {"train/value_loss": value, "train/td_error": error}

        def epoch(carry: tuple[PyTree, PyTree], order: Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
            return jax.lax.scan(update, carry, shuffled(batch, order, config.minibatches))

        orders = permutations(key, config.epochs * config.groups, steps // config.groups)
        orders = orders.reshape(config.epochs, config.groups, -1)
        (params, opt), metrics = jax.lax.scan(epoch, (learner.params, learner.opt), orders)
        metrics = jax.tree.map(jnp.mean, metrics)
        metrics["train/epsilon"] = epsilon_at(index, hypers.epsilon)
        return replace(learner, params=params, opt=opt), metrics

    return Agent(init, act, learn, policy)


def network_of(environment: Environment, config: PQNConfig) -> QNetwork:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    shape = () if categories else observation_shape(environment)
    return QNetwork(config.model, shape, categories, actions_of(environment, "pqn"), config.normalized)
