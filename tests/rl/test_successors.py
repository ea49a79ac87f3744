"""Values of what steps led to, against one pass over all of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.rl.agent import Rollout
from jaxarch.rl.successors import successor_values

TIME, ENVS = 12, 4
RNG = np.random.default_rng(0)


def rollout_of(terminated, truncated):
    """Numbers as observations: within an episode each is what the step before led to."""
    following = RNG.normal(size=(TIME, ENVS))
    observation = RNG.normal(size=(TIME, ENVS))
    for t in range(1, TIME):
        observation[t] = np.where(terminated[t - 1] | truncated[t - 1], observation[t], following[t - 1])
    arrays = observation, terminated, terminated, following, terminated, truncated, following
    return Rollout(*map(jnp.asarray, arrays), (), ())


def test_equals_a_pass_over_all_that_followed():
    """Random ends, several truncations of one environment among them, none, and every step's."""
    calls = []

    def value(observations):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(3 * observations)

    for share in (0.0, 0.1, 0.5, 1.0):
        truncated = RNG.random((TIME, ENVS)) < share
        terminated = (RNG.random((TIME, ENVS)) < 0.2) & ~truncated
        rollout = rollout_of(terminated, truncated)
        calls.clear()
        found = successor_values(value, rollout, jnp.sin(3 * rollout.observation))
        wanted = np.sin(3 * np.asarray(rollout.next_observation))
        np.testing.assert_allclose(found[~terminated], wanted[~terminated], rtol=1e-6)
        jax.effects_barrier()
        assert len(calls) == 1 + truncated.sum(axis=0).max()  # no pass more than is needed
