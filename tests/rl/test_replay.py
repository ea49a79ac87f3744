"""What is drawn from replay, against a list of all that was ever lived through."""

from __future__ import annotations

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from scipy import stats

from jaxarch.rl import environments, replay
from jaxarch.rl.agent import Rollout
from jaxarch.rl.environments import Environment
from jaxarch.run import ConfigError

GAMMA = 0.9

init = jax.jit(replay.init, static_argnums=(0, 1, 2, 3, 4, 5))
add = jax.jit(replay.add)
with_priorities = jax.jit(replay.with_priorities)


def sample(memory: replay.Replay, count: int, index: int) -> replay.Transitions:
    """On the host, where taking single numbers of it is quick."""
    drawn = jax.jit(replay.sample, static_argnums=2)(memory, jax.random.key(1), count, index, GAMMA)
    return jax.tree.map(np.asarray, drawn)


def numbered(limit: int | None, dtype=jnp.float32, shape: tuple[int, ...] = ()) -> Environment:
    """Only shapes and types of it are asked."""

    def reset(key):
        return jnp.zeros(shape, dtype), ()

    space = spaces.Box(0, 1, shape, dtype)
    return Environment("numbered", space, spaces.Discrete(7), reset, lambda *_: None, limit)


def test_more_than_can_be_numbered_is_refused():
    with pytest.raises(ConfigError, match="a replay of 10000000000 steps is more than can be numbered, 2147483647."):
        replay.init(numbered(None), 10**10, 5, 2)


def lived(iterations: int, length: int, envs: int, spacing: int = 1, seed: int = 0) -> Rollout:
    """`[iterations, length, envs]`. Observations number the steps; what the last step of an episode led to is the
    number plus a half. Episodes are truncated at least `spacing` steps apart.
    """
    rng = np.random.default_rng(seed)
    time = iterations * length
    observation = (np.arange(time)[:, None] + 10_000 * np.arange(envs)).astype(np.float32)
    terminated = rng.random((time, envs)) < 0.15
    truncated = np.zeros((time, envs), bool)
    for env in range(envs):
        age = 0
        for t in range(time):
            age += 1
            truncated[t, env] = age >= spacing and rng.random() < 0.3 and not terminated[t, env]
            age = 0 if truncated[t, env] or terminated[t, env] else age
    ended = terminated | truncated
    first = np.concatenate([np.ones((1, envs), bool), ended[:-1]])
    fields = {
        "observation": observation,
        "first": first,
        "action": rng.integers(0, 7, (time, envs)).astype(np.int32),
        "reward": rng.normal(size=(time, envs)).astype(np.float32),
        "terminated": terminated,
        "truncated": truncated,
        "next_observation": np.where(ended, observation + 0.5, observation + 1),
        "extras": (),
        "memory": (),
    }
    arranged = {
        name: value if isinstance(value, tuple) else jnp.asarray(value.reshape(iterations, length, envs))
        for name, value in fields.items()
    }
    return Rollout(**arranged)


def flat(rollout: Rollout) -> dict[str, np.ndarray]:
    """Fields as `[time, envs]`."""
    return {
        name: np.asarray(value).reshape(-1, value.shape[-1])
        for name, value in rollout._asdict().items()
        if not isinstance(value, tuple)
    }


def joined(steps: dict[str, np.ndarray], t: int, env: int, horizon: int) -> tuple:
    """Reward, discount and next observation of the transition that begins at t, by definition."""
    reward, discount = 0.0, 1.0
    for at in range(t, t + horizon):
        reward += discount * steps["reward"][at, env]
        discount *= GAMMA
        if steps["terminated"][at, env]:
            return reward, 0.0, None
        if steps["truncated"][at, env]:
            break
    return reward, discount, steps["next_observation"][at, env]


def filled(memory: replay.Replay, rollout: Rollout) -> replay.Replay:
    rollout = jax.tree.map(np.asarray, rollout)
    for index in range(len(rollout.reward)):
        memory = add(memory, jax.tree.map(lambda x: x[index], rollout), index)  # noqa: B023
    return memory


