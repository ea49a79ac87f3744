"""All probe environments as one, so that one compilation and one run tell what an algorithm makes of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from jaxarch.rl.environments import Environment, Step
from jaxarch.rl.training import make_experiment
from tests.rl import probes

GAMMA = 0.8
CONTINUOUS = spaces.Box(-1.0, 1.0, (1,), jnp.float32)


def together(*members):
    """Each episode is of one of them, drawn at its start; the observation begins with which, as one of so many."""

    def shown(kind, observations):
        return jnp.concatenate([jax.nn.one_hot(kind, len(members)), jnp.stack(observations)[kind]])

    def reset(key):
        kind_key, *keys = jax.random.split(key, 1 + len(members))
        kind = jax.random.randint(kind_key, (), 0, len(members))
        starts = [member.reset(key) for member, key in zip(members, keys)]
        return shown(kind, [observation for observation, _ in starts]), (kind, tuple(state for _, state in starts))

    def step(key, state, action, start):
        kind, states = state
        _, (_, fresh) = start
        unused = jnp.zeros(1)
        made = [member.step(key, old, action, (unused, new)) for member, old, new in zip(members, states, fresh)]
        reward, terminated, truncated = (
            jnp.stack([getattr(each, name) for each in made])[kind] for name in ("reward", "terminated", "truncated")
        )
        found = shown(kind, [each.next_observation for each in made])
        following = found, (kind, tuple(each.state for each in made))
        ended = terminated | truncated
        observation, state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), start, following)
        return Step(observation, state, reward, terminated, truncated, found)

    space = spaces.Box(-1.0, 1.0, (len(members) + 1,), jnp.float32)
    return Environment("together", space, members[0].action_space, reset, step)


COMMON = probes.CONSTANT, probes.BY_OBSERVATION, probes.DELAYED, probes.ENDLESS
DISCRETE = together(*COMMON, probes.BY_BOTH)
BOXED = together(*(probe._replace(action_space=CONTINUOUS) for probe in COMMON), probes.TO_OBSERVATION)

# Which probe, what it shows, and what that is worth to the best policy.
CASES = [
    ("constant", 0, 0.0, 1.0),
    ("by observation", 1, 1.0, 1.0),
    ("by observation", 1, -1.0, -1.0),
    ("delayed, first", 2, 0.0, GAMMA),
    ("delayed, then", 2, 1.0, 1.0),
    ("endless", 3, 0.0, 1 / (1 - GAMMA)),
]
OBSERVATIONS = jnp.asarray([[*np.eye(5)[kind], seen] for _, kind, seen, _ in CASES], jnp.float32)
VALUES = np.array([value for *_, value in CASES])
BY_BOTH = jnp.asarray([[*np.eye(5)[4], seen] for seen in (1.0, -1.0)], jnp.float32)


def train(environment, agent, hypers, envs, length, steps, seed=0):
    """`probes.train`, compiled in half the time to a program that is slow, which does not matter here."""

    def run(key):
        state = experiment.init(key, jax.tree.map(jnp.asarray, hypers))
        return jax.lax.scan(lambda state, i: experiment.step(state, None, i), state, jnp.arange(steps))

    experiment = make_experiment(environment, agent, hypers, envs, length)
    fast = {"xla_backend_optimization_level": 0}
    state, metrics = jax.jit(run, compiler_options=fast)(jax.random.key(seed))
    return state, jax.tree.map(np.asarray, metrics)
