"""Implicit quantile networks (Dabney et al. 2018a): the return's quantile function, at levels drawn anew each time.

The network is asked for the quantile of any level in (0, 1): an embedding of the level by cosines multiplies what the
observation was made into (eq. 4). An episode that a time limit cut off is bootstrapped from its true final
observation.
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

from jaxarch.rl import replay
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.distributional import quantile_loss
from jaxarch.rl.environments import Environment, actions_of, observation_shape
from jaxarch.rl.layout import divided
from jaxarch.rl.networks import ACTIVATIONS, NetworkConfig, Torso, orthogonal
from jaxarch.run import ConfigError, Index, Mean, Metrics, check_least, check_not_negative


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `IQNConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    epsilon: float | Float[Array, "*replicas"]
    risk: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class IQNConfig:
    learning_rate: float = 2.5e-4
    """Adam's, at the start"""
    anneal: bool = False
    """the learning rate falls linearly to 0 at the run's end"""
    adam_eps: float = 1e-8
    """added to the root of Adam's second moment"""
    max_norm: float = 0.0
    """global norm to which gradients are clipped (0: they are not)"""
    gamma: float = 0.99
    """discount of a step"""
    epsilon: float = 0.05
    """share of random actions at the end of exploration"""
    epsilon_steps: int = 250_000
    """steps of all environments in which it falls linearly from 1"""
    risk: float = 1.0
    """actions are chosen by the mean of quantiles of levels up to this: below 1, by the worst of what may come"""
    replay: int = 10_000
    """steps of all environments that are kept"""
    starts: int = 10_000
    """steps of all environments before anything is learned"""
    batch_size: int = 128
    """transitions of an update"""
    updates: int = 1
    """updates an iteration"""
    target_every: int = 500
    """steps of all environments between copies of the online network to the target network"""
    horizon: int = 1
    """steps before the bootstrap"""
    quantiles: int = 8
    """levels drawn for a prediction"""
    target_quantiles: int = 8
    """levels drawn for a target"""
    acting_quantiles: int = 32
    """levels whose mean chooses an action"""
    cosines: int = 64
    """numbers that a level is embedded in"""
    model: NetworkConfig = NetworkConfig(activation="relu")

    def __post_init__(self) -> None:
        least_one = "epsilon_steps", "replay", "batch_size", "updates", "target_every", "horizon"
        check_least(self, (*least_one, "quantiles", "target_quantiles", "acting_quantiles", "cosines"), 1, "agent.")
        check_least(self, ("starts",), 0, "agent.")
        check_not_negative(self, ("max_norm", "adam_eps"), "agent.")
        if not 0 < self.risk <= 1:
            raise ConfigError(f"--agent.risk {self.risk:g} is not in (0, 1].")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.epsilon, self.risk)


@flax.struct.dataclass
class Learner:
    params: Any
    target: Any
    opt: Any
    replay: Any
    hypers: Any


