"""What was lived through, kept on the device and drawn from again: uniformly, by priority, or as sequences.

Steps lie in a ring, `[slots, envs, ...]`. An iteration writes `length` slots, so where the ring begins follows from
the number of the iteration and is the same for all replicas. Every observation is kept once: the next one is that of
the following slot. Only where an episode was truncated is there another, the true final one, and these lie behind the
ring. Where it terminated nothing is made of the next observation: its discount is 0. Observations are kept in the
narrowest type that holds them, of zeros and ones in bits: a million steps of MinAtar take 60 to 140 MB.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.rl.agent import Rollout
from jaxarch.rl.environments import Environment, observation_dtype
from jaxarch.run import ConfigError, Index

# What became of an episode at a step; where it was truncated, which of its environment's final observations is its own.
GOES_ON, TERMINATED = -1, -2
FANOUT = 32  # children of a node of the sum tree: wide, since a level costs more than its width


class Transitions(NamedTuple):
    """Steps, `[count, ...]`, each of `horizon` steps of its episode joined, fewer where it ended.

    reward: discounted and summed.
    discount: of the value of what follows: `gamma ** steps`, 0 where the episode terminated.
    next_observation: where `discount` is 0, any.
    """

    observation: Any
    action: Any
    reward: Float[Array, " count"]
    discount: Float[Array, " count"]
    next_observation: Any


class Priorities(NamedTuple):
    """A sum tree.

    levels: `[rows, FANOUT]`, leaves first; each number above is the sum of a row below. The last has one row.
    largest: the greatest priority that any step was given.
    """

    levels: tuple[Float[Array, "rows width"], ...]
    largest: Float[Array, ""]


@flax.struct.dataclass
class Replay:
    """The ring. Every field but `observations` and `finals` is `[slots, envs, ...]`.

    observations: of all slots, then final ones, then what followed the newest slot: `[slots + finals + 1, envs, ...]`.
    ending: GOES_ON, TERMINATED, or the number of the final observation.
    finals: how many there have been in each environment, `[envs]`.
    priorities: None where steps are drawn uniformly.
    length: slots that an iteration writes.
    horizon: steps joined in one transition.
    shape, dtype: of an observation.
    """

    observations: Any
    first: Any
    action: Any
    reward: Any
    ending: Any
    extras: Any
    finals: Any
    priorities: Any
    length: int = flax.struct.field(pytree_node=False)
    horizon: int = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)


def init(
    environment: Environment,
    capacity: int,
    envs: int,
    length: int,
    horizon: int = 1,
    prioritized: bool = False,
    extras: PyTree = (),
) -> Replay:
    """An empty ring of at least `capacity` steps.

    length: steps of each environment that `add` brings.
    horizon: steps joined in one transition (n-step returns).
    extras: what a step of one environment has besides, as examples.
    Raises ConfigError for more steps than can be numbered.
    """
    observation, _ = jax.eval_shape(environment.reset, jax.random.key(0))
    action = jax.eval_shape(environment.action_space.sample, jax.random.key(0))
    slots = max(-(-capacity // (envs * length)), -(-(horizon - 1) // length) + 1) * length
    if slots * envs > np.iinfo(np.int32).max:
        raise ConfigError(f"a replay of {slots * envs} steps is more than can be numbered, {np.iinfo(np.int32).max}.")
    # A truncated episode is as long as the limit says. Where nothing says it, each step may be the last.
    finals = -(-slots // (environment.episode_length or 1))
    kept = observation_dtype(environment)
    shape, dtype = observation.shape, kept
    if kept == jnp.dtype(bool):
        shape, dtype = (-(-int(np.prod(shape)) // 8),), jnp.uint8

    def nothing(example: Any) -> Array:
        return jnp.zeros((slots, envs, *example.shape), example.dtype)

    return Replay(
        jnp.zeros((slots + finals + 1, envs, *shape), dtype),
        jnp.zeros((slots, envs), bool),
        jax.tree.map(nothing, action),
        jnp.zeros((slots, envs)),
        jnp.full((slots, envs), GOES_ON, jnp.int32),
        jax.tree.map(nothing, extras),
        jnp.zeros(envs, jnp.int32),
        _no_priorities(slots * envs) if prioritized else None,
        length,
        horizon,
        observation.shape,
        observation.dtype,
    )


def add(replay: Replay, rollout: Rollout, index: Index) -> Replay:
    """With the steps of iteration `index` in place of the oldest. A new step has the greatest priority so far."""
    slots, envs = replay.ending.shape
    start = _start(replay, index)

    def write(ring: Array, values: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(ring, values.astype(ring.dtype), start, axis=0)

    number = replay.finals + jnp.cumsum(rollout.truncated, axis=0, dtype=jnp.int32) - 1
    ending = jnp.where(rollout.truncated, number, jnp.where(rollout.terminated, TERMINATED, GOES_ON))
    # The row of what each step led to, where it is a row of its own; elsewhere one that there is not.
    limit = len(replay.observations)
    rows = jnp.where(rollout.truncated, slots + number % (limit - slots - 1), limit)
    led_to = _packed(replay, rollout.next_observation)
    observations = write(replay.observations, _packed(replay, rollout.observation))
    observations = observations.at[rows, jnp.arange(envs)].set(led_to, mode="drop")
    replay = replace(
        replay,
        observations=observations.at[-1].set(led_to[-1]),
        first=write(replay.first, rollout.first),
        action=jax.tree.map(write, replay.action, rollout.action),
        reward=write(replay.reward, rollout.reward),
        ending=write(replay.ending, ending),
        extras=jax.tree.map(write, replay.extras, rollout.extras) if jax.tree.leaves(replay.extras) else (),
        finals=number[-1] + 1,
    )
    if replay.priorities is None:
        return replay
    # The last slots, whose transitions are not whole yet, cannot be drawn until they are.
    since = start + jnp.arange(-(replay.horizon - 1), replay.length)
    whole = jnp.arange(len(since)) < replay.length
    written = (since >= 0) | (index >= slots // replay.length)
    priority = jnp.where(whole & written, replay.priorities.largest, 0)
    leaves = (since % slots)[:, None] * envs + jnp.arange(envs)
    values = jnp.broadcast_to(priority[:, None], leaves.shape)
    return replace(replay, priorities=_with(replay.priorities, leaves.reshape(-1), values.reshape(-1)))


def sample(
    replay: Replay, key: Key[Array, ""], count: int, index: Index, gamma: float | Float[Array, ""]
) -> Transitions:
    """`count` transitions, each of those whole as probable as another, after `add` of iteration `index`."""
    slots, envs = _uniform(replay, key, count, index, replay.horizon)
    return _transitions(replay, slots, envs, index, gamma)


def sample_prioritized(
    replay: Replay,
    key: Key[Array, ""],
    count: int,
    index: Index,
    gamma: float | Float[Array, ""],
    beta: float | Float[Array, ""],
) -> tuple[Transitions, Float[Array, " count"], Int[Array, " count"]]:
    """`count` transitions, one from each of as many equal parts of the total priority (Schaul et al. 2016, app. B.2.1).

    Returns them, their importance weights `(N * P) ** -beta` over the greatest of them (sec. 3.4), and which they are,
    for `with_priorities`.
    """
    assert replay.priorities is not None
    _, envs = replay.ending.shape
    total = replay.priorities.levels[-1].sum()
    drawn = (jnp.arange(count) + jax.random.uniform(key, (count,))) / count * total
    leaves, priority = _at(replay.priorities, drawn)
    weights = (priority / priority.min()) ** -beta  # N and the total priority are the same for all
    transitions = _transitions(replay, leaves // envs, leaves % envs, index, gamma)
    return transitions, weights, leaves


def with_priorities(replay: Replay, which: Int[Array, " count"], priorities: Float[Array, " count"]) -> Replay:
    """With these priorities, above 0, of what `sample_prioritized` gave. One drawn twice is given either's."""
    assert replay.priorities is not None
    return replace(replay, priorities=_with(replay.priorities, which, priorities))


