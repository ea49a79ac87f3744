"""Advantage actor-critic (Mnih et al. 2016, alg. S3, its workers in step): one update on each short rollout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.rl.actor_critic import actor_critic, chosen, noise_of
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.environments import Environment
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.returns import generalized_advantages
from jaxarch.rl.successors import successor_values
from jaxarch.run import Index, Metrics, check_not_negative


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `A2CConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    gae_lambda: float | Float[Array, "*replicas"]
    entropy: float | Float[Array, "*replicas"]
    value: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class A2CConfig:
    learning_rate: float = 7e-4
    """RMSProp's, at the start"""
    anneal: bool = True
    """the learning rate falls linearly to 0 at the run's end"""
    gamma: float = 0.99
    """discount of a step"""
    gae_lambda: float = 1.0
    """of generalised advantage estimates; 1: all rewards of the rollout, then the value, as in the paper"""
    entropy: float = 0.01
    """weight of the entropy in the objective"""
    value: float = 0.5
    """weight of the value's loss"""
    max_norm: float = 0.5
    """global norm to which gradients are clipped (0: they are not)"""
    normalize_advantages: bool = False
    """to mean 0 and variance 1 over the rollout"""
    networks: Literal["separate", "shared"] = "separate"
    """whether policy and value have hidden layers of their own"""
    model: NetworkConfig = NetworkConfig()

    def __post_init__(self) -> None:
        check_not_negative(self, ("max_norm",), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.gae_lambda, self.entropy, self.value)


@flax.struct.dataclass
class Learner:
    params: Any
    opt: Any
    hypers: Any


def make_agent(environment: Environment, config: A2CConfig, iterations: int) -> Agent:
    """iterations: of the whole run, at whose end an annealed rate is 0.

    Raises ConfigError where the environment's actions are neither choices nor numbers.
    """
    network = actor_critic(environment, config.model, config.networks == "shared", "a2c")
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_rms(decay=0.99, eps=1e-5))

    def rate(index: Index) -> Array:
        return 1.0 - index / iterations if config.anneal else jnp.ones(())

    def policy_and_value(params: PyTree, observations: Any) -> Any:
        return network.apply({"params": params}, observations)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        params = network.init(key, jax.vmap(environment.reset)(key[None])[0])["params"]
        return Learner(params, direction.init(params), hypers)

    def act(learner: Learner, observation: Any, noise: Array, memory: Any, first: Any, index: Index) -> tuple:
        return chosen(policy_and_value(learner.params, observation)[0], noise), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        policy, _ = policy_and_value(learner.params, observation)
        return policy.mode() if greedy else policy.sample(key), memory

    def loss(params: PyTree, rollout: Rollout, hypers: Hypers) -> tuple[Array, Metrics]:
        policy, values = policy_and_value(params, rollout.observation)
        fixed = jax.lax.stop_gradient(values)
        frozen = jax.lax.stop_gradient(params)
        next_values = successor_values(lambda seen: policy_and_value(frozen, seen)[1], rollout, fixed)
        advantages = generalized_advantages(
            rollout.reward, fixed, next_values, hypers.gamma * ~rollout.terminated, rollout.ended, hypers.gae_lambda
        )
        value_loss = jnp.square(values - (fixed + advantages)).mean() / 2
        if config.normalize_advantages:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        policy_loss = -jnp.mean(policy.log_prob(rollout.action) * advantages)
        entropy = policy.entropy().mean()
        total = policy_loss + hypers.value * value_loss - hypers.entropy * entropy
        return total, {"train/policy_loss": policy_loss, "train/value_loss": value_loss, "train/entropy": entropy}

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        grads, metrics = jax.grad(loss, has_aux=True)(learner.params, rollout, learner.hypers)
        updates, opt = direction.update(grads, learner.opt)
        learning_rate = learner.hypers.learning_rate * rate(index)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, learner.params, updates)
        return replace(learner, params=params, opt=opt), metrics

    return Agent(init, act, learn, policy, noise=partial(noise_of, network))
