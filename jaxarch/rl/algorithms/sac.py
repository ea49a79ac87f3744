"""Soft actor-critic (Haarnoja et al. 2018, "Soft actor-critic algorithms and applications"; for discrete actions
Christodoulou 2019).

The policy earns its entropy besides the reward, at a price, the temperature, which is learned such that the entropy is
a wanted one. The smaller of two critics is what all learn from. Both kinds of action differ in one thing only, the soft
value of an observation: an expectation over actions that one sampled action stands for, or that is summed.

Continuous actions are in [-1, 1] (`environments.rescaled`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnax.environments import spaces
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.rl import replay
from jaxarch.rl.agent import Agent, Rollout, nothing_learned
from jaxarch.rl.distributions import Categorical, TanhGaussian
from jaxarch.rl.environments import Environment, action_size, actions_of, observation_shape
from jaxarch.rl.layout import divided
from jaxarch.rl.networks import ActionValue, NetworkConfig, Torso, orthogonal
from jaxarch.run import ConfigError, Index, Mean, Metrics, check_least

LOG_STD = (-20.0, 2.0)  # bounds of the logarithm of a deviation (app. D's code)


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `SACConfig`. target_entropy: in nats."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    tau: float | Float[Array, "*replicas"]
    temperature: float | Float[Array, "*replicas"]
    target_entropy: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class SACConfig:
    learning_rate: float = 3e-4
    """Adam's, of policy, critics and temperature"""
    gamma: float = 0.99
    """discount of a step"""
    tau: float = 0.005
    """share of the way that a target network goes to its network at an update"""
    temperature: float = 1.0
    """reward that a nat of entropy is worth, at the start"""
    learn_temperature: bool = True
    """such that the entropy becomes the target; else it stays"""
    target_entropy: float | None = None
    """nats (None: minus one for each number of an action; of discrete actions, 0.98 of the most there is)"""
    random_steps: int = 1000
    """steps of uniformly random actions before learning begins"""
    updates: int = 1
    """in an iteration"""
    batch_size: int = 256
    """transitions of an update"""
    capacity: int = 100_000
    """transitions that are remembered"""
    model: NetworkConfig = NetworkConfig(width=256, activation="relu")

    def __post_init__(self) -> None:
        check_least(self, ("random_steps", "updates", "batch_size", "capacity"), 1, "agent.")
        if not self.temperature > 0:
            raise ConfigError(f"--agent.temperature {self.temperature:g} is not above 0.")

    def hypers(self, environment: Environment) -> Hypers:
        target = self.target_entropy
        if target is None and isinstance(environment.action_space, spaces.Box):
            target = -float(action_size(environment, "sac"))
        elif target is None:
            target = 0.98 * float(np.log(actions_of(environment, "sac")))
        return Hypers(self.learning_rate, self.gamma, self.tau, self.temperature, target)


class Networks(NamedTuple):
    """critics, targets: two trees of parameters each."""

    policy: PyTree
    critics: tuple[PyTree, ...]
    targets: tuple[PyTree, ...]
    log_temperature: Float[Array, ""]
    policy_opt: PyTree
    critics_opt: PyTree
    temperature_opt: PyTree


@flax.struct.dataclass
class Learner:
    networks: Any
    replay: Any
    hypers: Any


class GaussianPolicy(nn.Module):
    config: NetworkConfig
    shape: tuple[int, ...]
    size: int

    @nn.compact
    def __call__(self, observations: Any) -> TanhGaussian:
        features = Torso(self.config, self.shape)(observations)
        told = nn.Dense(2 * self.size, kernel_init=orthogonal(0.01))(features)
        mean, log_std = jnp.split(told, 2, axis=-1)
        return TanhGaussian(mean, jnp.clip(log_std, *LOG_STD))


class Outputs(nn.Module):
    """A number for each discrete action: its logit, or its value."""

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    actions: int

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "batch actions"]:
        features = Torso(self.config, self.shape, self.categories)(observations)
        return nn.Dense(self.actions, kernel_init=orthogonal(0.01))(features)