def sequences(replay: Replay, key: Key[Array, ""], count: int, length: int, index: Index) -> Rollout:
    """`count` sequences of `length` steps, `[length, count, ...]`, of one environment each; episodes end within them.

    Each whole one is as probable as another. `memory` is ().
    """
    starts, envs = _uniform(replay, key, count, index, length)
    slots = (starts + jnp.arange(length)[:, None]) % len(replay.ending)
    ending = replay.ending[slots, envs]
    observation, next_observation = _observations(replay, slots, slots, envs, index)
    return Rollout(
        observation,
        replay.first[slots, envs],
        jax.tree.map(lambda kept: kept[slots, envs], replay.action),
        _sound(replay, ending, envs, replay.reward[slots, envs]),
        ending == TERMINATED,
        ending >= 0,
        next_observation,
        jax.tree.map(lambda kept: kept[slots, envs], replay.extras),
        (),
    )


# --- where things lie -----------------------------------------------------------------------------


def _start(replay: Replay, index: Index) -> Index:
    """The first slot that iteration `index` writes."""
    return index % (len(replay.ending) // replay.length) * replay.length


def _filled(replay: Replay, index: Index) -> Index:
    """How many slots have been written after iteration `index`."""
    return jnp.minimum(index + 1, len(replay.ending) // replay.length) * replay.length


def _uniform(
    replay: Replay, key: Key[Array, ""], count: int, index: Index, length: int
) -> tuple[Int[Array, " count"], Int[Array, " count"]]:
    """Slots and environments at which something of so many steps begins."""
    slots, envs = replay.ending.shape
    filled, newest = _filled(replay, index), _start(replay, index) + replay.length - 1
    # A remainder favours some by a part in 2 ** 32 / whole. jax.random.randint avoids it, at twice the time.
    whole = (jnp.maximum(filled - length + 1, 1) * envs).astype(jnp.uint32)
    ages, env = jnp.divmod(jax.random.bits(key, (count,)) % whole, jnp.uint32(envs))
    begin = newest - (length - 1) - ages.astype(jnp.int32)
    return jnp.where(begin < 0, begin + slots, begin), env.astype(jnp.int32)


def _transitions(
    replay: Replay,
    slots: Int[Array, " count"],
    envs: Int[Array, " count"],
    index: Index,
    gamma: float | Float[Array, ""],
) -> Transitions:
    reward, weight = jnp.zeros(slots.shape), jnp.ones(slots.shape)
    last, goes_on = slots, jnp.ones(slots.shape, bool)
    ending = jnp.full(slots.shape, GOES_ON)
    for ahead in range(replay.horizon):
        at = (slots + ahead) % len(replay.ending) if ahead else slots
        last = jnp.where(goes_on, at, last)
        ending = jnp.where(goes_on, replay.ending[at, envs], ending)
        reward += jnp.where(goes_on, weight * replay.reward[at, envs], 0)
        weight = jnp.where(goes_on, weight * gamma, weight)
        goes_on = ending == GOES_ON
    observation, next_observation = _observations(replay, slots, last, envs, index)
    return Transitions(
        observation,
        jax.tree.map(lambda kept: kept[slots, envs], replay.action),
        _sound(replay, ending, envs, reward),
        jnp.where(ending == TERMINATED, 0, weight),
        next_observation,
    )


def _observations(
    replay: Replay, slots: Int[Array, "*picked"], last: Int[Array, "*picked"], envs: Int[Array, " count"], index: Index
) -> tuple[Any, Any]:
    """What was observed at `slots`, and what the steps at `last` led to."""
    size, limit = len(replay.ending), len(replay.observations)
    ending = replay.ending[last, envs]
    newest = _start(replay, index) + replay.length - 1
    following = jnp.where(last == newest, limit - 1, jnp.where(last + 1 == size, 0, last + 1))
    following = jnp.where(ending >= 0, size + ending % (limit - size - 1), following)
    both = _unpacked(replay, replay.observations[jnp.stack([slots, following]), envs])
    return both[0], both[1]


def _sound(
    replay: Replay, ending: Int[Array, "*picked"], envs: Int[Array, " count"], reward: Float[Array, "*picked"]
) -> Float[Array, "*picked"]:
    """No number where the final observation is lost, since episodes were truncated before their limit: a run on wrong
    values ends, and does not go on unseen.
    """
    kept = len(replay.observations) - len(replay.ending) - 1
    return jnp.where((ending >= 0) & (ending < replay.finals[envs] - kept), jnp.nan, reward)


def _packed(replay: Replay, observation: Any) -> Array:
    """As they are kept, `[..., *shape]` -> `[..., *kept]`."""
    if not _in_bits(replay):
        return observation.astype(replay.observations.dtype)
    batch = observation.shape[: observation.ndim - len(replay.shape)]
    return jnp.packbits(observation.reshape(*batch, -1) != 0, axis=-1)


def _unpacked(replay: Replay, kept: Array) -> Any:
    if not _in_bits(replay):
        return kept.astype(replay.dtype)
    flat = jnp.unpackbits(kept, axis=-1, count=int(np.prod(replay.shape)))
    return flat.reshape(*kept.shape[:-1], *replay.shape).astype(replay.dtype)


def _in_bits(replay: Replay) -> bool:
    return replay.observations.shape[2:] != replay.shape


# --- the sum tree ---------------------------------------------------------------------------------


def _no_priorities(leaves: int) -> Priorities:
    levels: list[Array] = []
    while not levels or len(levels[-1]) > 1:
        leaves = -(-leaves // FANOUT)
        levels.append(jnp.zeros((leaves, FANOUT)))
    return Priorities(tuple(levels), jnp.ones(()))


def _with(priorities: Priorities, leaves: Int[Array, " count"], values: Float[Array, " count"]) -> Priorities:
    """Sums are made anew from below, so that no rounding stays."""
    largest = jnp.maximum(priorities.largest, values.max())
    levels = []
    at = leaves
    for level in priorities.levels:
        level = level.at[at // FANOUT, at % FANOUT].set(values)
        levels.append(level)
        at = at // FANOUT
        values = level[at].sum(axis=-1)
    return Priorities(tuple(levels), largest)


def _at(priorities: Priorities, sums: Float[Array, " count"]) -> tuple[Int[Array, " count"], Float[Array, " count"]]:
    """The leaves at which the running sum of priorities first exceeds these sums, and their priorities."""
    upto = np.triu(np.ones((FANOUT, FANOUT), np.float32))
    row = jnp.zeros(sums.shape, jnp.int32)
    priority = sums
    for level in reversed(priorities.levels):
        values = level[row]
        running = jnp.matmul(values, upto, precision=jax.lax.Precision.HIGHEST)
        # Never beyond the last that is above 0, whatever rounding says.
        passed = (running <= sums[:, None]) & (running < running[:, -1:])
        child = passed.sum(axis=-1)
        sums = sums - jnp.max(jnp.where(passed, running, 0), axis=-1)
        priority = jnp.take_along_axis(values, child[:, None], axis=-1)[:, 0]
        row = row * FANOUT + child
    return row, priority
