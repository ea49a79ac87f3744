"""Deep Q-learning (Mnih et al. 2015) and its extensions, each an option, all together Rainbow (Hessel et al. 2018).

* double: the online network chooses the next action, the target network values it (van Hasselt et al. 2016)
* dueling: values and advantages in streams of their own (Wang et al. 2016)
* prioritized: what surprised is learned from more often (Schaul et al. 2016)
* horizon: rewards of several steps before the bootstrap (Sutton 1988)
* noisy: weights with learned noise explore, not random actions (Fortunato et al. 2018)
* returns: the mean alone; a categorical distribution, C51 (Bellemare et al. 2017); quantiles, QR (Dabney et al. 2018b)

An episode that a time limit cut off is bootstrapped from its true final observation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from gymnax.environments import spaces
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.rl import replay
from jaxarch.rl.agent import Agent, Rollout
from jaxarch.rl.distributional import projected, quantile_loss
from jaxarch.rl.environments import Environment, actions_of, observation_shape
from jaxarch.rl.layout import divided
from jaxarch.rl.networks import ACTIVATIONS, MLP, Flat, NetworkConfig, Perceptron
from jaxarch.rl.replay import Transitions
from jaxarch.run import ConfigError, Index, Mean, Metrics, check_least, check_not_negative

PRIORITY_FLOOR = 1e-6  # so that nothing is never drawn again


class Hypers(NamedTuple):
    """The numbers that a sweep may vary, as in `DQNConfig`."""

    learning_rate: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]
    epsilon: float | Float[Array, "*replicas"]
    alpha: float | Float[Array, "*replicas"]
    beta: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class DQNConfig:
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
    double: bool = False
    """the online network chooses the next action, the target network values it"""
    dueling: bool = False
    """values and advantages in streams of their own"""
    prioritized: bool = False
    """what surprised is learned from more often"""
    alpha: float = 0.5
    """exponent of priorities"""
    beta: float = 0.4
    """exponent of importance weights at the start; it rises linearly to 1"""
    horizon: int = 1
    """steps before the bootstrap"""
    noisy: bool = False
    """explore by learned noise in the weights, not by random actions"""
    returns: Literal["mean", "categorical", "quantile"] = "mean"
    """what is learned of returns: their mean, or their distribution as C51 or as QR does"""
    atoms: int = 51
    """points of a categorical distribution, or quantiles"""
    lowest: float = -10.0
    """return at the first point of a categorical distribution"""
    highest: float = 10.0
    """return at its last point"""
    model: NetworkConfig = NetworkConfig(activation="relu")

    def __post_init__(self) -> None:
        check_least(self, ("epsilon_steps", "replay", "batch_size", "updates", "target_every", "horizon"), 1, "agent.")
        check_least(self, ("starts",), 0, "agent.")
        check_least(self, ("atoms",), 2, "agent.")
        check_not_negative(self, ("max_norm", "adam_eps"), "agent.")
        lowest, highest = f"--agent.lowest {self.lowest:g}", f"--agent.highest {self.highest:g}"
        if not (math.isfinite(self.lowest) and math.isfinite(self.highest)):
            raise ConfigError(f"{lowest}, {highest}: they are finite numbers.")
        if not self.lowest < self.highest:
            raise ConfigError(f"{lowest} is not below {highest}.")

    @property
    def hypers(self) -> Hypers:
        return Hypers(self.learning_rate, self.gamma, self.epsilon, self.alpha, self.beta)


RAINBOW = DQNConfig(
    adam_eps=1.5e-4,
    double=True,
    dueling=True,
    prioritized=True,
    horizon=3,
    noisy=True,
    returns="categorical",
    max_norm=10.0,
)


@flax.struct.dataclass
class Learner:
    params: Any
    target: Any
    opt: Any
    replay: Any
    hypers: Any


class NoisyDense(nn.Module):
    """A dense layer whose weights have factorised Gaussian noise of learned size (Fortunato et al. 2018, sec. 3).

    One noise for all of a call, drawn from the collection `noise`; none where there is no such key.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch features"]:
        inputs = x.shape[-1]
        bound = inputs**-0.5

        def uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        deviation = nn.initializers.constant(0.5 * bound)
        kernel = self.param("kernel", uniform, (inputs, self.features))
        bias = self.param("bias", uniform, (self.features,))
        kernel_deviation = self.param("kernel_deviation", deviation, (inputs, self.features))
        bias_deviation = self.param("bias_deviation", deviation, (self.features,))
        if not self.has_rng("noise"):
            return x @ kernel + bias
        drawn = jax.random.normal(self.make_rng("noise"), (inputs + self.features,))
        drawn = jnp.sign(drawn) * jnp.sqrt(jnp.abs(drawn))
        before, after = drawn[:inputs], drawn[inputs:]
        # (K + D * before after^T) x without making the noisy kernel.
        return x @ kernel + bias + ((x * before) @ kernel_deviation + bias_deviation) * after


