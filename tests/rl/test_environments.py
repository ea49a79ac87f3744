"""Environments: ends by death and by a limit, in both ways of stepping; what is made of them; names and options."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.registration import registered_envs

from jaxarch.rl.environments import (
    UNAVAILABLE,
    Environment,
    action_size,
    adapted,
    make,
    options_of,
    outside,
    rescaled,
    stacked,
)
from jaxarch.run import ConfigError
from tests.rl import probes

KEY = jax.random.key(0)
SEVERAL = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Breakout-MinAtar"]


class Corridor:
    """gymnax's two functions and no more: one step a time to the right, death at 3, a limit of so many steps."""

    def reset(self, key, params):
        return jnp.zeros(1), 0

    def step(self, key, state, action, params):
        state = state + action
        t = state // 10 + 1  # tens count steps
        place = state % 10
        terminated, truncated = place == 3, t >= params.limit
        final = jnp.float32([place])
        ended = terminated | truncated
        info = {"final_observation": final}
        following = jnp.where(ended, 0, place + 10 * t)
        return jnp.where(ended, jnp.zeros(1), final), following, 1.0 * place, terminated, truncated, info

    def observation_space(self, params):
        return spaces.Box(0.0, 3.0, (1,), jnp.float32)

    def action_space(self, params):
        return spaces.Discrete(2)


def corridor(limit):
    return adapted(Corridor(), SimpleNamespace(limit=limit), "corridor")


def walked(environment: Environment, actions):
    """The answers to these actions, one step after another."""
    start = environment.reset(jax.random.key(7))
    state, made = environment.reset(KEY)[1], []
    for number, action in enumerate(actions):
        made.append(environment.step(jax.random.key(number), state, action, start))
        state = made[-1].state
    return made, start


def test_a_limit_is_not_a_death():
    """Without gymnax's parts: three steps to the right end it, whether or not there is a limit as well."""
    (*before, last), _ = walked(corridor(10), [1, 0, 1, 1])
    assert not any(step.terminated or step.truncated for step in before)
    assert last.terminated and not last.truncated
    made, _ = walked(corridor(2), [1, 0])
    assert made[1].truncated and not made[1].terminated
    made, _ = walked(corridor(3), [1, 1, 1])  # both at once is a death
    assert made[2].terminated and not made[2].truncated
    assert made[2].next_observation == 3 and made[2].observation == 0
    assert [float(step.reward) for step in made] == [1, 2, 3]


def test_gymnax_in_parts_is_gymnax_but_for_where_starts_come_from():
    """CartPole to its end by death and to its limit, beside gymnax's own step of the same states."""
    for limit, ends in ((500, "terminated"), (6, "truncated")):
        environment = make("CartPole-v1", {"max_steps_in_episode": limit})
        source, params = environment.source
        start = environment.reset(jax.random.key(7))
        state, ended = environment.reset(KEY)[1], False
        for t in range(20):
            own = environment.step(KEY, state, jnp.asarray(1), start)
            found, _, reward, terminated, truncated, info = source.step(KEY, state, 1, params)
            np.testing.assert_allclose(own.next_observation, info["final_observation"])
            assert (own.reward, own.terminated, own.truncated) == (reward, terminated, truncated & ~terminated)
            if terminated or truncated:
                ended = True
                assert getattr(own, ends) and t == (5 if limit == 6 else t)
                np.testing.assert_array_equal(own.observation, start[0])
                np.testing.assert_array_equal(own.state.time, 0)
                break
            np.testing.assert_allclose(own.observation, found)
            state = own.state
        assert ended


@pytest.mark.parametrize("name", SEVERAL)
def test_a_vmapped_environment_is_a_loop(name):
    environment = make(name)
    keys, envs = jax.random.split(jax.random.key(1), 3), 3
    first = jax.vmap(environment.reset)(keys)
    if isinstance(environment.action_space, spaces.Discrete):
        actions = jnp.arange(envs)
    else:
        actions = jnp.linspace(-1, 1, envs)[:, None]

    def twice(key, start, action):
        once = environment.step(key, start[1], action, start)
        return once, environment.step(key, once.state, action, start)

    together = jax.jit(jax.vmap(twice))(keys, first, actions)
    alone = jax.jit(twice)
    for i in range(envs):
        one = alone(keys[i], jax.tree.map(lambda leaf, i=i: leaf[i], first), actions[i])
        jax.tree.map(
            lambda whole, part, i=i: np.testing.assert_allclose(whole[i], part, rtol=1e-5, atol=1e-6), together, one
        )


