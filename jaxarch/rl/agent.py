"""What an algorithm is: how it acts, and how it learns from what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxarch.run import Hypers, Index, Metrics

Learner = PyTree  # all that an algorithm has learned and needs to learn on: parameters, optimiser, replay
Memory = PyTree  # what a policy keeps from step to step, with a leading axis of environments; () where it keeps nothing


class Rollout(NamedTuple):
    """Steps of several environments, `[time, envs, ...]`.

    first: the observation is the first of an episode.
    next_observation: what the action led to, before any reset.
    extras: what `act` said besides, as the distribution that the action is from.
    memory: the policy's memory before the first of these steps, `[envs, ...]`.
    """

    observation: Any
    first: Bool[Array, "time envs"]
    action: Any
    reward: Float[Array, "time envs"]
    terminated: Bool[Array, "time envs"]
    truncated: Bool[Array, "time envs"]
    next_observation: Any
    extras: PyTree
    memory: Memory

    @property
    def ended(self) -> Bool[Array, "time envs"]:
        return self.terminated | self.truncated


def nothing_learned(update: Callable[..., tuple[Any, Any]], *given: Any) -> Any:
    """Zeros for the metrics of an update `(...) -> (networks, metrics)` that is not made."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(update, *given)[1])


class Agent(NamedTuple):
    """An algorithm. All functions are pure; observations have a leading axis of environments.

    init: `(key, hypers) -> learner`.
    act: `(learner, observation, noise, memory, first, index) -> (action, memory, extras)`, while collecting.
    learn: `(learner, rollout, key, index) -> (learner, metrics)`.
    policy: `(learner, observation, key, memory, first, greedy) -> (action, memory)`, what was learned; `key` is
        without effect where it is greedy.
    memory: `envs -> memory` of so many environments, before anything was seen. A policy forgets it where `first`.
    noise: `(key, envs) -> noise`, all that is random in `act`. It is drawn for many steps at once: in the loop over
        steps it would cost as much as a step. By default the key itself.
    weights: the learner's fields that another run may begin with, those of a field of it as `networks.policy`; the size
        of the first is the count of parameters.
    newest_only: those that are large and only needed to learn on, a replay: only the newest checkpoint keeps them.
    """

    init: Callable[[Key[Array, ""], Hypers], Learner]
    act: Callable[..., tuple[Any, Memory, PyTree]]
    learn: Callable[[Learner, Rollout, Key[Array, ""], Index], tuple[Learner, Metrics]]
    policy: Callable[..., tuple[Any, Memory]]
    memory: Callable[[int], Memory] = lambda envs: ()
    noise: Callable[[Key[Array, ""], int], PyTree] = lambda key, envs: key
    weights: tuple[str, ...] = ("params",)
    newest_only: tuple[str, ...] = ()