class QNetwork(nn.Module):
    """Of each action as many numbers as its return is described by, `[*batch, actions, atoms]`."""

    config: NetworkConfig
    shape: tuple[int, ...]
    categories: int
    actions: int
    atoms: int
    dueling: bool
    noisy: bool

    @nn.compact
    def __call__(self, observations: Any) -> Float[Array, "*batch actions atoms"]:
        config = self.config
        found = Flat(config, self.shape, self.categories)(observations)
        last = config.layers  # hidden layers of a stream
        if self.dueling or self.noisy:
            last = min(config.layers, 1)
            found = MLP((config.width,) * (config.layers - last), config.activation)(found)

        def stream(outputs: int) -> Array:
            """The last hidden layers and the read-out."""
            widths, count = (config.width,) * last, outputs * self.atoms
            if self.noisy:
                x = found
                for width in widths:
                    x = ACTIVATIONS[config.activation](NoisyDense(width)(x))
                x = NoisyDense(count)(x)
            else:
                x = Perceptron(widths, ((count, 1.0),), config.activation)(found)
            return x.reshape(*x.shape[:-1], outputs, self.atoms)

        advantages = stream(self.actions)
        if not self.dueling:
            return advantages
        return stream(1) + advantages - advantages.mean(axis=-2, keepdims=True)


