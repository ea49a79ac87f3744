"""REINFORCE (Williams 1992), with a learned baseline (Sutton & Barto 2018, sec. 13.4): whole returns, no bootstrap.

What an episode's time limit cut off counts nothing. Of an episode that a rollout leaves unfinished the steps are left
out, as their returns are not known; rollouts are to be several episodes long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxarch.rl.actor_critic import actor_critic, chosen, noise_of
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.environments import Environment
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.returns import discounted_returns
from jaxarch.run import Index, Metrics, check_not_negative


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `ReinforceConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    entropy: float | Float[Array, "*replicas"]
    value: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class ReinforceConfig:
    learning_rate: float = 3e-3
    """Adam's, at the start"""
    anneal: bool = False
    """the learning rate falls linearly to 0 at the run's end"""
    gamma: float = 0.99
    """discount of a step"""
    entropy: float = 0.01
    """weight of the entropy in the objective"""
    value: float = 0.5
    """weight of the baseline's loss"""
    baseline: bool = True
    """subtract a learned value from returns"""
    normalize: bool = True
    """what is left of returns to mean 0 and variance 1 over the rollout"""
    max_norm: float = 0.5
    """global norm to which gradients are clipped (0: they are not)"""
    networks: Literal["separate", "shared"] = "separate"
    """whether policy and value have hidden layers of their own"""
    model: NetworkConfig = NetworkConfig()

    def __post_init__(self) -> None:
        check_not_negative(self, ("max_norm",), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.entropy, self.value)


@flax.struct.dataclass
class Learner:
    params: Any
    opt: Any
    hypers: Any


def make_agent(environment: Environment, config: ReinforceConfig, iterations: int) -> Agent:
    """iterations: of the whole run, at whose end an annealed rate is 0.

    Raises ConfigError where the environment's actions are neither choices nor numbers.
    """
    network = actor_critic(environment, config.model, config.networks == "shared", "reinforce")
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam())

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
        returns = discounted_returns(
            rollout.reward, jnp.zeros_like(values), hypers.gamma * ~rollout.terminated, rollout.ended
        )
        known = ends_later(rollout).astype(values.dtype)
        weights = known / jnp.maximum(known.sum(), 1)
        advantages = returns - jax.lax.stop_gradient(values) if config.baseline else returns
        if config.normalize:
            mean = jnp.sum(advantages * weights)
            deviation = jnp.sqrt(jnp.sum(jnp.square(advantages - mean) * weights))
            advantages = (advantages - mean) / (deviation + 1e-8)
        policy_loss = -jnp.sum(policy.log_prob(rollout.action) * advantages * weights)
        value_loss = jnp.sum(jnp.square(values - returns) * weights) / 2
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


def ends_later(rollout: Rollout) -> Bool[Array, "time envs"]:
    """Of each step, whether its episode ends within the rollout."""
    return jnp.cumsum(rollout.ended[::-1], axis=0)[::-1] > 0