@pytest.mark.parametrize(
    ("iterations", "length", "horizon", "spacing"),
    [(2, 4, 1, 1), (5, 4, 1, 1), (13, 1, 1, 1), (9, 4, 3, 2), (14, 1, 4, 5)],
)
def test_transitions_are_those_that_were_lived_through(iterations, length, horizon, spacing):
    """Not yet full, and after the ring has gone round; one step and several, over ends of both kinds."""
    envs, capacity = 3, 24
    rollout = lived(iterations, length, envs, spacing)
    steps = flat(rollout)
    memory = filled(init(numbered(spacing), capacity, envs, length, horizon), rollout)
    drawn = sample(memory, 2000, iterations - 1)
    time = iterations * length
    kept = min(time, capacity // envs)
    seen = set()
    for i, number in enumerate(drawn.observation):
        env, t = divmod(int(number), 10_000)
        seen.add((t, env))
        reward, discount, next_observation = joined(steps, t, env, horizon)
        np.testing.assert_allclose([drawn.reward[i], drawn.discount[i]], [reward, discount], rtol=1e-5, atol=1e-6)
        assert drawn.action[i] == steps["action"][t, env]
        assert next_observation is None or drawn.next_observation[i] == next_observation
    # All that are still there and whole, and no other.
    assert seen == set(itertools.product(range(time - kept, time - horizon + 1), range(envs)))
    assert {"terminated", "truncated"} <= {name for name in steps if steps[name][time - kept :].any()}


def test_sequences_are_consecutive_with_their_ends_and_extras():
    envs, length, taken = 2, 4, 6
    rollout = lived(5, length, envs)
    rollout = rollout._replace(extras={"log_prob": -rollout.observation})
    memory = replay.init(numbered(None), 24, envs, length, extras={"log_prob": jnp.zeros(())})
    take = jax.jit(replay.sequences, static_argnums=(2, 3))
    drawn = jax.tree.map(np.asarray, take(filled(memory, rollout), jax.random.key(0), 300, taken, 4))
    steps = flat(rollout._replace(extras=()))
    starts = set()
    for i in range(300):
        env, t = divmod(int(drawn.observation[0, i]), 10_000)
        starts.add((t, env))
        for name in ("observation", "first", "action", "reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(drawn, name)[:, i], steps[name][t : t + taken, env])
        known = ~steps["terminated"][t : t + taken, env]
        np.testing.assert_array_equal(
            drawn.next_observation[known, i], steps["next_observation"][t : t + taken, env][known]
        )
    np.testing.assert_array_equal(drawn.extras["log_prob"], -drawn.observation)
    assert starts == set(itertools.product(range(20 - 12, 20 - taken + 1), range(envs)))


def test_each_transition_is_as_probable_as_another():
    memory = filled(init(numbered(None), 24, 3, 4, horizon=2), lived(5, 4, 3))
    drawn = sample(memory, 21_000, 4)
    counts = Counter(drawn.observation.tolist())
    assert len(counts) == 21
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_priorities_are_frequencies_and_weights_undo_them():
    """Chi-squared over 8,000 batches, and the weighted mean of anything equals the plain one."""
    envs, length, horizon, count = 3, 4, 2, 16
    memory = filled(init(numbered(None), 48, envs, length, horizon, prioritized=True), lived(7, length, envs))
    leaves = np.nonzero(np.asarray(memory.priorities.levels[0]).reshape(-1))[0]
    assert len(leaves) == 48 - envs  # the newest slot's transitions are not whole
    given = np.random.default_rng(0).gamma(1.0, size=len(leaves)).astype(np.float32)
    given[3] = 1e-6
    memory = with_priorities(memory, jnp.asarray(leaves), jnp.asarray(given))
    keys = jax.random.split(jax.random.key(0), 8000)
    drawn, weights, which = jax.tree.map(
        np.asarray,
        jax.jit(jax.vmap(lambda key: replay.sample_prioritized(memory, key, count, jnp.asarray(6), GAMMA, 0.6)))(keys),
    )
    probability = given.astype(float) / given.sum(dtype=float)
    counts = np.bincount(which.reshape(-1), minlength=leaves.max() + 1)[leaves]
    expected = probability * which.size
    often = expected > 5
    assert stats.chisquare(counts[often], expected[often] * counts[often].sum() / expected[often].sum()).pvalue > 0.01
    assert counts[~often].sum() <= 30
    # Which is which: the leaf's slot and environment are those of the observation.
    observed = np.asarray(memory.observations[: len(memory.ending)]).reshape(-1)
    np.testing.assert_array_equal(drawn.observation, observed[which])
    by_leaf = dict(zip(leaves.tolist(), (len(leaves) * probability) ** -0.6, strict=True))
    wanted = np.vectorize(by_leaf.get)(which)
    np.testing.assert_allclose(weights, wanted / wanted.max(axis=1, keepdims=True), rtol=1e-4)


def test_a_new_step_has_the_greatest_priority_so_far_and_replaces_the_old():
    envs, length = 2, 2
    memory = filled(init(numbered(None), 12, envs, length, prioritized=True), lived(3, length, envs))
    memory = with_priorities(memory, jnp.asarray([0, 5]), jnp.asarray([7.0, 0.5]))
    memory = add(memory, jax.tree.map(lambda x: x[3], lived(4, length, envs)), 3)
    priorities = np.asarray(memory.priorities.levels[0].reshape(-1)[:12])
    np.testing.assert_array_equal(priorities, [7, 7, 7, 7, 1, 0.5, 1, 1, 1, 1, 1, 1])
    assert memory.priorities.levels[-1].sum() == priorities.sum()


def test_the_sum_tree_finds_what_a_running_sum_finds():
    """A tree of three levels, against a cumulative sum in float64; whole numbers, so that nothing is rounded."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, 2000).astype(np.float32)
    tree = jax.jit(replay._with)(replay._no_priorities(2000), jnp.arange(2000), values)
    assert len(tree.levels) == 3
    total = int(values.sum())
    # The total itself, which rounding may give, is the last leaf that can be drawn.
    found, priority = jax.tree.map(
        np.asarray, jax.jit(replay._at)(tree, np.append(np.arange(total) + 0.5, total).astype(np.float32))
    )
    assert found[-1] == np.nonzero(values)[0][-1]
    found, priority = found[:-1], priority[:-1]
    np.testing.assert_array_equal(found, np.searchsorted(np.cumsum(values.astype(np.float64)), np.arange(total) + 0.5))
    np.testing.assert_array_equal(priority, values[found])


def test_truncations_before_their_limit_end_the_run_where_they_would_be_wrong():
    rollout = lived(6, 4, 2, spacing=1)
    memory = filled(init(numbered(8), 48, 2, 4), rollout)
    drawn = sample(memory, 500, 5)
    steps = flat(rollout)
    env, t = np.divmod(drawn.observation.astype(int), 10_000)
    wrong = np.isnan(drawn.reward)
    right = drawn.next_observation == steps["next_observation"][t, env]
    assert wrong.any() and (right | steps["terminated"][t, env])[~wrong].all()


def test_observations_are_kept_in_their_narrowest_type():
    """Bits come back as the floats that they were; levels up to 255 as they were."""
    bits = numbered(None, shape=(3, 5))._replace(
        observation_space=spaces.Box(0, 1, (3, 5), jnp.int32),
    )
    levels = bits._replace(observation_space=spaces.Box(0, 255, (3, 5), jnp.uint8))
    rng = np.random.default_rng(0)
    for environment, most, kept in ((bits, 2, 2), (levels, 256, 15)):
        seen = jnp.asarray(rng.integers(0, most, (4, 2, 3, 5)), jnp.float32)
        quiet = jnp.zeros((4, 2), bool)
        rollout = Rollout(seen, quiet, jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2)), quiet, quiet, seen + 0, (), ())
        memory = add(init(environment, 8, 2, 4), rollout, 0)
        assert memory.observations.dtype == jnp.uint8 and memory.observations[0, 0].size == kept
        drawn = sample(memory, 50, 0)
        assert drawn.observation.dtype == jnp.float32
        assert {np.asarray(x).tobytes() for x in drawn.observation} == {
            np.asarray(x).tobytes() for x in seen.reshape(-1, 3, 5)
        }


@pytest.mark.parametrize("name", ["Breakout-MinAtar", "Seaquest-MinAtar"])
def test_a_million_steps_of_minatar_take_less_than_500_megabytes(name):
    memory = jax.eval_shape(lambda: replay.init(environments.make(name), 1_000_000, 10, 1, prioritized=True))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    assert size < 200e6


@pytest.mark.parametrize("name", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_grids_of_minatar_are_zeros_and_ones(name):
    environment = environments.make(f"{name}-MinAtar")
    assert environments.observation_dtype(environment) == jnp.dtype(bool)

    def one(carry, key):
        made = environment.step(key, carry, jax.random.randint(key, (), 0, 3), environment.reset(key))
        return made.state, jnp.isin(made.next_observation, jnp.asarray([0.0, 1.0])).all()

    _, binary = jax.lax.scan(one, environment.reset(jax.random.key(0))[1], jax.random.split(jax.random.key(1), 400))
    assert binary.all()
    # -1 and 1 would be the same bit.
    assert environments.observation_dtype(environments.centered(environment)) == jnp.float32


def test_observations_are_centred_by_the_bounds_of_their_space():
    """Also those that follow an end, and the true final ones."""
    plain = environments.make("MountainCar-v0", {"max_steps_in_episode": 2})
    environment = environments.centered(plain)
    middle, half = np.array([-0.3, 0]), np.array([0.9, 0.07])
    (seen, state), (raw_seen, raw_state) = environment.reset(jax.random.key(0)), plain.reset(jax.random.key(0))
    for key in jax.random.split(jax.random.key(1), 3):
        np.testing.assert_allclose(seen, (raw_seen - middle) / half, atol=1e-5)
        made = environment.step(key, state, 2, environment.reset(key))
        raw = plain.step(key, raw_state, 2, plain.reset(key))
        np.testing.assert_allclose(made.next_observation, (raw.next_observation - middle) / half, atol=1e-5)
    (seen, state), (raw_seen, raw_state) = (made.observation, made.state), (raw.observation, raw.state)
    with pytest.raises(ConfigError, match="CartPole-v1 have no bounds"):
        environments.centered(environments.make("CartPole-v1"))
