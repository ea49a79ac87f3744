"""How many steps of CartPole does deep Q-learning take a second, beside the structure in which it is usually published?

    python -m benchmarks.dqn_step --output results
    python -m benchmarks.dqn_step --width 128
    python -m benchmarks.dqn_step --seeds 8

Ten environments, a ring of 10,000 steps, an update of 128 transitions every ten steps, a copy to the target network
every 500. The peer is written after PureJaxRL's published structure: keys split at each step, gymnax's own step and
`LogWrapper`; a ring of items, of which a transition is one and the next; a conditional around what is learned, and one
around the copy; a flax network differentiated as it stands; `optax.adam`. It takes time limits for deaths. Ours is what
`python -m experiments.dqn` runs, its metrics with it. Both train on, the same number of iterations in a dispatch, by
turns; compiling is not counted.

Both have two hidden layers of `--width`, where the products alone take more than half of the time. With `--published`
the peer has PureJaxRL's own, of 120 and 84.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from gymnax.wrappers.purerl import FlattenObservationWrapper, LogWrapper

from benchmarks.measuring import Measure, alternating, report_steps
from jaxarch.rl.algorithms.dqn import DQNConfig, make_agent
from jaxarch.rl.environments import make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.training import make_experiment
from jaxarch.run import backend, check_least
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.program import Carry, Member, Programs

ENVS, RING, BATCH, TARGET_EVERY, STARTS = 10, 10_000, 128, 500, 10_000
RATE, GAMMA, EPSILON, EPSILON_STEPS = 2.5e-4, 0.99, 0.05, 250_000
RUN = 10**8  # steps of the run whose schedules are followed


@dataclasses.dataclass(frozen=True)
class Arguments:
    width: int = 64
    """units of each of two hidden layers"""
    published: bool = False
    """the peer's layers are of 120 and 84 units"""
    seeds: int = 1
    """trained at once"""
    steps: int = 50_000
    """of all environments of a seed, about so many a measurement"""
    rounds: int = 7
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("width", "seeds", "steps", "rounds"), 1)

    @property
    def iterations(self) -> int:
        return max(self.steps // ENVS, 1)


def ours(arguments: Arguments) -> Measure:
    model = NetworkConfig(width=arguments.width, activation="relu")
    config = DQNConfig(
        learning_rate=RATE,
        anneal=True,
        gamma=GAMMA,
        epsilon=EPSILON,
        epsilon_steps=EPSILON_STEPS,
        replay=RING,
        starts=STARTS,
        batch_size=BATCH,
        target_every=TARGET_EVERY,
        model=model,
    )
    environment = make("CartPole-v1")
    agent = make_agent(environment, config, ENVS, 1, RUN // ENVS)
    experiment = make_experiment(environment, agent, config.hypers, ENVS, 1)
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


class QNetwork(nn.Module):
    actions: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.actions)(x)


class State(TrainState):
    target: Any = None
    timesteps: Any = 0


def peer(arguments: Arguments) -> Measure:
    made, params = gymnax.make("CartPole-v1")
    environment = LogWrapper(FlattenObservationWrapper(made))
    network = QNetwork(made.num_actions, (120, 84) if arguments.published else (arguments.width,) * 2)
    slots = RING // ENVS

    def apply(weights: Any, observation: jax.Array) -> jax.Array:
        return network.apply(weights, observation)  # type: ignore[return-value]

    def begin(key: jax.Array) -> tuple:
        key, network_key, reset_key = jax.random.split(key, 3)
        weights = network.init(network_key, jnp.zeros(4))
        optimizer = optax.adam(lambda count: RATE * (1.0 - count / (RUN // ENVS)))
        state = State.create(
            apply_fn=network.apply, params=weights, tx=optimizer, target=weights, timesteps=jnp.zeros((), jnp.int32)
        )
        observation, worlds = jax.vmap(environment.reset, (0, None))(jax.random.split(reset_key, ENVS), params)
        ring = {
            "observation": jnp.zeros((ENVS, slots, 4)),
            "action": jnp.zeros((ENVS, slots), jnp.int32),
            "reward": jnp.zeros((ENVS, slots)),
            "done": jnp.zeros((ENVS, slots), bool),
        }
        place = jnp.zeros((), jnp.int32), jnp.zeros((), bool)  # where to write next, and whether the ring is full
        return state, ring, place, worlds, observation, key

    def drawn(ring: dict, place: tuple, key: jax.Array) -> tuple[dict, dict]:
        at, full = place
        env_key, slot_key = jax.random.split(key)
        envs = jax.random.randint(env_key, (BATCH,), 0, ENVS)
        oldest = jnp.where(full, at, 0)
        here = (oldest + jax.random.randint(slot_key, (BATCH,), 0, jnp.where(full, slots - 1, at - 1))) % slots
        return tuple({name: kept[envs, s] for name, kept in ring.items()} for s in (here, (here + 1) % slots))  # type: ignore[return-value]

    def learned(state: State, ring: dict, place: tuple, key: jax.Array) -> tuple[State, jax.Array]:
        first, second = drawn(ring, place, key)
        following = apply(state.target, second["observation"]).max(axis=-1)
        target = first["reward"] + (1 - first["done"]) * GAMMA * following

        def loss(weights: Any) -> jax.Array:
            values = apply(weights, first["observation"])
            own = jnp.take_along_axis(values, first["action"][:, None], axis=-1)[:, 0]
            return jnp.mean(jnp.square(own - target))

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def iteration(carry: tuple, _: None) -> tuple[tuple, dict]:
        state, ring, (at, full), worlds, last, key = carry
        key, action_key, step_key = jax.random.split(key, 3)
        epsilon = jnp.clip((EPSILON - 1) / EPSILON_STEPS * state.timesteps + 1, EPSILON)
        greedy = apply(state.params, last).argmax(axis=-1)
        random_key, choice_key = jax.random.split(action_key)
        other = jax.random.randint(random_key, greedy.shape, 0, made.num_actions)
        action = jnp.where(jax.random.uniform(choice_key, greedy.shape) < epsilon, other, greedy)
        observation, worlds, reward, terminated, truncated, info = jax.vmap(environment.step, (0, 0, 0, None))(
            jax.random.split(step_key, ENVS), worlds, action, params
        )
        item = {"observation": last, "action": action, "reward": jnp.asarray(reward, jnp.float32)}
        item["done"] = terminated | truncated
        ring = {name: kept.at[:, at].set(item[name]) for name, kept in ring.items()}
        at, full = (at + 1) % slots, full | (at + 1 == slots)
        state = state.replace(timesteps=state.timesteps + ENVS)

        key, learn_key = jax.random.split(key)
        state, value = jax.lax.cond(
            state.timesteps > STARTS,
            lambda state: learned(state, ring, (at, full), learn_key),
            lambda state: (state, jnp.zeros(())),
            state,
        )
        state = jax.lax.cond(
            state.timesteps % TARGET_EVERY == 0,
            lambda state: state.replace(target=optax.incremental_update(state.params, state.target, 1.0)),
            lambda state: state,
            state,
        )
        metrics = {"loss": value, "returns": info["returned_episode_returns"].mean()}
        return (state, ring, (at, full), worlds, observation, key), metrics

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
    with exits("dqn_step"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.dqn_step", __doc__ or "", sys.argv[1:])
        backend.prepare()
        seconds = alternating({"jaxarch": ours(arguments), "peer": peer(arguments)}, arguments.rounds)
        about = {"pass": "dqn", "width": arguments.width, "published": arguments.published, "seeds": arguments.seeds}
        taken = arguments.iterations * ENVS * arguments.seeds
        report_steps(arguments.output, "dqn_step", about, seconds, taken)


if __name__ == "__main__":
    main()
