"""Environments so small that what is to be learned of them can be said: each finds another fault of an algorithm.

With discount gamma the values are: CONSTANT 1; BY_OBSERVATION what is observed; BY_ACTION 1 by the best policy;
DELAYED gamma and then 1; ENDLESS 1 / (1 - gamma), though every episode is cut off.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from jaxarch.rl.environments import Environment, Step


def probe(name, begin, judge, actions=2, low=-1.0, high=1.0, limit=None):
    """begin: `key -> observation`, the first of an episode.
    judge: `(observation, action, t) -> (reward, terminated, next observation)`, where `t` steps came before.
    limit: steps after which an episode is truncated.
    """

    def reset(key):
        observation = jnp.asarray(begin(key), jnp.float32)
        return observation, (observation, jnp.zeros((), jnp.int32))

    def step(key, state, action, start):
        observation, t = state
        reward, terminated, following = judge(observation, action, t)
        found = jnp.asarray(following, jnp.float32)
        terminated = jnp.asarray(terminated, bool)
        truncated = ~terminated & (t + 1 >= limit) if limit else jnp.zeros((), bool)
        reached = found, (found, t + 1)
        shown, state = jax.tree.map(lambda new, old: jnp.where(terminated | truncated, new, old), start, reached)
        return Step(shown, state, jnp.asarray(reward, jnp.float32).reshape(()), terminated, truncated, found)

    space = spaces.Discrete(actions) if actions else spaces.Box(-1.0, 1.0, (1,), jnp.float32)
    shape = jax.eval_shape(begin, jax.random.key(0)).shape
    return Environment(name, spaces.Box(low, high, shape, jnp.float32), space, reset, step, limit)


def nothing(key):
    return jnp.zeros(1)


def sign(key):
    return jax.random.choice(key, jnp.array([-1.0, 1.0]), (1,))


# One step, reward 1: is a value learned at all?
CONSTANT = probe("constant", nothing, lambda o, a, t: (1.0, True, o))
# One step, the reward is what is observed: does the value see the observation?
BY_OBSERVATION = probe("by-observation", sign, lambda o, a, t: (o[0], True, o))
# Two steps, reward 1 at the second alone: is it discounted and carried back?
DELAYED = probe("delayed", nothing, lambda o, a, t: (jnp.float32(t == 1), t == 1, jnp.ones(1)))
# One step, reward 1 for action 1, -1 for action 0: is the policy pushed the right way?
BY_ACTION = probe("by-action", nothing, lambda o, a, t: (2.0 * a - 1, True, o))
# One step, reward 1 where the action agrees with what is observed: do both work together?
BY_BOTH = probe("by-both", sign, lambda o, a, t: (jnp.where(a == (o[0] > 0), 1.0, -1.0), True, o))
# Reward 1 for ever, cut off after every fourth step by a limit: is it taken for a death?
ENDLESS = probe("endless", nothing, lambda o, a, t: (1.0, False, o), limit=4)
# The same two of continuous actions: one step, the nearer to 0.5, or to half of what is observed, the better.
TO_HALF = probe("to-half", nothing, lambda o, a, t: (-jnp.square(a.sum() - 0.5), True, o), actions=0)
TO_OBSERVATION = probe("to-observation", sign, lambda o, a, t: (-jnp.square(a.sum() - o[0] / 2), True, o), actions=0)


def train(environment, agent, hypers, envs, length, steps, seed=0):
    """The learner after so many iterations."""
    from jaxarch.rl.training import make_experiment

    experiment = make_experiment(environment, agent, hypers, envs, length)

    @jax.jit
    def run(key):
        state = experiment.init(key, jax.tree.map(jnp.asarray, hypers))
        return jax.lax.scan(lambda state, i: experiment.step(state, None, i), state, jnp.arange(steps))

    state, metrics = run(jax.random.key(seed))
    return state, jax.tree.map(np.asarray, metrics)
