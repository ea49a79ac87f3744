"""Estimates of return from a rollout.

Arrays are `[time, ...]`; `discounts` is gamma where the episode goes on after the step and 0 where it `terminated`. A
`truncated` step keeps its discount: its successor's value is that of the true final observation, not of the next
episode's first. Throughout:

next_values: V of the state that the step led to, before any reset.
boundaries: the step was the last of its episode, for either reason; nothing flows back across it.

The last step of the rollout is taken for a boundary: what would follow is worth its `next_values`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def generalized_advantages(
    rewards: Float[Array, "time *envs"],
    values: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
    lambda_: float | Float[Array, ""],
) -> Float[Array, "time *envs"]:
    """Generalised advantage estimates (Schulman et al. 2016, eq. 16)."""
    errors = rewards + discounts * next_values - values
    return _carried_back(errors, jnp.where(boundaries, 0.0, lambda_ * discounts))


def discounted_returns(
    rewards: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
) -> Float[Array, "time *envs"]:
    """All rewards to the episode's end, discounted, and what is bootstrapped where it did not terminate. Zeros for
    `next_values` give Monte Carlo's, in which what is cut off counts nothing.
    """
    return lambda_returns(rewards, next_values, discounts, boundaries, 1.0)


def n_step_returns(
    rewards: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
    n: int,
) -> Float[Array, "time *envs"]:
    """`n` rewards, or those to the episode's or the rollout's end where that is nearer, then the value of the state
    reached (Sutton & Barto 2018, eq. 7.1).
    """

    def longer(_: int | Array, returns: Array) -> Array:
        shifted = jnp.concatenate([returns[1:], next_values[-1:]])
        return rewards + discounts * jnp.where(boundaries, next_values, shifted)

    return jax.lax.fori_loop(1, n, longer, rewards + discounts * next_values)


def lambda_returns(
    rewards: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
    lambda_: float | Float[Array, ""],
) -> Float[Array, "time *envs"]:
    """The mixture of all n-step returns, `(1 - lambda) lambda^(n - 1)` of each (Sutton & Barto 2018, eq. 12.3)."""
    # The last step has all of its value, as one at a boundary has.
    last = jnp.zeros_like(boundaries).at[-1].set(True)
    carry = jnp.where(boundaries | last, 0.0, lambda_ * discounts)
    return _carried_back(rewards + (discounts - carry) * next_values, carry)


class VTrace(NamedTuple):
    """targets: of the values. advantages: of the actions taken, weighted, for the policy's gradient."""

    targets: Float[Array, "time *envs"]
    advantages: Float[Array, "time *envs"]


def v_trace(
    rewards: Float[Array, "time *envs"],
    values: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
    ratios: Float[Array, "time *envs"],
    lambda_: float | Float[Array, ""] = 1.0,
    most: float = 1.0,
    most_of_policy: float = 1.0,
) -> VTrace:
    """V-trace (Espeholt et al. 2018, eq. 1 and sec. 4.2).

    ratios: probability of the action by the policy that learns over that by the one that acted.
    most: the paper's rho bar, that of the targets; most_of_policy: that of the advantages. c bar is 1.
    """
    errors = jnp.minimum(ratios, most) * (rewards + discounts * next_values - values)
    traces = lambda_ * jnp.minimum(ratios, 1.0)
    corrections = _carried_back(errors, jnp.where(boundaries, 0.0, discounts * traces))
    following = jnp.concatenate([corrections[1:], jnp.zeros_like(corrections[:1])])
    # v_{s+1} of the paper, which is V(s+1) and its correction; lambda < 1 takes part of it, as in the targets.
    successors = next_values + lambda_ * jnp.where(boundaries, 0.0, following)
    advantages = jnp.minimum(ratios, most_of_policy) * (rewards + discounts * successors - values)
    return VTrace(values + corrections, advantages)


def retrace(
    rewards: Float[Array, "time *envs"],
    values: Float[Array, "time *envs"],
    next_values: Float[Array, "time *envs"],
    discounts: Float[Array, "time *envs"],
    boundaries: Bool[Array, "time *envs"],
    ratios: Float[Array, "time *envs"],
    lambda_: float | Float[Array, ""] = 1.0,
) -> Float[Array, "time *envs"]:
    """Targets of the values of actions taken (Munos et al. 2016, eq. 4).

    values: Q of the observation and the action taken.
    next_values: Q of the state that the step led to, averaged over the policy that learns.
    ratios: as in `v_trace`, of the actions taken: a step's own error is not weighted, those after it are.
    """
    errors = rewards + discounts * next_values - values
    following = jnp.concatenate([ratios[1:], jnp.zeros_like(ratios[:1])])
    traces = lambda_ * jnp.minimum(following, 1.0)
    return values + _carried_back(errors, jnp.where(boundaries, 0.0, discounts * traces))


def _carried_back(errors: Float[Array, "time *envs"], weights: Float[Array, "time *envs"]) -> Array:
    """`x_t = errors_t + weights_t x_{t+1}`, beyond the last step 0."""

    def backward(carried: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        error, weight = step
        carried = error + weight * carried
        return carried, carried

    return jax.lax.scan(backward, jnp.zeros_like(errors[0]), (errors, weights), reverse=True)[1]