@pytest.mark.parametrize("name", [name for name in registered_envs if name not in UNAVAILABLE])
def test_every_environment_keeps_its_types(name):
    """A loop can carry what a reset gives and what a step gives: they are of the same shapes and types."""
    environment = make(name)
    action = jnp.zeros(environment.action_space.shape, environment.action_space.dtype)

    def one(carry, key):
        made = environment.step(key, carry[1], action, environment.reset(key))
        return (made.observation, made.state), made.reward

    started = jax.tree.leaves(jax.eval_shape(environment.reset, KEY))
    assert not any(leaf.weak_type for leaf in started)
    _, rewards = jax.eval_shape(lambda: jax.lax.scan(one, environment.reset(KEY), jax.random.split(KEY, 3)))
    assert rewards.shape == (3,) and rewards.dtype == jnp.float32


def test_actions_are_rescaled_to_the_bounds_and_clipped():
    """The reward is what reaches the environment, whose actions are in [-2, 4]."""
    told = probes.probe("told", lambda key: jnp.zeros(1), lambda o, a, t: (a[0], False, o), actions=0)
    environment = rescaled(told._replace(action_space=spaces.Box(-2.0, 4.0, (1,), jnp.float32)))
    start = told.reset(KEY)
    for given, taken in ((-1.0, -2.0), (0.5, 2.5), (1.0, 4.0), (7.0, 4.0), (-7.0, -2.0)):
        assert environment.step(KEY, start[1], jnp.float32([given]), start).reward == taken
    assert (environment.action_space.low, environment.action_space.high) == (-1, 1)
    unbounded = told._replace(action_space=spaces.Box(-jnp.inf, jnp.inf, (1,), jnp.float32))
    with pytest.raises(ConfigError, match="no bounds"):
        rescaled(unbounded)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_rescaled_actions_are_one_row_of_numbers(shape):
    told = probes.probe("told", lambda key: jnp.zeros(1), lambda o, a, t: (a.sum(), False, o), actions=0)
    told = told._replace(action_space=spaces.Box(-2.0, 4.0, shape, jnp.float32))
    environment, start = rescaled(told), told.reset(KEY)
    size = action_size(environment, "who")
    assert environment.action_space.shape == (size,) == (max(np.prod(shape), 1),)
    assert environment.step(KEY, start[1], jnp.full(size, 0.5), start).reward == 2.5 * size


def test_frames_are_those_before_and_never_of_another_episode():
    """A count that dies at 3: its frames by hand."""
    count = probes.probe("count", lambda key: jnp.zeros(1), lambda o, a, t: (0.0, t == 2, o + 1), low=0.0, high=9.0)
    environment = stacked(count, 3)
    made, (first, _) = walked(environment, [0, 0, 0, 0])
    assert first.tolist() == [0, 0, 0]
    assert [step.observation.tolist() for step in made] == [[0, 0, 1], [0, 1, 2], [0, 0, 0], [0, 0, 1]]
    assert made[2].next_observation.tolist() == [1, 2, 3] and made[2].terminated
    assert environment.observation_space.shape == (3,)
    assert stacked(count, 1) is count


def test_single_numbers_are_not_joined():
    with pytest.raises(ConfigError, match="--frames 2: what FrozenLake-misc observes is a single number"):
        stacked(make("FrozenLake-misc"), 2)


def test_what_is_outside_a_space():
    box = spaces.Box(-1.0, 1.0, (3,), jnp.float32)
    assert outside(box, jnp.float32([-1.1, 0.5, 1.1])).tolist() == [True, False, True]
    assert outside(box, jnp.float32([jnp.nan, 0, 0])).tolist() == [True, False, False]
    assert outside(spaces.Discrete(3), jnp.array([-1, 2, 3])).tolist() == [True, False, True]


def test_settings_are_read_as_python_reads_them():
    read = options_of(["memory_length=20", "size=(3, 4)", "kind=deep", "slip=0.5"])
    assert read == {"memory_length": 20, "size": (3, 4), "kind": "deep", "slip": 0.5}
    for wrong in ("20", "=3", "a b=3"):
        with pytest.raises(ConfigError, match="name=value"):
            options_of([wrong])


