"""How many steps of CartPole does PPO take a second, beside the structure in which it is usually published?

    python -m benchmarks.ppo_step --output results
    python -m benchmarks.ppo_step --envs 64
    python -m benchmarks.ppo_step --seeds 8

The peer is written after PureJaxRL's published structure: one module for policy and value, both computed at each step
and differentiated as they stand; keys split at each step; gymnax's own step, which draws a new start whether or not an
episode ended; gymnax's `LogWrapper`, whose numbers are kept for every step; `jax.random.permutation`; `optax.adam`. It
takes time limits for deaths. Ours is what `python -m experiments.ppo` runs, its metrics with it. Both train on, the
same number of iterations in a dispatch, by turns; compiling is not counted.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from gymnax.wrappers.purerl import FlattenObservationWrapper, LogWrapper

from benchmarks.measuring import Measure, alternating, report_steps
from jaxarch.rl.algorithms.ppo import PPOConfig, make_agent
from jaxarch.rl.environments import make
from jaxarch.rl.training import iterations, make_experiment
from jaxarch.run import backend, check_least
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.program import Carry, Member, Programs

RATE, EPS, MAX_NORM = 2.5e-4, 1e-5, 0.5
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
EPOCHS, MINIBATCHES = 4, 4
LONG = 10**8  # steps of the run that both are the beginning of


@dataclasses.dataclass(frozen=True)
class Arguments:
    envs: int = 4
    """environments side by side"""
    length: int = 128
    """steps of each in an iteration"""
    seeds: int = 1
    """trained at once"""
    steps: int = 50_000
    """of all environments of a seed, about so many a measurement"""
    rounds: int = 7
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("envs", "length", "seeds", "steps", "rounds"), 1)

    @property
    def iterations(self) -> int:
        return max(self.steps // (self.envs * self.length), 1)


def ours(arguments: Arguments) -> Measure:
    envs, length = arguments.envs, arguments.length
    config = PPOConfig(
        learning_rate=RATE,
        gamma=GAMMA,
        gae_lambda=LAMBDA,
        clip=CLIP,
        entropy=ENTROPY,
        value=VALUE,
        epochs=EPOCHS,
        minibatches=MINIBATCHES,
        max_norm=MAX_NORM,
    )
    environment = make("CartPole-v1")
    agent = make_agent(environment, config, envs, length, iterations(LONG, envs, length))
    experiment = make_experiment(environment, agent, config.hypers, envs, length)
    programs = Programs(experiment, [Member(seed, {}) for seed in range(arguments.seeds)])
    carry, taken = Carry(programs.init(), programs.sums(None)), 0

    def measure() -> float:
        nonlocal carry, taken
        start = time.perf_counter()
        carry = jax.block_until_ready(programs.steps(carry, arguments.iterations, taken))
        taken += arguments.iterations
        return time.perf_counter() - start

    return measure


# --- the peer -----------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    actions: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(width: int, scale: float) -> nn.Dense:
            return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale), bias_init=nn.initializers.zeros)

        root = float(np.sqrt(2))
        hidden = nn.tanh(layer(64, root)(x))
        hidden = nn.tanh(layer(64, root)(hidden))
        logits = layer(self.actions, 0.01)(hidden)
        hidden = nn.tanh(layer(64, root)(x))
        hidden = nn.tanh(layer(64, root)(hidden))
        return logits, layer(1, 1.0)(hidden)[..., 0]


class Transition(NamedTuple):
    done: jax.Array
    action: jax.Array
    value: jax.Array
    reward: jax.Array
    log_prob: jax.Array
    observation: jax.Array
    info: Any


def log_prob(logits: jax.Array, action: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def peer(arguments: Arguments) -> Measure:
    envs, length = arguments.envs, arguments.length
    made, params = gymnax.make("CartPole-v1")
    environment = LogWrapper(FlattenObservationWrapper(made))
    network = ActorCritic(made.num_actions)
    apply: Any = network.apply
    total = iterations(LONG, envs, length)

    def rate(count: Any) -> jax.Array:
        return RATE * (1.0 - (count // (EPOCHS * MINIBATCHES)) / total)

    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(rate, eps=EPS))

    def begin(key: jax.Array) -> tuple:
        key, network_key, reset_key = jax.random.split(key, 3)
        weights = network.init(network_key, jnp.zeros(4))
        train_state = TrainState.create(apply_fn=network.apply, params=weights, tx=optimizer)
        observation, state = jax.vmap(environment.reset, (0, None))(jax.random.split(reset_key, envs), params)
        return train_state, state, observation, key

    def env_step(carry: tuple, _: Any) -> tuple[tuple, Transition]:
        train_state, state, last, key = carry
        key, action_key = jax.random.split(key)
        logits, value = apply(train_state.params, last)
        action = jax.random.categorical(action_key, logits)
        key, step_key = jax.random.split(key)
        observation, state, reward, terminated, truncated, info = jax.vmap(environment.step, (0, 0, 0, None))(
            jax.random.split(step_key, envs), state, action, params
        )
        info = {name: info[name] for name in info if name.startswith("returned_episode")}
        done = terminated | truncated
        transition = Transition(
            done, action, value, jnp.asarray(reward, jnp.float32), log_prob(logits, action), last, info
        )
        return (train_state, state, observation, key), transition

    def loss(weights: Any, few: Transition, advantage: jax.Array, target: jax.Array) -> jax.Array:
        logits, value = apply(weights, few.observation)
        near = few.value + jnp.clip(value - few.value, -CLIP, CLIP)
        value_loss = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target)).mean()
        ratio_ = jnp.exp(log_prob(logits, few.action) - few.log_prob)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = jnp.minimum(ratio_ * advantage, jnp.clip(ratio_, 1.0 - CLIP, 1.0 + CLIP) * advantage)
        logs = jax.nn.log_softmax(logits)
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1).mean()
        return -gain.mean() + VALUE * value_loss - ENTROPY * entropy

    def iteration(carry: tuple, _: Any) -> tuple[tuple, Any]:
        carry, seen = jax.lax.scan(env_step, carry, None, length)
        train_state, state, last, key = carry
        _, last_value = apply(train_state.params, last)

        def backward(after: tuple, step: Transition) -> tuple[tuple, jax.Array]:
            advantage, next_value = after
            error = step.reward + GAMMA * next_value * (1 - step.done) - step.value
            advantage = error + GAMMA * LAMBDA * (1 - step.done) * advantage
            return (advantage, step.value), advantage

        _, advantages = jax.lax.scan(backward, (jnp.zeros_like(last_value), last_value), seen, reverse=True, unroll=16)
        targets = advantages + seen.value

        def epoch(state: tuple, _: Any) -> tuple[tuple, jax.Array]:
            train_state, key = state
            key, order_key = jax.random.split(key)
            order = jax.random.permutation(order_key, envs * length)
            batch = jax.tree.map(lambda x: x.reshape(envs * length, *x.shape[2:]), (seen, advantages, targets))
            batch = jax.tree.map(lambda x: jnp.take(x, order, axis=0), batch)
            batches = jax.tree.map(lambda x: x.reshape(MINIBATCHES, -1, *x.shape[1:]), batch)

            def minibatch(train_state: TrainState, few: tuple) -> tuple[TrainState, jax.Array]:
                value, grads = jax.value_and_grad(loss)(train_state.params, *few)
                return train_state.apply_gradients(grads=grads), value

            train_state, losses = jax.lax.scan(minibatch, train_state, batches)
            return (train_state, key), losses

        (train_state, key), _ = jax.lax.scan(epoch, (train_state, key), None, EPOCHS)
        return (train_state, state, last, key), seen.info

    def train(carry: tuple) -> tuple[tuple, Any]:
        return jax.lax.scan(iteration, carry, None, arguments.iterations)

    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    if arguments.seeds == 1:
        carry, run = jax.jit(begin)(keys[0]), jax.jit(train)
    else:
        carry, run = jax.jit(jax.vmap(begin))(keys), jax.jit(jax.vmap(train))

    def measure() -> float:
        nonlocal carry
        start = time.perf_counter()
        carry, _ = jax.block_until_ready(run(carry))
        return time.perf_counter() - start

    return measure


def main() -> None:
    with exits("ppo_step"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.ppo_step", __doc__ or "", sys.argv[1:])
        backend.prepare()
        seconds = alternating({"jaxarch": ours(arguments), "peer": peer(arguments)}, arguments.rounds)
        about = {"pass": "ppo", "envs": arguments.envs, "length": arguments.length, "seeds": arguments.seeds}
        taken = arguments.iterations * arguments.envs * arguments.length * arguments.seeds
        report_steps(arguments.output, "ppo_step", about, seconds, taken)


if __name__ == "__main__":
    main()
