"""Twin delayed deep deterministic policy gradients (Fujimoto et al. 2018, alg. 1).

A deterministic policy climbs the first of two critics. Three things keep it from climbing their errors: the smaller of
the two values is what both learn (clipped double Q-learning), the target policy's action has noise (smoothing), and the
policy and all targets are updated at every second update of the critics only.

Actions are in [-1, 1] (`environments.rescaled`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.rl import replay
from jaxarch.rl.agent import Agent, Rollout, nothing_learned
from jaxarch.rl.environments import Environment, action_size, observation_shape
from jaxarch.rl.layout import divided
from jaxarch.rl.networks import ActionValue, NetworkConfig, Torso, orthogonal
from jaxarch.run import Index, Mean, Metrics, check_least, check_not_negative
from jaxarch.run.protocol import mean


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `TD3Config`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    tau: float | Float[Array, "*replicas"]
    exploration: float | Float[Array, "*replicas"]
    target_noise: float | Float[Array, "*replicas"]
    target_noise_clip: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class TD3Config:
    learning_rate: float = 1e-3
    """Adam's, of policy and critics"""
    gamma: float = 0.99
    """discount of a step"""
    tau: float = 0.005
    """share of the way that a target network goes to its network at an update"""
    exploration: float = 0.1
    """deviation of the noise on actions while collecting"""
    target_noise: float = 0.2
    """deviation of the noise on the target policy's actions"""
    target_noise_clip: float = 0.5
    """the most that it is"""
    critics: int = 2
    """of which the smallest value is learned"""
    delay: int = 2
    """updates of the critics for one of the policy and the targets"""
    random_steps: int = 1000
    """steps of uniformly random actions before learning begins"""
    updates: int = 1
    """of the critics in an iteration"""
    batch_size: int = 256
    """transitions of an update"""
    capacity: int = 100_000
    """transitions that are remembered"""
    model: NetworkConfig = NetworkConfig(width=256, activation="relu")

    def __post_init__(self) -> None:
        names = ("critics", "delay", "random_steps", "updates", "batch_size", "capacity")
        check_least(self, names, 1, "agent.")
        check_not_negative(self, ("exploration", "target_noise"), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(*(getattr(self, name) for name in Hypers._fields))


class Networks(NamedTuple):
    """critics, critic_targets: one tree of parameters each."""

    policy: PyTree
    critics: tuple[PyTree, ...]
    policy_target: PyTree
    critic_targets: tuple[PyTree, ...]
    policy_opt: PyTree
    critics_opt: PyTree


@flax.struct.dataclass
class Learner:
    networks: Any
    replay: Any
    hypers: Any


class Policy(nn.Module):
    """Actions in [-1, 1]."""

    config: NetworkConfig
    shape: tuple[int, ...]
    size: int

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch size"]:
        features = Torso(self.config, self.shape)(observations)
        return nn.tanh(nn.Dense(self.size, kernel_init=orthogonal(0.01))(features))


def make_agent(environment: Environment, config: TD3Config, envs: int, length: int) -> Agent:
    """TD3 that learns after every `length` steps of `envs` environments.

    Raises ConfigError where actions are discrete.
    """
    size = action_size(environment, "td3")
    policy_network = Policy(config.model, observation_shape(environment), size)
    value_network = ActionValue(config.model)
    direction = optax.scale_by_adam()
    random_iterations = -(-config.random_steps // (envs * length))

    def action_of(params: PyTree, observation: Any) -> Float[Array, "batch size"]:
        return policy_network.apply({"params": params}, observation)  # type: ignore[return-value]

    def values_of(critics: tuple[PyTree, ...], observation: Any, action: Any) -> Float[Array, "critics batch"]:
        values: list[Any] = [value_network.apply({"params": params}, observation, action) for params in critics]
        return jnp.stack(values)

    def noisy(hypers: Hypers, action: Float[Array, "batch size"], key: Any) -> Float[Array, "batch size"]:
        return jnp.clip(action + hypers.exploration * jax.random.normal(key, action.shape), -1, 1)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        policy_key, *critic_keys = jax.random.split(key, 1 + config.critics)
        observation = environment.reset(key)[0][None]
        policy = policy_network.init(policy_key, observation)["params"]
        action = jnp.zeros((1, size))
        critics = tuple(value_network.init(key, observation, action)["params"] for key in critic_keys)
        networks = Networks(policy, critics, policy, critics, direction.init(policy), direction.init(critics))
        return Learner(networks, replay.init(environment, config.capacity, envs, length), hypers)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        action = noisy(learner.hypers, action_of(learner.networks.policy, observation), key)
        anything = jax.random.uniform(key, action.shape, minval=-1, maxval=1)
        return jnp.where(index < random_iterations, anything, action), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        action = action_of(learner.networks.policy, observation)
        return action if greedy else noisy(learner.hypers, action, key), memory

    def targets_of(networks: Networks, batch: replay.Transitions, key: Any, hypers: Hypers) -> Float[Array, " batch"]:
        """What the critics learn (alg. 1): the smallest value of the target policy's action and noise."""
        action = action_of(networks.policy_target, batch.next_observation)
        limit = hypers.target_noise_clip
        noise = jnp.clip(hypers.target_noise * jax.random.normal(key, action.shape), -limit, limit)
        action = jnp.clip(action + noise, -1, 1)
        values = values_of(networks.critic_targets, batch.next_observation, action)
        return batch.reward + batch.discount * values.min(0)

    def descended(params: PyTree, grads: PyTree, opt: PyTree, hypers: Hypers) -> tuple[PyTree, PyTree]:
        updates, opt = direction.update(grads, opt)
        return jax.tree.map(lambda p, u: p - hypers.learning_rate * u, params, updates), opt

    def followed(target: PyTree, params: PyTree, hypers: Hypers) -> PyTree:
        return jax.tree.map(lambda old, new: old + hypers.tau * (new - old), target, params)

    def update_critics(
        networks: Networks, batch: replay.Transitions, key: Any, hypers: Hypers
    ) -> tuple[Networks, Metrics]:
        targets = targets_of(networks, batch, key, hypers)

        def loss(critics: tuple[PyTree, ...]) -> tuple[Array, Array]:
            errors = values_of(critics, batch.observation, batch.action) - targets
            return jnp.square(errors).mean(1).sum(), jnp.abs(errors).mean()

        (value, error), grads = jax.value_and_grad(loss, has_aux=True)(networks.critics)
        critics, opt = descended(networks.critics, grads, networks.critics_opt, hypers)
        metrics: Metrics = {
            "train/value_loss": mean(value),
            "train/td_error": mean(error),
            "train/value": mean(targets.mean()),
        }
        return networks._replace(critics=critics, critics_opt=opt), metrics

    def update_policy(networks: Networks, batch: replay.Transitions, hypers: Hypers) -> tuple[Networks, Mean]:
        """And the targets."""

        def loss(policy: PyTree) -> Array:
            action = action_of(policy, batch.observation)
            return -values_of(networks.critics[:1], batch.observation, action).mean()

        value, grads = jax.value_and_grad(loss)(networks.policy)
        policy, opt = descended(networks.policy, grads, networks.policy_opt, hypers)
        networks = networks._replace(
            policy=policy,
            policy_opt=opt,
            policy_target=followed(networks.policy_target, policy, hypers),
            critic_targets=followed(networks.critic_targets, networks.critics, hypers),
        )
        return networks, mean(value)

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers = learner.hypers
        sample_key, update_key = jax.random.split(key)
        kept = replay.add(learner.replay, rollout, index)
        drawn = replay.sample(kept, sample_key, config.updates * config.batch_size, index, hypers.gamma)
        batches = divided(jax.tree.map(lambda leaf: leaf.reshape(config.updates, -1, *leaf.shape[1:]), drawn), 1)

        def update(networks: Networks, given: tuple[Index, Any, replay.Transitions]) -> tuple[Networks, Metrics]:
            number, key, batch = given
            networks, metrics = update_critics(networks, batch, key, hypers)
            networks, policy_loss = jax.lax.cond(
                number % config.delay == config.delay - 1,
                lambda networks: update_policy(networks, batch, hypers),
                lambda networks: (networks, nothing_learned(update_policy, networks, batch, hypers)),
                networks,
            )
            return networks, {**metrics, "train/policy_loss": policy_loss}

        def updates(networks: Networks) -> tuple[Networks, Metrics]:
            numbers = index * config.updates + jnp.arange(config.updates)
            keys = jax.random.split(update_key, config.updates)
            networks, metrics = jax.lax.scan(update, networks, (numbers, keys, batches))
            return networks, jax.tree.map(lambda values: values.sum(0), metrics)

        def no_update(networks: Networks) -> tuple[Networks, Metrics]:
            return networks, nothing_learned(updates, networks)

        networks, metrics = jax.lax.cond(index >= random_iterations, updates, no_update, learner.networks)
        return replace(learner, networks=networks, replay=kept), metrics

    names = ("policy", "critics", "policy_target", "critic_targets")
    weights = tuple(f"networks.{name}" for name in names)
    return Agent(init, act, learn, policy, weights=weights, newest_only=("replay",))
