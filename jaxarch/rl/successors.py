"""Values of what steps led to, from values of what was observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxarch.rl.agent import Rollout


def successor_values(
    value: Callable[[Any], Float[Array, " envs"]], rollout: Rollout, values: Float[Array, "time envs"]
) -> Float[Array, "time envs"]:
    """V of each step's `next_observation`, where it did not terminate; elsewhere without meaning, as its discount is 0.

    value: V of one observation of each environment.
    values: V of `rollout.observation`.

    Where an episode goes on, the next observation is that of the next step. So `value` is asked for the last ones and
    for those at which an episode was truncated alone: one of each environment a pass, as many passes as the
    environment with the most of them needs.
    """
    ordinals = jnp.cumsum(rollout.truncated, axis=0)  # of truncations, from 1 on
    last = value(jax.tree.map(lambda leaf: leaf[-1], rollout.next_observation))

    def lacking(carry: tuple[Array, Array]) -> Array:
        return carry[0] <= ordinals[-1].max()

    def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        ordinal, found = carry
        here = rollout.truncated & (ordinals == ordinal)
        steps = here.argmax(axis=0)
        final = value(jax.tree.map(jax.vmap(lambda leaf, step: leaf[step], (1, 0)), rollout.next_observation, steps))
        return ordinal + 1, jnp.where(here, final, found)

    start = jnp.ones((), ordinals.dtype), jnp.concatenate([values[1:], last[None]])
    return jax.lax.while_loop(lacking, one, start)[1]
