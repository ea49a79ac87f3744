"""Collecting is a plain loop over steps; what it says of episodes; what it says where an environment is broken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.rl.agent import Agent
from jaxarch.rl.collecting import begin, collect
from tests.rl import probes

ENVS, LENGTH = 3, 11
KEY = jax.random.key(3)


def drawing(key, envs):
    return jax.random.randint(key, (envs,), 0, 2)


# Acts at random, remembers the number of steps of the episode, and says twice its action.
AGENT = Agent(
    init=lambda key, hypers: (),
    act=lambda learner, observation, noise, memory, first, index: (
        noise,
        jnp.where(first, 0, memory) + 1,
        2 * noise,
    ),
    learn=lambda learner, rollout, key, index: (learner, {}),
    policy=lambda learner, observation, key, memory, first, greedy: (jnp.zeros(len(first), jnp.int32), memory),
    memory=lambda envs: jnp.zeros(envs, jnp.int32),
    noise=drawing,
)
# The observation counts; action 1 dies; a limit of four steps; the reward is 1, 2, 3, 4.
RISKY = probes.probe(
    "risky", lambda key: jnp.zeros(1), lambda o, a, t: (o[0] + 1, (a == 1) & (t > 0), o + 1), high=9.0, limit=4
)


def by_hand(actions):
    """The rollouts of these actions, `[time, envs]`, in numpy, and the returns and lengths of what ended."""
    seen = {name: np.zeros(actions.shape) for name in ("observation", "first", "reward", "died", "cut", "following")}
    returns, lengths = [], []
    for env in range(actions.shape[1]):
        place, total, t = 0, 0.0, 0
        for step, action in enumerate(actions[:, env]):
            seen["observation"][step, env], seen["first"][step, env] = place, t == 0
            place, t, total = place + 1, t + 1, total + place + 1
            died = action == 1 and t > 1
            cut = not died and t == 4
            row = {"reward": place, "died": died, "cut": cut, "following": place}
            for name, value in row.items():
                seen[name][step, env] = value
            if died or cut:
                returns.append(total)
                lengths.append(t)
                place, total, t = 0, 0.0, 0
    return seen, returns, lengths


def test_collecting_is_a_loop():
    world = begin(RISKY, AGENT, ENVS, KEY)
    world, rollout, said = jax.jit(lambda: collect(RISKY, AGENT, (), world, KEY, jnp.asarray(0), LENGTH))()
    seen, returns, lengths = by_hand(np.asarray(rollout.action))
    assert seen["died"].any() and seen["cut"].any()
    np.testing.assert_array_equal(rollout.observation[..., 0], seen["observation"])
    np.testing.assert_array_equal(rollout.next_observation[..., 0], seen["following"])
    for name, wanted in (("first", "first"), ("reward", "reward"), ("terminated", "died"), ("truncated", "cut")):
        np.testing.assert_array_equal(getattr(rollout, name), seen[wanted])
    np.testing.assert_array_equal(rollout.extras, 2 * rollout.action)
    np.testing.assert_array_equal(rollout.memory, 0)  # before the first step
    assert (said["train/return"].total, said["train/return"].weight) == (sum(returns), len(returns))
    assert said["train/episode_length"].total == sum(lengths)
    # What is under way goes on in the next rollout.
    ends = [np.flatnonzero((seen["died"] + seen["cut"])[:, env]) for env in range(ENVS)]
    under_way = LENGTH - 1 - np.array([at[-1] for at in ends])
    np.testing.assert_array_equal(world.lengths, under_way)
    np.testing.assert_array_equal(world.returns, under_way * (under_way + 1) / 2)
    # The policy forgets when it acts next: until then it remembers the episode that the last step ended.
    ended = [np.diff(at, prepend=-1)[-1] for at in ends]
    np.testing.assert_array_equal(world.memory, np.where(under_way == 0, ended, under_way))


def test_two_rollouts_are_one():
    """The second begins where the first ended, its actions from its own key."""
    world = begin(RISKY, AGENT, ENVS, KEY)
    middle, one, _ = collect(RISKY, AGENT, (), world, jax.random.key(1), jnp.asarray(0), 5)
    _, two, _ = collect(RISKY, AGENT, (), middle, jax.random.key(2), jnp.asarray(1), 6)
    seen, *_ = by_hand(np.concatenate([one.action, two.action]))
    np.testing.assert_array_equal(np.concatenate([one.observation, two.observation])[..., 0], seen["observation"])
    np.testing.assert_array_equal(np.concatenate([one.first, two.first]), seen["first"])


def test_a_broken_environment_is_named():
    def said(judge):
        broken = probes.probe("broken", lambda key: jnp.zeros(1), judge)
        return collect(broken, AGENT, (), begin(broken, AGENT, ENVS, KEY), KEY, jnp.asarray(0), 4)[2]

    sound = said(lambda o, a, t: (1.0, False, o))
    assert sound["env/sound[broken]"] == 1 and sound["env/outside[broken]"] == 0
    assert jnp.isnan(said(lambda o, a, t: (jnp.where(t == 2, jnp.nan, 0.0), False, o))["env/sound[broken]"])
    assert jnp.isnan(said(lambda o, a, t: (0.0, False, o + jnp.where(t == 2, jnp.inf, 0)))["env/sound[broken]"])
    # The space is [-1, 1]; one observation of four is 2.
    assert said(lambda o, a, t: (0.0, False, o * 0 + 2.0 * (t == 2)))["env/outside[broken]"] == 0.25