def test_options_reach_the_constructor_and_the_parameters():
    assert make("CartPole-v1", {"max_steps_in_episode": 17}).episode_length == 17
    long, short = (make("MemoryChain-bsuite", {"memory_length": n}).source[1] for n in (40, 3))
    assert (long.memory_length, short.memory_length) == (40, 3)
    with pytest.raises(ConfigError, match="CartPole-v1 has no gravitas; its parameters are .*gravity"):
        make("CartPole-v1", {"gravitas": 1})
    with pytest.raises(ConfigError, match="--env CartPole: there are .*CartPole-v1"):
        make("CartPole")
    with pytest.raises(ConfigError, match="MODULE:FACTORY"):
        make("no_such_module:factory")


class Raising(Corridor):
    def __init__(self, where):
        self.where, self.default_params = where, SimpleNamespace(limit=5)

    def reset(self, key, params):
        if self.where == "reset":
            raise RuntimeError("no license")
        return ({"a": jnp.zeros(1)}, 0) if self.where == "observation" else super().reset(key, params)

    def step(self, key, state, action, params):
        made = super().step(key, state, action, params)
        if self.where == "old":
            return *made[:3], made[3] | made[4], made[5]
        return (*made[:5], {}) if self.where == "info" else made

    def observation_space(self, params):
        space = super().observation_space(params)
        return spaces.Box(jnp.zeros(7), jnp.ones(7), (7,)) if self.where == "space" else space

    def action_space(self, params):
        return spaces.Dict({}) if self.where == "action" else super().action_space(params)


def unmade():
    raise ValueError("sizes must be even")


@pytest.mark.parametrize(
    "factory, said",
    [
        (unmade, "ValueError: sizes must be even."),
        (lambda: None, "'NoneType' object has no attribute 'default_params'"),
        (lambda: Raising("reset"), "RuntimeError: no license"),
        (lambda: Raising("old"), r"expected 6, got 5\); it needs gymnax's reset and step"),
        (lambda: Raising("info"), "KeyError: 'final_observation'"),
        (lambda: Raising("observation"), "what it observes is not one array"),
        (lambda: Raising("action"), "neither spaces.Discrete nor spaces.Box"),
        (lambda: Raising("space"), r"it observes \(1,\), but its observation_space is \(7,\)"),
    ],
)
def test_what_is_wrong_with_ones_own_is_said_in_a_line(factory, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(factory=factory, sound=lambda: Raising("")))
    assert make("own:sound").name == "own:sound"
    with pytest.raises(ConfigError, match=f"^--env own:factory: .*{said}"):
        make("own:factory")


class Limits(NamedTuple):
    limit: int = 5


@pytest.mark.parametrize("params", [Limits(), SimpleNamespace(limit=5), None], ids=lambda params: type(params).__name__)
def test_parameters_of_ones_own_may_be_of_any_kind(params, monkeypatch):
    own = Raising("")
    own.default_params = params
    own.step = lambda key, state, action, params: Corridor.step(own, key, state, action, params or Limits())
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(factory=lambda: own))
    assert make("own:factory").name == "own:factory"
    if params is None:
        with pytest.raises(ConfigError, match="own:factory has no limit; its parameters are none"):
            make("own:factory", {"limit": 7})
    else:
        assert make("own:factory", {"limit": 7}).source[1].limit == 7


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("CartPole-v1", {"max_steps_in_episode": "many"}, "max_steps_in_episode=many: it is a number, 500 by default"),
        ("CartPole-v1", {"max_steps_in_episode": 0}, "max_steps_in_episode=0 is not a whole number in"),
        ("CartPole-v1", {"max_steps_in_episode": 2.5}, "max_steps_in_episode=2.5 is not a whole number in"),
        ("CartPole-v1", {"max_steps_in_episode": float("inf")}, "max_steps_in_episode=inf is not a whole number in"),
        ("FrozenLake-misc", {"map_name": "9x9"}, "FrozenLake-misc: ValueError: map_name must be"),
    ],
)
def test_options_that_cannot_be(name, options, said):
    with pytest.raises(ConfigError, match=f"^--env-options.*{said}"):
        make(name, options)
