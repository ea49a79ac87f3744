"""Environments as pure functions. The one place that knows gymnax: its six-tuple, its auto-reset, its weak types.

An episode ends in one of two ways, and they are never the same thing: it `terminated`, and no reward follows; or a
time limit `truncated` it, and what would have followed still counts. Both come with `next_observation`, which the
action led to, before any reset.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from gymnax.registration import registered_envs
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxarch.run import ConfigError

Observation = Any  # an array
Action = Any  # int32 of a discrete space, else floats
UNAVAILABLE = ("MNISTBandit-bsuite",)  # it downloads its data
LONGEST = 10_000  # steps of an evaluated episode where nothing limits it


class Step(NamedTuple):
    """What an environment answers.

    observation, state: those of the next step, of a new episode where one ended.
    terminated, truncated: never both.
    next_observation: what the action led to, before any reset.
    next_state: likewise, for drawing; None where the environment keeps it to itself.
    """

    observation: Observation
    state: PyTree
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
    next_observation: Observation
    next_state: PyTree = None


class Environment(NamedTuple):
    """One environment.

    reset: `key -> (observation, state)`, the start of an episode.
    step: `(key, state, action, start) -> Step`, where `start` is what `reset` gave: the episode that follows if this
        one ends. Starts are drawn outside, many at once.
    episode_length: steps after which an episode is truncated at the latest; None: there is no limit.
    source: the gymnax object and its parameters, for drawing.
    inner: `state -> ` the state that the source knows.
    """

    name: str
    observation_space: spaces.Space
    action_space: spaces.Space
    reset: Callable[[Key[Array, ""]], tuple[Observation, PyTree]]
    step: Callable[[Key[Array, ""], PyTree, Action, tuple[Observation, PyTree]], Step]
    episode_length: int | None = None
    source: tuple[Any, Any] | None = None
    inner: Callable[[PyTree], PyTree] = lambda state: state


def make(name: str, options: Mapping[str, Any] | None = None) -> Environment:
    """gymnax's environment of this name, or one's own, `module:factory`.

    options: of the environment's constructor (as `memory_length` of MemoryChain-bsuite) or of its parameters (as
        `max_steps_in_episode`).

    Raises ConfigError for a name or an option that there is not.
    """
    constructed, params = _constructed(name, dict(options or {}))
    if ":" not in name:
        return adapted(constructed, params, name)
    try:
        environment = adapted(constructed, params, name)
        start = jax.eval_shape(environment.reset, jax.random.key(0))
        action = jax.eval_shape(environment.action_space.sample, jax.random.key(0))
        jax.eval_shape(environment.step, jax.random.key(0), start[1], action, start)
        declared = getattr(environment.observation_space, "shape", start[0].shape)
        if tuple(declared) != start[0].shape:
            raise ConfigError(f"--env {name}: it observes {start[0].shape}, but its observation_space is {declared}.")
    except ConfigError:
        raise
    except Exception as error:  # one's own code may raise anything
        raise ConfigError(f"--env {name}: {said(error)}; it needs gymnax's reset and step.") from error
    return environment


def options_of(settings: Sequence[str]) -> dict[str, Any]:
    """What `name=value` settings of a command line say; a value that Python can read is what it means.

    Raises ConfigError for one that is no such setting.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env-options {setting}: write it as name=value.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _constructed(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    factory = _factory(name)
    try:
        plain = factory()
        fields = settings_of(plain.default_params)
    except Exception as error:  # one's own code may raise anything
        raise ConfigError(f"--env {name}: {said(error)}.") from error
    of_params = {key: value for key, value in options.items() if key in fields}
    for key, value in of_params.items():
        before = getattr(plain.default_params, key)
        if isinstance(before, int | float) and not isinstance(value, int | float):
            raise ConfigError(f"--env-options {key}={value}: it is a number, {before} by default.")
    of_constructor = {key: value for key, value in options.items() if key not in fields}
    if of_constructor:
        try:
            plain = factory(**of_constructor)
        except (ValueError, AssertionError, IndexError, KeyError) as error:
            raise ConfigError(f"--env-options: {name}: {said(error)}.") from error
        except TypeError:
            known = ", ".join(sorted(fields)) or "none"
            raise ConfigError(
                f"--env-options: {name} has no {', '.join(of_constructor)}; its parameters are {known}."
            ) from None
    return plain, type(plain.default_params)(**{**fields, **of_params}) if of_params else plain.default_params


def settings_of(params: Any) -> dict[str, Any]:
    """The parameters by name, of a dataclass or a NamedTuple; of others, as None, none."""
    return params._asdict() if hasattr(params, "_asdict") else dict(getattr(params, "__dict__", {}))


def said(error: BaseException) -> str:
    """What was raised, on a short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:200].rstrip(".:")


def _factory(name: str) -> Callable[..., Any]:
    if ":" in name:
        module, attribute = name.split(":", 1)
        sys.path.insert(0, str(Path.cwd()))
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"--env {name}: {error}; it is MODULE:FACTORY.") from None
        finally:
            sys.path.pop(0)
    names = [known for known in registered_envs if known not in UNAVAILABLE]
    if name not in names:
        raise ConfigError(f"--env {name}: there are {', '.join(names)}, and your own as MODULE:FACTORY.")
    return lambda **options: gymnax.make(name, **options)[0]


def adapted(environment: Any, params: Any, name: str) -> Environment:
    """Any object with gymnax's `reset` and `step`.

    One that has gymnax's parts too (`reset_env`, `step_env`, `is_truncated`) is stepped without its own reset at every
    step, which costs as much as the step.
    """
    in_parts = all(hasattr(environment, part) for part in ("reset_env", "step_env", "is_truncated"))
    raw_reset = environment.reset_env if in_parts else environment.reset
    like = jax.eval_shape(lambda key: raw_reset(key, params), jax.random.key(0))  # params need not be a pytree

    def reset(key: Key[Array, ""]) -> tuple[Observation, PyTree]:
        return _as(like, raw_reset(key, params))

    def step(key: Key[Array, ""], state: PyTree, action: Action, start: tuple[Observation, PyTree]) -> Step:
        if in_parts:
            found, following, reward, terminated, _ = environment.step_env(key, state, action, params)
            found, following = _as(like, (found, following))
            reached = following
            truncated = jnp.asarray(environment.is_truncated(following, params), bool)
            ended = jnp.asarray(terminated, bool) | truncated
            observation, following = jax.tree.map(
                lambda new, old: jnp.where(ended, new, old), start, (found, following)
            )
        else:
            observation, following, reward, terminated, truncated, info = environment.step(key, state, action, params)
            observation, following = _as(like, (observation, following))
            found, _ = _as(like, (info["final_observation"], following))
            reached = None
        terminated = jnp.asarray(terminated, bool)
        reward = jnp.asarray(reward, jnp.float32).reshape(())
        truncated = jnp.asarray(truncated, bool) & ~terminated
        return Step(observation, following, reward, terminated, truncated, found, reached)

    limit = getattr(params, "max_steps_in_episode", None)
    if limit is not None and not (1 <= limit < 2**31 and limit == int(limit)):
        raise ConfigError(f"--env-options max_steps_in_episode={limit} is not a whole number in [1, {2**31 - 1}].")
    if not isinstance(like[0], jax.ShapeDtypeStruct):
        raise ConfigError(f"--env {name}: what it observes is not one array.")
    actions = environment.action_space(params)
    if not isinstance(actions, spaces.Discrete | spaces.Box):
        raise ConfigError(f"--env {name}: its actions are neither spaces.Discrete nor spaces.Box of gymnax.")
    return Environment(
        name,
        environment.observation_space(params),
        actions,
        reset,
        step,
        None if limit is None else int(limit),
        (environment, params),
    )


def _as(like: PyTree, values: PyTree) -> PyTree:
    """In these types: gymnax gives Python's numbers at a reset and arrays after a step, which no loop can carry."""
    return jax.tree.map(lambda shape, leaf: jnp.asarray(leaf, shape.dtype), like, values)


# --- what is asked of spaces ----------------------------------------------------------------------


class OtherActions(ConfigError):
    """An algorithm's actions are not of the environment's kind."""


def actions_of(environment: Environment, who: str) -> int:
    """How many actions there are. Raises OtherActions where they are not discrete."""
    if not isinstance(environment.action_space, spaces.Discrete):
        raise OtherActions(f"{who} chooses among discrete actions; those of {environment.name} are continuous.")
    return int(environment.action_space.n)


def action_size(environment: Environment, who: str) -> int:
    """How many numbers an action is. Raises OtherActions where they are discrete."""
    if not isinstance(environment.action_space, spaces.Box):
        raise OtherActions(f"{who} gives continuous actions; those of {environment.name} are discrete.")
    return int(np.prod(environment.action_space.shape))


def observation_shape(environment: Environment) -> tuple[int, ...]:
    return jax.eval_shape(environment.reset, jax.random.key(0))[0].shape


def observation_dtype(environment: Environment) -> jnp.dtype:
    """The narrowest type that holds every observation as it is: bool where all numbers are 0 or 1, uint8 up to 255.

    gymnax declares the grids of MinAtar, which are of zeros and ones, as floats.
    """
    given, space = jax.eval_shape(environment.reset, jax.random.key(0))[0].dtype, environment.observation_space
    if given == jnp.dtype(bool):
        return given
    grids = environment.name.endswith("-MinAtar")
    if isinstance(space, spaces.Box) and (grids or not jnp.issubdtype(space.dtype, jnp.floating)):
        low, high = np.min(np.asarray(space.low)), np.max(np.asarray(space.high))
        if low >= 0 and high <= 255:  # not where they were scaled
            return jnp.dtype(bool if high <= 1 else jnp.uint8)
    return given


def outside(space: spaces.Space, observations: Array) -> Bool[Array, "..."]:
    """Of each number of these observations, whether it is not in the space, by more than rounding."""
    if isinstance(space, spaces.Box):
        slack = 1e-3 * jnp.maximum(1.0, jnp.abs(observations))
        inside = (observations >= space.low - slack) & (observations <= space.high + slack)
    elif isinstance(space, spaces.Discrete):
        inside = (observations >= 0) & (observations < space.n)
    else:
        inside = jnp.isfinite(observations)
    return ~inside


# --- environments made of environments ------------------------------------------------------------


def rescaled(environment: Environment) -> Environment:
    """Takes actions in [-1, 1], clipped to them, for the bounds of a continuous space, `[size]` whatever its shape.

    Raises ConfigError where it has none.
    """
    space = environment.action_space
    assert isinstance(space, spaces.Box)
    low, high = jnp.broadcast_to(space.low, space.shape), jnp.broadcast_to(space.high, space.shape)
    if not bool(jnp.all(jnp.isfinite(low) & jnp.isfinite(high))):
        raise ConfigError(f"the actions of {environment.name} have no bounds to be scaled to.")

    def step(key: Key[Array, ""], state: PyTree, action: Action, start: tuple[Observation, PyTree]) -> Step:
        action = low + (jnp.clip(action.reshape(low.shape), -1, 1) + 1) / 2 * (high - low)
        return environment.step(key, state, action, start)

    return environment._replace(step=step, action_space=spaces.Box(-1.0, 1.0, (low.size,), jnp.float32))


def centered(environment: Environment) -> Environment:
    """Observations of a bounded space scaled to [-1, 1], number by number.

    Raises ConfigError where the space has no bounds.
    """
    space = environment.observation_space
    low, high = (np.asarray(getattr(space, name, np.inf), np.float32) for name in ("low", "high"))
    if max(np.abs(low).max(), np.abs(high).max()) > 1e30:  # as gymnax says that there is no bound
        raise ConfigError(f"the observations of {environment.name} have no bounds to be scaled by.")
    assert isinstance(space, spaces.Box)

    def scaled(observation: Observation) -> Observation:
        return 2 * (observation - low) / (high - low) - 1

    def reset(key: Key[Array, ""]) -> tuple[Observation, PyTree]:
        observation, state = environment.reset(key)
        return scaled(observation), (observation, state)

    def step(key: Key[Array, ""], state: PyTree, action: Action, start: tuple[Observation, PyTree]) -> Step:
        made = environment.step(key, state[1], action, start[1])
        observation, next_observation = scaled(made.observation), scaled(made.next_observation)
        return made._replace(
            observation=observation,
            state=(made.observation, made.state),
            next_observation=next_observation,
            next_state=None if made.next_state is None else (made.next_observation, made.next_state),
        )

    shape = jnp.broadcast_shapes(low.shape, space.shape)
    return environment._replace(
        reset=reset,
        step=step,
        observation_space=spaces.Box(-1.0, 1.0, shape, jnp.float32),
        inner=lambda state: environment.inner(state[1]),
    )


def stacked(environment: Environment, frames: int) -> Environment:
    """Observations joined with the `frames - 1` before them, oldest first, along the last axis; at an episode's start
    the first one repeated.

    Raises ConfigError where an observation is a single number, as that of a state: there is no axis to join along.
    """
    if frames == 1:
        return environment
    if not observation_shape(environment):
        raise ConfigError(f"--frames {frames}: what {environment.name} observes is a single number.")

    def joined(frames_: Array) -> Array:
        return jnp.concatenate(list(frames_), axis=-1)

    def reset(key: Key[Array, ""]) -> tuple[Observation, PyTree]:
        observation, state = environment.reset(key)
        repeated = jnp.stack([observation] * frames)
        return joined(repeated), (state, repeated)

    def step(key: Key[Array, ""], state: PyTree, action: Action, start: tuple[Observation, PyTree]) -> Step:
        inner, seen = state
        _, (start_state, start_seen) = start
        made = environment.step(key, inner, action, (start_seen[-1], start_state))
        following = jnp.concatenate([seen[1:], made.next_observation[None]])
        fresh = jnp.broadcast_to(made.observation, seen.shape)
        kept = jnp.where(made.terminated | made.truncated, fresh, following)
        return made._replace(
            observation=joined(kept),
            state=(made.state, kept),
            next_observation=joined(following),
            next_state=None if made.next_state is None else (made.next_state, following),
        )

    space = environment.observation_space
    if isinstance(space, spaces.Box):
        low, high = (
            jnp.concatenate([jnp.broadcast_to(bound, space.shape)] * frames, -1) for bound in (space.low, space.high)
        )
        space = spaces.Box(low, high, low.shape, space.dtype)
    return environment._replace(
        reset=reset, step=step, observation_space=space, inner=lambda state: environment.inner(state[0])
    )