class Actor(NamedTuple):
    """What differs between the kinds of action.

    init: `(key, observation) -> (policy, critics)`, parameters.
    distribution: `(policy, observation) -> distribution` of actions.
    values: `(critics, observation, action) -> [critics, batch]`.
    soft_value: `(policy, critics, observation, temperature, key) -> (value, entropy)`, `[batch]` each: the expectation
        over actions of the smaller critic's value less temperature * log pi (eq. 3), and of -log pi.
    """

    init: Any
    distribution: Any
    values: Any
    soft_value: Any


def continuous(environment: Environment, config: SACConfig) -> Actor:
    size = action_size(environment, "sac")
    policy_network = GaussianPolicy(config.model, observation_shape(environment), size)
    value_network = ActionValue(config.model)

    def init(key: Key[Array, ""], observation: Any) -> tuple[PyTree, tuple[PyTree, ...]]:
        policy_key, *keys = jax.random.split(key, 3)
        action = jnp.zeros((1, size))
        critics = tuple(value_network.init(key, observation, action)["params"] for key in keys)
        return policy_network.init(policy_key, observation)["params"], critics

    def distribution(policy: PyTree, observation: Any) -> Any:
        return policy_network.apply({"params": policy}, observation)

    def values(critics: tuple[PyTree, ...], observation: Any, action: Any) -> Float[Array, "critics batch"]:
        found: list[Any] = [value_network.apply({"params": critic}, observation, action) for critic in critics]
        return jnp.stack(found)

    def soft_value(
        policy: PyTree, critics: tuple[PyTree, ...], observation: Any, temperature: Array, key: Key[Array, ""]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        action, log_prob = distribution(policy, observation).sample_and_log_prob(key)
        return values(critics, observation, action).min(0) - temperature * log_prob, -log_prob

    return Actor(init, distribution, values, soft_value)


def discrete(environment: Environment, config: SACConfig) -> Actor:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    shape = () if categories else observation_shape(environment)
    network = Outputs(config.model, shape, categories, actions_of(environment, "sac"))

    def init(key: Key[Array, ""], observation: Any) -> tuple[PyTree, tuple[PyTree, ...]]:
        policy, *critics = (network.init(key, observation)["params"] for key in jax.random.split(key, 3))
        return policy, tuple(critics)

    def distribution(policy: PyTree, observation: Any) -> Categorical:
        logits: Any = network.apply({"params": policy}, observation)
        return Categorical(logits)

    def every_value(critics: tuple[PyTree, ...], observation: Any) -> Float[Array, "critics batch actions"]:
        found: list[Any] = [network.apply({"params": critic}, observation) for critic in critics]
        return jnp.stack(found)

    def values(critics: tuple[PyTree, ...], observation: Any, action: Any) -> Float[Array, "critics batch"]:
        found = every_value(critics, observation)
        return jnp.sum(found * jax.nn.one_hot(action, found.shape[-1]), axis=-1)

    def soft_value(
        policy: PyTree, critics: tuple[PyTree, ...], observation: Any, temperature: Array, key: Key[Array, ""]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """Summed over all actions (Christodoulou 2019, eq. 10); `key` is without effect."""
        actions = distribution(policy, observation)
        entropy = actions.entropy()
        expected = jnp.sum(jnp.exp(actions.log_probs()) * every_value(critics, observation).min(0), axis=-1)
        return expected + temperature * entropy, entropy

    return Actor(init, distribution, values, soft_value)


def make_agent(environment: Environment, config: SACConfig, envs: int, length: int) -> Agent:
    """SAC that learns after every `length` steps of `envs` environments."""
    is_continuous = isinstance(environment.action_space, spaces.Box)
    actor = (continuous if is_continuous else discrete)(environment, config)
    direction = optax.scale_by_adam()
    random_iterations = -(-config.random_steps // (envs * length))

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        policy, critics = actor.init(key, environment.reset(key)[0][None])
        log_temperature = jnp.log(jnp.asarray(hypers.temperature, jnp.float32))
        opts = (direction.init(params) for params in (policy, critics, log_temperature))
        networks = Networks(policy, critics, critics, log_temperature, *opts)
        return Learner(networks, replay.init(environment, config.capacity, envs, length), hypers)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        action = actor.distribution(learner.networks.policy, observation).sample(key)
        anything = jax.vmap(environment.action_space.sample)(jax.random.split(key, len(action)))
        return jnp.where(index < random_iterations, anything, action), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        actions = actor.distribution(learner.networks.policy, observation)
        return actions.mode() if greedy else actions.sample(key), memory

    def descended(params: PyTree, grads: PyTree, opt: PyTree, hypers: Hypers) -> tuple[Any, PyTree]:
        updates, opt = direction.update(grads, opt)
        return jax.tree.map(lambda p, u: p - hypers.learning_rate * u, params, updates), opt

    def update(networks: Networks, batch: replay.Transitions, key: Any, hypers: Hypers) -> tuple[Networks, Metrics]:
        """Of the critics, the policy, the temperature and the targets, in this order (alg. 1)."""
        next_key, policy_key = jax.random.split(key)
        temperature = jnp.exp(networks.log_temperature)
        next_value, _ = actor.soft_value(
            networks.policy, networks.targets, batch.next_observation, temperature, next_key
        )
        targets = batch.reward + batch.discount * next_value

        def critics_loss(critics: tuple[PyTree, ...]) -> tuple[Array, Array]:
            errors = actor.values(critics, batch.observation, batch.action) - targets
            return jnp.square(errors).mean(1).sum() / 2, jnp.abs(errors).mean()  # eq. 5

        (value_loss, error), grads = jax.value_and_grad(critics_loss, has_aux=True)(networks.critics)
        critics, critics_opt = descended(networks.critics, grads, networks.critics_opt, hypers)

        def policy_loss(policy: PyTree) -> tuple[Array, Array]:
            value, entropy = actor.soft_value(policy, critics, batch.observation, temperature, policy_key)
            return -value.mean(), entropy.mean()  # eq. 7

        (loss, entropy), grads = jax.value_and_grad(policy_loss, has_aux=True)(networks.policy)
        policy, policy_opt = descended(networks.policy, grads, networks.policy_opt, hypers)

        log_temperature, temperature_opt = networks.log_temperature, networks.temperature_opt
        if config.learn_temperature:
            gradient = temperature * (entropy - hypers.target_entropy)  # of eq. 18 by the logarithm
            log_temperature, temperature_opt = descended(log_temperature, gradient, temperature_opt, hypers)

        following = jax.tree.map(lambda old, new: old + hypers.tau * (new - old), networks.targets, critics)
        metrics = {
            "train/value_loss": value_loss,
            "train/td_error": error,
            "train/value": targets.mean(),
            "train/policy_loss": loss,
            "train/entropy": entropy,
            "train/temperature": temperature,
        }
        networks = Networks(policy, critics, following, log_temperature, policy_opt, critics_opt, temperature_opt)
        return networks, dict(metrics)

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers = learner.hypers
        sample_key, update_key = jax.random.split(key)
        kept = replay.add(learner.replay, rollout, index)
        drawn = replay.sample(kept, sample_key, config.updates * config.batch_size, index, hypers.gamma)
        batches = divided(jax.tree.map(lambda leaf: leaf.reshape(config.updates, -1, *leaf.shape[1:]), drawn), 1)

        def updates(networks: Networks) -> tuple[Networks, Metrics]:
            keys = jax.random.split(update_key, config.updates)
            return jax.lax.scan(lambda networks, given: update(networks, *given, hypers), networks, (batches, keys))

        def none(networks: Networks) -> tuple[Networks, Metrics]:
            return networks, nothing_learned(updates, networks)

        learns = index >= random_iterations
        networks, found = jax.lax.cond(learns, updates, none, learner.networks)
        weight = jnp.where(learns, float(config.updates), 0.0)
        metrics: Metrics = {name: Mean(values.sum(), weight) for name, values in found.items()}
        return replace(learner, networks=networks, replay=kept), metrics

    names = ("policy", "critics", "targets", "log_temperature")
    weights = tuple(f"networks.{name}" for name in names)
    return Agent(init, act, learn, policy, weights=weights, newest_only=("replay",))
