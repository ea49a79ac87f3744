"""Proximal policy optimisation (Schulman et al. 2017): several epochs of clipped updates on each rollout.

Discrete actions are drawn from a categorical distribution, continuous ones from a Gaussian whose deviation does not
depend on the observation. Of the details that decide (Huang et al. 2022, "The 37 implementation details"), these are
always there: orthogonal initialisation, Adam's eps of 1e-5, advantages normalised a minibatch at a time, the global
norm of the gradient clipped. Unlike there, an episode that a time limit cut off is bootstrapped from its true final
observation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.rl.actor_critic import actor_critic, chosen, noise_of
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.environments import Environment
from jaxarch.rl.layout import grouped, shuffled
from jaxarch.rl.moments import normalized, nothing_seen, updated
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.returns import generalized_advantages
from jaxarch.rl.successors import successor_values
from jaxarch.run import ConfigError, Index, Metrics, backend, check_least, check_not_negative
from jaxarch.run.mesh import size_of

AT_ONCE = 2048  # steps whose gradient is computed at once: the features of more do not fit a core's cache


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `PPOConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    gae_lambda: float | Float[Array, "*replicas"]
    clip: float | Float[Array, "*replicas"]
    entropy: float | Float[Array, "*replicas"]
    value: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class PPOConfig:
    learning_rate: float = 2.5e-4
    """Adam's, at the start"""
    anneal: bool = True
    """the learning rate falls linearly to 0 at the run's end"""
    gamma: float = 0.99
    """discount of a step"""
    gae_lambda: float = 0.95
    """of generalised advantage estimates"""
    clip: float = 0.2
    """how far the ratio of probabilities may move from 1 to some gain"""
    clip_value: bool = True
    """clip the change of values too, by as much"""
    entropy: float = 0.01
    """weight of the entropy in the objective"""
    value: float = 0.5
    """weight of the value's loss"""
    epochs: int = 4
    """passes over each rollout"""
    minibatches: int = 4
    """updates a pass"""
    groups: int = 1
    """of environments, within which steps are shuffled: as many devices share the work and send gradients alone"""
    max_norm: float = 0.5
    """global norm to which gradients are clipped (0: they are not)"""
    normalize_observations: bool = False
    """by their running mean and variance"""
    normalize_rewards: bool = False
    """by the running deviation of the discounted return"""
    networks: Literal["separate", "shared"] = "separate"
    """whether policy and value have hidden layers of their own"""
    model: NetworkConfig = NetworkConfig()

    def __post_init__(self) -> None:
        check_least(self, ("epochs", "minibatches", "groups"), 1, "agent.")
        check_not_negative(self, ("max_norm",), "agent.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.gae_lambda, self.clip, self.entropy, self.value)


@flax.struct.dataclass
class Learner:
    """What PPO has learned.

    observations: moments of what was observed.
    returns: moments of the discounted returns, `[envs]` of which are under way.
    """

    params: Any
    opt: Any
    observations: Any
    returns: Any
    under_way: Any
    hypers: Any


class Batch(NamedTuple):
    """Steps that are learned from, `[steps, ...]`."""

    observation: Any
    action: Any
    log_prob: Float[Array, " steps"]
    value: Float[Array, " steps"]
    advantage: Float[Array, " steps"]
    target: Float[Array, " steps"]


def make_agent(environment: Environment, config: PPOConfig, envs: int, length: int, iterations: int) -> Agent:
    """PPO on rollouts of `length` steps of `envs` environments.

    iterations: of the whole run, at whose end an annealed rate is 0.
    Raises ConfigError where a rollout is not so many minibatches, or what is to be normalised is the number of a state.
    """
    steps = envs * length
    if envs % config.groups:
        raise ConfigError(f"--agent.groups {config.groups} does not divide --envs {envs}.")
    if steps // config.groups % config.minibatches:
        raise ConfigError(
            f"--agent.minibatches {config.minibatches} does not divide the {steps} steps of a rollout "
            f"(--envs {envs} times --length {length}{', in each of the --agent.groups' if config.groups > 1 else ''})."
        )
    network = actor_critic(environment, config.model, config.networks == "shared", "ppo")
    if config.normalize_observations and network.categories:
        raise ConfigError(f"--agent.normalize-observations: {environment.name} observes the number of a state.")
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam(eps=1e-5))

    def rate(index: Index) -> Array:
        return 1.0 - index / iterations if config.anneal else jnp.ones(())

    def seen(learner: Learner, observations: Any) -> Any:
        """As the network sees them."""
        return normalized(learner.observations, observations) if config.normalize_observations else observations

    def policy_and_value(params: PyTree, observations: Any) -> Any:
        return network.apply({"params": params}, observations)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observations = jax.vmap(environment.reset)(key[None])[0]
        params = network.init(key, observations)["params"]
        moments = nothing_seen(network.shape) if config.normalize_observations else ()
        returns = (nothing_seen(), jnp.zeros(envs)) if config.normalize_rewards else ((), ())
        return Learner(params, direction.init(params), moments, *returns, hypers)

    def act(learner: Learner, observation: Any, noise: Array, memory: Any, first: Any, index: Index) -> tuple:
        policy, _ = policy_and_value(learner.params, seen(learner, observation))
        return chosen(policy, noise), memory, policy

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        policy, _ = policy_and_value(learner.params, seen(learner, observation))
        return policy.mode() if greedy else policy.sample(key), memory

    def advantages_of(learner: Learner, rollout: Rollout, rewards: Array) -> Batch:
        hypers, params = learner.hypers, learner.params
        observations = seen(learner, rollout.observation)
        _, values = policy_and_value(params, observations)
        next_values = successor_values(
            lambda observations: policy_and_value(params, seen(learner, observations))[1], rollout, values
        )
        discounts = hypers.gamma * ~rollout.terminated
        advantages = generalized_advantages(rewards, values, next_values, discounts, rollout.ended, hypers.gae_lambda)
        batch = Batch(
            observations,
            rollout.action,
            rollout.extras.log_prob(rollout.action),
            values,
            advantages,
            advantages + values,
        )
        return grouped(batch, config.groups)

    def loss(params: PyTree, batch: Batch, hypers: Hypers) -> tuple[Array, Metrics]:
        """The clipped objective, the value's loss and the entropy (eq. 9)."""
        policy, value = policy_and_value(params, batch.observation)
        log_ratio = policy.log_prob(batch.action) - batch.log_prob
        ratio = jnp.exp(log_ratio)
        limited = jnp.clip(ratio, 1 - hypers.clip, 1 + hypers.clip)
        gain = jnp.minimum(ratio * batch.advantage, limited * batch.advantage)
        policy_loss, entropy = -gain.mean(), policy.entropy().mean()

        error = jnp.square(value - batch.target)
        if config.clip_value:
            near = batch.value + jnp.clip(value - batch.value, -hypers.clip, hypers.clip)
            error = jnp.maximum(error, jnp.square(near - batch.target))
        value_loss = error.mean() / 2

        total = policy_loss + hypers.value * value_loss - hypers.entropy * entropy
        return total, {
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "train/entropy": entropy,
            "train/approx_kl": jnp.mean(ratio - 1 - log_ratio),  # Schulman 2020, "Approximating KL divergence"
            "train/clip_fraction": jnp.mean(jnp.abs(ratio - 1) > hypers.clip, dtype=jnp.float32),
        }

    def gradient(params: PyTree, batch: Batch, hypers: Hypers) -> tuple[PyTree, Metrics]:
        """Of a minibatch."""
        advantage = batch.advantage
        batch = batch._replace(advantage=(advantage - advantage.mean()) / (advantage.std() + 1e-8))
        of = jax.grad(loss, has_aux=True)
        if len(advantage) <= AT_ONCE or len(advantage) % AT_ONCE or size_of("data") > 1:
            return of(params, batch, hypers)
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, AT_ONCE, *leaf.shape[1:]), batch)
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.lax.map(lambda part: of(params, part, hypers), parts))

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers, rewards = learner.hypers, rollout.reward
        if config.normalize_rewards:
            learner, rewards = scaled(learner, rollout)
        batch = advantages_of(learner, rollout, rewards)
        learning_rate = hypers.learning_rate * rate(index)

        def update(carry: tuple[PyTree, PyTree], few: Batch) -> tuple[tuple[PyTree, PyTree], Metrics]:
            params, opt = carry
            grads, metrics = gradient(params, few, hypers)
            updates, opt = direction.update(grads, opt)
            return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt), metrics

        def epoch(carry: tuple[PyTree, PyTree], order: Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
            # Shuffled at once, since XLA:CPU spreads each gather over the cores, at a price.
            return jax.lax.scan(update, carry, shuffled(batch, order, config.minibatches))

        orders = permutations(key, config.epochs * config.groups, steps // config.groups)
        orders = orders.reshape(config.epochs, config.groups, -1)
        (params, opt), metrics = jax.lax.scan(epoch, (learner.params, learner.opt), orders)
        learner = replace(learner, params=params, opt=opt)
        if config.normalize_observations:
            # Only now: what is learned from must be seen as it was when it was acted upon.
            learner = replace(learner, observations=updated(learner.observations, rollout.observation))
        return learner, jax.tree.map(jnp.mean, metrics)

    def scaled(learner: Learner, rollout: Rollout) -> tuple[Learner, Float[Array, "time envs"]]:
        """Rewards over the deviation of all discounted returns so far (Engstrom et al. 2020, sec. 3)."""

        def one(under_way: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
            reward, ended = step
            returns = learner.hypers.gamma * under_way + reward
            return jnp.where(ended, 0, returns), returns

        under_way, returns = jax.lax.scan(one, learner.under_way, (rollout.reward, rollout.ended))
        moments = updated(learner.returns, returns)
        rewards = jnp.clip(rollout.reward / jnp.sqrt(moments.variance + 1e-8), -10, 10)
        return replace(learner, returns=moments, under_way=under_way), rewards

    # Convolutions of several replicas at once are slower on a CPU than one after another.
    one_by_one = len(network.shape) == 3 and backend.platform() == "cpu"
    replicated = jax.custom_batching.sequential_vmap(learn) if one_by_one else learn
    return Agent(init, act, replicated, policy, noise=partial(noise_of, network), weights=("params", "observations"))


def permutations(key: Key[Array, ""], count: int, size: int) -> Int[Array, "count size"]:
    """Random orders of `0 ... size - 1`, by one sort.

    Each number is sorted by random bits put above its own: half the work of sorting keys and numbers apart. Where bits
    are equal (in `32 - log2 size` of them) the smaller number comes first, which nobody sees.
    """
    own = max(size - 1, 1).bit_length()
    bits = jax.random.bits(key, (count, size), jnp.uint32)
    packed = (bits >> own << own) | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(packed, axis=-1) & ((1 << own) - 1)).astype(jnp.int32)