def make_agent(environment: Environment, config: DQNConfig, envs: int, length: int, iterations: int) -> Agent:
    """Q-learning that takes `length` steps of `envs` environments, then makes its updates.

    iterations: of the whole run, at whose end an annealed rate is 0.
    """
    steps = envs * length
    begins = max(-(-config.starts // steps), -(-config.horizon // length)) - 1  # the first iteration that learns
    copies = max(config.target_every // steps, 1)  # iterations between copies to the target
    network = network_of(environment, config)
    support = jnp.linspace(config.lowest, config.highest, config.atoms)
    levels = (jnp.arange(config.atoms) + 0.5) / config.atoms
    clipped = optax.clip_by_global_norm(config.max_norm) if config.max_norm else optax.identity()
    direction = optax.chain(clipped, optax.scale_by_adam(eps=config.adam_eps))

    def described(params: PyTree, observations: Any, noise: Any = None) -> Any:
        """`[batch, actions, atoms]`"""
        rngs = None if noise is None or not config.noisy else {"noise": noise}
        return cast(Array, network.apply({"params": params}, observations, rngs=rngs))

    def values_of(returns: Float[Array, "batch actions atoms"]) -> Float[Array, "batch actions"]:
        """The mean of each described return."""
        if config.returns == "categorical":
            return jax.nn.softmax(returns) @ support
        return returns.mean(axis=-1)

    def init(key: Key[Array, ""], hypers: Hypers) -> Learner:
        observations = jax.vmap(environment.reset)(key[None])[0]
        params = network.init(key, observations)["params"]
        kept = replay.init(environment, config.replay, envs, length, config.horizon, config.prioritized)
        return Learner(params, params, direction.init(params), kept, hypers)

    def epsilon_at(index: Index, last: float | Array) -> Array:
        return jnp.maximum(last, 1 - (1 - last) * index * steps / config.epsilon_steps)

    def chosen(params: PyTree, observation: Any, key: Key[Array, ""], epsilon: float | Array) -> Int[Array, " envs"]:
        if config.noisy:
            return values_of(described(params, observation, key)).argmax(axis=-1)
        greedy = values_of(described(params, observation)).argmax(axis=-1)
        drawn, other = jax.random.uniform(key, (2, *greedy.shape))
        return jnp.where(drawn < epsilon, (other * network.actions).astype(greedy.dtype), greedy)

    def act(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, index: Index) -> tuple:
        return chosen(learner.params, observation, key, epsilon_at(index, learner.hypers.epsilon)), memory, ()

    def policy(learner: Learner, observation: Any, key: Any, memory: Any, first: Any, greedy: bool) -> tuple:
        if greedy:
            return values_of(described(learner.params, observation)).argmax(axis=-1), memory
        return chosen(learner.params, observation, key, learner.hypers.epsilon), memory

    def targets_of(learner: Learner, batch: Transitions, key: Key[Array, ""]) -> Float[Array, "batch atoms"]:
        """Of the return of each transition: samples, or the probabilities of the support."""
        target_key, choice_key = jax.random.split(key)
        following = described(learner.target, batch.next_observation, target_key)
        deciding = described(learner.params, batch.next_observation, choice_key) if config.double else following
        following = of_action(following, values_of(deciding).argmax(axis=-1))
        moved = batch.reward[:, None], batch.discount[:, None]
        if config.returns == "categorical":
            return projected(jax.nn.softmax(following), moved[0] + moved[1] * support, support)
        return moved[0] + moved[1] * following

    def losses_of(
        params: PyTree, batch: Transitions, targets: Array, key: Key[Array, ""]
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        """Losses, and how surprising each transition is."""
        returns = of_action(described(params, batch.observation, key), batch.action)
        if config.returns == "categorical":
            log_probabilities = jax.nn.log_softmax(returns)
            surprise = optax.losses.kl_divergence(log_probabilities, targets)
            return surprise, surprise
        if config.returns == "quantile":
            surprise = quantile_loss(returns, levels, targets)
            return surprise, surprise
        error = (targets - returns)[:, 0]
        return jnp.square(error), jnp.abs(error)

    def update(learner: Learner, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        hypers, kept = learner.hypers, learner.replay
        # Keys that nothing is drawn with cost as much as those that something is.
        draw_key, target_key, noise_key = jax.random.split(key, 3) if config.noisy else (key, key, key)
        if config.prioritized:
            beta = hypers.beta + (1 - hypers.beta) * index / iterations
            batch, weights, which = replay.sample_prioritized(
                kept, draw_key, config.batch_size, index, hypers.gamma, beta
            )
        else:
            batch, weights, which = replay.sample(kept, draw_key, config.batch_size, index, hypers.gamma), 1.0, None
        batch = divided(batch)
        targets = targets_of(learner, batch, target_key)

        def loss(params: PyTree) -> tuple[Array, Array]:
            losses, surprise = losses_of(params, batch, targets, noise_key)
            return jnp.mean(weights * losses), surprise

        (value, surprise), grads = jax.value_and_grad(loss, has_aux=True)(learner.params)
        updates, opt = direction.update(grads, learner.opt)
        rate = hypers.learning_rate * (1 - index / iterations if config.anneal else 1.0)
        params = jax.tree.map(lambda p, u: p - rate * u, learner.params, updates)
        if which is not None:
            kept = replay.with_priorities(kept, which, priorities_of(surprise, hypers.alpha))
        metrics: Metrics = {"train/value_loss": value, "train/td_error": surprise.mean()}
        return replace(learner, params=params, opt=opt, replay=kept), metrics

    def learn(learner: Learner, rollout: Rollout, key: Key[Array, ""], index: Index) -> tuple[Learner, Metrics]:
        learner = replace(learner, replay=replay.add(learner.replay, rollout, index))

        # Only what changes goes through the loop.
        def changed(learner: Learner) -> tuple:
            return learner.params, learner.opt, learner.replay.priorities

        def with_changed(params: PyTree, opt: PyTree, priorities: Any) -> Learner:
            return replace(learner, params=params, opt=opt, replay=replace(learner.replay, priorities=priorities))

        def one(number: Array, carry: tuple[tuple, Metrics]) -> tuple[tuple, Metrics]:
            own = jax.random.fold_in(key, number) if config.updates > 1 else key
            updated, metrics = update(with_changed(*carry[0]), own, index)
            return changed(updated), jax.tree.map(jnp.add, carry[1], metrics)

        # A loop of no turns until learning begins: a conditional would copy what it returns.
        updates = jnp.where(index >= begins, config.updates, 0)
        nothing: Metrics = {"train/value_loss": jnp.zeros(()), "train/td_error": jnp.zeros(())}
        carry, metrics = jax.lax.fori_loop(0, updates, one, (changed(learner), nothing))
        learner = with_changed(*carry)
        target = jax.lax.cond((index + 1) % copies == 0, lambda: learner.params, lambda: learner.target)
        means: Metrics = {name: Mean(total, updates.astype(jnp.float32)) for name, total in metrics.items()}
        if not config.noisy:
            means["train/epsilon"] = epsilon_at(index, learner.hypers.epsilon)
        return replace(learner, target=target), means

    return Agent(init, act, learn, policy, weights=("params", "target"), newest_only=("replay",))


def priorities_of(surprise: Float[Array, " batch"], alpha: float | Array) -> Float[Array, " batch"]:
    """By rounding, a projected target's sum can be a little below 1, and so its divergence below 0."""
    return (jnp.maximum(surprise, 0) + PRIORITY_FLOOR) ** alpha


def of_action(
    returns: Float[Array, "batch actions atoms"], action: Int[Array, " batch"]
) -> Float[Array, "batch atoms"]:
    return jnp.sum(returns * jax.nn.one_hot(action, returns.shape[1])[..., None], axis=1)


def network_of(environment: Environment, config: DQNConfig) -> QNetwork:
    space = environment.observation_space
    categories = int(space.n) if isinstance(space, spaces.Discrete) else 0
    shape = () if categories else observation_shape(environment)
    atoms = 1 if config.returns == "mean" else config.atoms
    actions = actions_of(environment, "dqn")
    return QNetwork(config.model, shape, categories, actions, atoms, config.dueling, config.noisy)
