"""Proximal policy optimisation (Schulman et al. 2017): several epochs of clipped updates on each rollout.

Discrete actions are drawn from a categorical distribution, continuous ones from a Gaussian whose deviation does not
depend on the observation. Of the details that decide (Huang et al. 2022, "The 37 implementation details"), these are
always there: orthogonal initialisation, Adam's eps of 1e-5, advantages normalised a minibatch at a time, the global
norm of the gradient clipped. Unlike there, an episode that a time limit cut off is bootstrapped from its true final
observation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from gymnax.environments import spaces
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.distributions import Categorical, Gaussian
from jaxarch.rl.environments import Environment, action_size, actions_of, observation_shape
from jaxarch.rl.moments import normalized, nothing_seen, updated
from jaxarch.rl.networks import NetworkConfig, Torso, orthogonal
from jaxarch.rl.returns import generalized_advantages
from jaxarch.run import ConfigError, Index, Metrics, check_least, check_not_negative


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
        check_least(self, ("epochs", "minibatches"), 1, "agent.")
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


class ActorCritic(nn.Module):
    """A distribution of actions and a value, each of observations `[*batch, *shape]`.

    outputs: numbers that the distribution is told by: logits, or the means of a Gaussian.
    """

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    outputs: int
    continuous: bool
    shared: bool

    def setup(self) -> None:
        self.actor = Torso(self.config, self.shape, self.categories)
        self.critic = self.actor if self.shared else Torso(self.config, self.shape, self.categories)
        self.actor_head = nn.Dense(self.outputs, kernel_init=orthogonal(0.01))
        self.critic_head = nn.Dense(1, kernel_init=orthogonal(1.0))
        if self.continuous:
            self.log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))

    def policy(self, observations: Any) -> Any:
        found = self.actor_head(self.actor(observations))
        return Gaussian(found, self.log_std) if self.continuous else Categorical(found)

    def value(self, observations: Any) -> Float[Array, "*batch"]:
        return self.critic_head(self.critic(observations))[..., 0]

    def __call__(self, observations: Any) -> tuple[Any, Float[Array, "*batch"]]:
        return self.policy(observations), self.value(observations)


def make_agent(environment: Environment, config: PPOConfig, envs: int, length: int, iterations: int) -> Agent:
    """PPO on rollouts of `length` steps of `envs` environments.

    iterations: of the whole run, at whose end an annealed rate is 0.
    Raises ConfigError where a rollout is not so many minibatches.
    """
    steps = envs * length
    if steps % config.minibatches:
        raise ConfigError(
            f"--agent.minibatches {config.minibatches} does not divide the {steps} steps of a rollout "
            f"(--envs {envs} times --length {length})."
        )
    network = network_of(environment, config)
    shape = observation_shape(environment)
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam(eps=1e-5))

    def rate(index: Index) -> Array:
        return 1.0 - index / iterations if config.anneal else jnp.ones(())

    def seen(learner: Learner, observations: Any) -> Any:
        """As the network sees them."""
        return normalized(learner.observations, observations) if config.normalize_observations else observations

    def policy_of(params: PyTree, observations: Any) -> Any:
        return network.apply({"params": params}, observations, method="policy")

    def value_of(params: PyTree, observations: Any) -> Any:
        return network.apply({"params": params}, observations, method="value")

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observations = jax.vmap(environment.reset)(key[None])[0]
        params = network.init(key, observations)["params"]
        moments = nothing_seen(shape) if config.normalize_observations else ()
        returns = (nothing_seen(), jnp.zeros(envs)) if config.normalize_rewards else ((), ())
        return Learner(params, direction.init(params), moments, *returns, hypers)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        policy = policy_of(learner.params, seen(learner, observation))
        action = policy.sample(key)
        return action, memory, policy.log_prob(action)

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        policy = policy_of(learner.params, seen(learner, observation))
        return policy.mode() if greedy else policy.sample(key), memory

    def advantages_of(learner: Learner, rollout: Rollout, rewards: Array) -> Batch:
        hypers, params = learner.hypers, learner.params
        observations = seen(learner, rollout.observation)
        values = value_of(params, observations)
        next_values = value_of(params, seen(learner, rollout.next_observation))
        discounts = hypers.gamma * ~rollout.terminated
        advantages = generalized_advantages(rewards, values, next_values, discounts, rollout.ended, hypers.gae_lambda)
        batch = Batch(observations, rollout.action, rollout.extras, values, advantages, advantages + values)
        return jax.tree.map(lambda leaf: leaf.reshape(steps, *leaf.shape[2:]), batch)

    def loss(params: PyTree, batch: Batch, hypers: Hypers) -> tuple[Array, Metrics]:
        """The clipped objective, the value's loss and the entropy (eq. 9)."""
        policy = policy_of(params, batch.observation)
        log_ratio = policy.log_prob(batch.action) - batch.log_prob
        ratio = jnp.exp(log_ratio)
        advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - hypers.clip, 1 + hypers.clip) * advantage)
        policy_loss, entropy = -gain.mean(), policy.entropy().mean()

        value = value_of(params, batch.observation)
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

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers, rewards = learner.hypers, rollout.reward
        if config.normalize_rewards:
            learner, rewards = scaled(learner, rollout)
        batch = advantages_of(learner, rollout, rewards)
        learning_rate = hypers.learning_rate * rate(index)

        def update(carry: tuple[PyTree, PyTree], rows: Array) -> tuple[tuple[PyTree, PyTree], Metrics]:
            params, opt = carry
            few = jax.tree.map(lambda leaf: leaf[rows], batch)
            grads, metrics = jax.grad(loss, has_aux=True)(params, few, hypers)
            updates, opt = direction.update(grads, opt)
            return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt), metrics

        orders = permutations(key, config.epochs, steps).reshape(config.epochs * config.minibatches, -1)
        (params, opt), metrics = jax.lax.scan(update, (learner.params, learner.opt), orders)
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

    return Agent(init, act, learn, policy)


def network_of(environment: Environment, config: PPOConfig) -> ActorCritic:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    continuous = isinstance(environment.action_space, spaces.Box)
    outputs = (action_size if continuous else actions_of)(environment, "ppo")
    shape = () if categories else observation_shape(environment)
    return ActorCritic(config.model, shape, categories, outputs, continuous, config.networks == "shared")


def permutations(key: Key[Array, ""], count: int, size: int) -> Int[Array, "count size"]:
    """Random orders of `0 ... size - 1`, by one sort.

    Each number is sorted by random bits put above its own: half the work of sorting keys and numbers apart. Where bits
    are equal (in `32 - log2 size` of them) the smaller number comes first, which nobody sees.
    """
    own = max(size - 1, 1).bit_length()
    bits = jax.random.bits(key, (count, size), jnp.uint32)
    packed = (bits >> own << own) | jnp.arange(size, dtype=jnp.uint32)
    return (jnp.sort(packed, axis=-1) & ((1 << own) - 1)).astype(jnp.int32)