class QuantileNetwork(nn.Module):
    """Of each action's return the quantiles of these levels, `[batch, quantiles, actions]`.

    The embedded level multiplies the features; one more hidden layer follows.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    actions: int
    cosines: int

    @nn.compact
    def __call__(
        self, observations: Any, levels: Float[Array, "batch quantiles"]
    ) -> Float[Array, "batch quantiles actions"]:
        activation = ACTIVATIONS[self.config.activation]
        features = Torso(self.config, self.shape, self.categories)(observations)
        waves = jnp.cos(jnp.pi * jnp.arange(self.cosines) * levels[..., None])
        embedded = activation(nn.Dense(features.shape[-1])(waves))
        x = features[:, None] * embedded
        x = activation(nn.Dense(self.config.width, kernel_init=orthogonal())(x))
        return nn.Dense(self.actions)(x)


def make_agent(environment: Environment, config: IQNConfig, envs: int, length: int, iterations: int) -> Agent:
    """Takes `length` steps of `envs` environments, then makes its updates.

    iterations: of the whole run, at whose end an annealed rate is 0.
    """
    steps = envs * length
    begins = max(-(-config.starts // steps), -(-config.horizon // length)) - 1  # the first iteration that learns
    copies = max(config.target_every // steps, 1)  # iterations between copies to the target
    network = network_of(environment, config)
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam(eps=config.adam_eps))

    def quantiles_of(params: PyTree, observations: Any, levels: Array) -> Any:
        return network.apply({"params": params}, observations, levels)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observations = jax.vmap(environment.reset)(key[None])[0]
        params = network.init(key, observations, jnp.zeros((1, 1)))["params"]
        kept = replay.init(environment, config.replay, envs, length, config.horizon)
        return Learner(params, params, direction.init(params), kept, hypers)

    def best(params: PyTree, observations: Any, levels: Array, risk: float | Array) -> Array:
        """The action whose quantiles of these levels, pressed below `risk`, have the highest mean (eq. 3)."""
        return quantiles_of(params, observations, risk * levels).mean(axis=1).argmax(axis=-1)

    def epsilon_at(index: Index, last: float | Array) -> Array:
        return jnp.maximum(last, 1 - (1 - last) * index * steps / config.epsilon_steps)

    def chosen(learner: Learner, observation: Any, key: Key[Array, ""], epsilon: float | Array) -> Array:
        level_key, key = jax.random.split(key)
        levels = jax.random.uniform(level_key, (len(observation), config.acting_quantiles))
        greedy = best(learner.params, observation, levels, learner.hypers.risk)
        drawn, other = jax.random.uniform(key, (2, *greedy.shape))
        return jnp.where(drawn < epsilon, (other * network.actions).astype(greedy.dtype), greedy)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        return chosen(learner, observation, key, epsilon_at(index, learner.hypers.epsilon)), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        if not greedy:
            return chosen(learner, observation, key, learner.hypers.epsilon), memory
        even = (jnp.arange(config.acting_quantiles) + 0.5) / config.acting_quantiles
        levels = jnp.broadcast_to(even, (len(observation), len(even)))
        return best(learner.params, observation, levels, learner.hypers.risk), memory

    def update(
        learner: Learner, params: PyTree, opt: PyTree, key: Key[Array, ""], index: Index
    ) -> tuple[PyTree, PyTree, Metrics]:
        hypers, size = learner.hypers, config.batch_size
        draw_key, acting_key, target_key, level_key = jax.random.split(key, 4)
        batch = divided(replay.sample(learner.replay, draw_key, size, index, hypers.gamma))
        acting_levels = jax.random.uniform(acting_key, (size, config.acting_quantiles))
        action = best(learner.target, batch.next_observation, acting_levels, hypers.risk)
        target_levels = jax.random.uniform(target_key, (size, config.target_quantiles))
        following = of_action(quantiles_of(learner.target, batch.next_observation, target_levels), action)
        targets = batch.reward[:, None] + batch.discount[:, None] * following
        levels = jax.random.uniform(level_key, (size, config.quantiles))

        def loss(params: PyTree) -> tuple[Array, Array]:
            quantiles = of_action(quantiles_of(params, batch.observation, levels), batch.action)
            return quantile_loss(quantiles, levels, targets).mean(), jnp.abs(targets.mean(-1) - quantiles.mean(-1))

        (value, error), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = direction.update(grads, opt)
        rate = hypers.learning_rate * (1 - index / iterations if config.anneal else 1.0)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, opt, {"train/value_loss": value, "train/td_error": error.mean()}

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        learner = replace(learner, replay=replay.add(learner.replay, rollout, index))

        def one(number: Array, carry: tuple[PyTree, PyTree, Metrics]) -> tuple[PyTree, PyTree, Metrics]:
            params, opt, metrics = update(learner, *carry[:2], jax.random.fold_in(key, number), index)
            return params, opt, jax.tree.map(jnp.add, carry[2], metrics)

        # A loop of no turns until learning begins: a conditional would copy what it returns.
        updates = jnp.where(index >= begins, config.updates, 0)
        nothing: Metrics = {"train/value_loss": jnp.zeros(()), "train/td_error": jnp.zeros(())}
        params, opt, metrics = jax.lax.fori_loop(0, updates, one, (learner.params, learner.opt, nothing))
        target = jax.lax.cond((index + 1) % copies == 0, lambda: params, lambda: learner.target)
        means: Metrics = {name: Mean(total, updates.astype(jnp.float32)) for name, total in metrics.items()}
        means["train/epsilon"] = epsilon_at(index, learner.hypers.epsilon)
        return replace(learner, params=params, target=target, opt=opt), means

    return Agent(init, act, learn, policy, weights=("params", "target"), newest_only=("replay",))


def of_action(quantiles: Float[Array, "batch quantiles actions"], action: Array) -> Float[Array, "batch quantiles"]:
    return jnp.sum(quantiles * jax.nn.one_hot(action, quantiles.shape[-1])[:, None], axis=-1)


def network_of(environment: Environment, config: IQNConfig) -> QuantileNetwork:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    shape = () if categories else observation_shape(environment)
    actions = actions_of(environment, "iqn")
    return QuantileNetwork(config.model, shape, categories, actions, config.cosines)
