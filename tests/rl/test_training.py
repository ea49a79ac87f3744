"""An algorithm and an environment as an experiment: replicas, evaluation on whole episodes, and a run that breaks."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from experiments import ppo
from jaxarch.rl.agent import Agent
from jaxarch.rl.environments import Environment, Step, make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.training import iterations, make_experiment, play
from jaxarch.run.program import Member
from tests.rl import probes
from tests.run.running import after, assert_same, exit_code, log, resumed

TINY = ["--env-steps", 96, "--envs", 2, "--length", 8, "--episodes", 2, "--agent.model.width", 8]
TINY += ["--env-options", "max_steps_in_episode=5", "--agent.epochs", 2, "--agent.minibatches", 2]


def constantly(action):
    return Agent(
        init=lambda key, hypers: (),
        act=lambda learner, observation, noise, memory, first, index: (jnp.full(len(first), action), memory, ()),
        learn=lambda learner, rollout, key, index: (learner, {}),
        policy=lambda learner, observation, key, memory, first, greedy: (
            jnp.full(len(first), action if greedy else 1 - action),
            memory,
        ),
    )


def test_iterations_are_rounded_up():
    assert [iterations(steps, 4, 8) for steps in (1, 32, 33, 64)] == [1, 1, 2, 2]


def test_evaluation_plays_whole_fresh_episodes():
    """CartPole under one action, against a loop until it falls; each policy on episodes of its own."""
    environment, agent, key = make("CartPole-v1"), constantly(1), jax.random.key(5)
    returns, lengths = jax.jit(lambda: play(environment, agent, (), key, 4, True))()
    begin_key, _ = jax.random.split(key)
    for number, start in enumerate(jax.random.split(begin_key, 4)):
        _, state = environment.reset(start)
        t, done = 0, False
        while not done:
            made = environment.step(key, state, jnp.asarray(1), environment.reset(key))
            state, done, t = made.state, bool(made.terminated), t + 1
        assert (returns[number], lengths[number]) == (t, t)
    experiment = make_experiment(probes.ENDLESS, agent, (), 2, 3, episodes=2)
    said = experiment.evaluate(experiment.init(jax.random.key(0), ()), jax.random.key(1))
    assert (said["eval/return"], said["eval/episode_length"]) == (4, 4)
    by_action = make_experiment(probes.BY_ACTION, agent, (), 2, 3, episodes=2)
    said = by_action.evaluate(by_action.init(jax.random.key(0), ()), jax.random.key(1))
    assert (said["eval/return"], said["eval/return_sampled"]) == (1, -1)


def test_every_iteration_draws_anew():
    """From the same state with another index: other actions, other lessons."""
    agent = constantly(1)._replace(
        act=lambda learner, observation, noise, memory, first, index: (jax.random.bits(noise, (2,)) % 2, memory, ()),
        learn=lambda learner, rollout, key, index: (
            learner,
            {"acted": rollout.action, "key": jax.random.bits(key, (3,))},
        ),
    )
    experiment = make_experiment(probes.BY_ACTION, agent, (), 2, 16)
    state = experiment.init(jax.random.key(0), ())
    one, same, other = (jax.jit(experiment.step)(state, None, jnp.asarray(index))[1] for index in (0, 0, 1))
    for name in ("acted", "key"):
        np.testing.assert_array_equal(one[name], same[name])
        assert not np.array_equal(one[name], other[name])


def test_a_replica_is_the_solo_run():
    """In float64 over three iterations, in each of which episodes end; two seeds differ from the first observation."""
    with jax.enable_x64(True):
        config = ppo.Config(
            env_options=("max_steps_in_episode=5",),
            env_steps=96,
            envs=2,
            length=8,
            agent=ppo.PPOConfig(epochs=2, minibatches=2, normalize_observations=True, model=NetworkConfig(width=8)),
        )
        experiment = ppo.experiment(config)
        grid = [Member(3, {}), Member(4, {"clip": 0.05})]
        programs, together = after(experiment, grid, 3)
        assert not np.allclose(*programs.init().world.observation)
        _, alone = after(experiment, grid[1:], 3)
        learners = alone.state.learner, programs.member(together.state, 1).learner
        for one, other in zip(*map(jax.tree.leaves, learners), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        assert jax.tree.leaves(alone.state.learner.params)[0].dtype == jnp.float64


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    """Bitwise; with normalised observations and rewards, whose moments are of the state."""
    looks = ["--eval-every", 2, "--checkpoint-every", 2, "--scan", 2]
    assert exit_code(ppo, "pendulum", "--runs", tmp_path, "--name", "a", *TINY, *looks) == 0
    whole = tmp_path / "ppo" / "a"
    assert_same(whole, resumed(ppo, whole, 4))
    last = log(whole)[-1]
    assert {"train/return", "train/approx_kl", "train/value_loss", "train/entropy", "eval/return"} <= last.keys()
    assert last["eval/episode_length"] == 5


def test_a_reward_that_is_no_number_ends_the_run_in_a_line(tmp_path, monkeypatch, capsys):
    module = ModuleType("broken_world")
    module.factory = gymnax_like
    monkeypatch.setitem(sys.modules, "broken_world", module)
    assert exit_code(ppo, "--runs", tmp_path, "--env", "broken_world:factory", *TINY[:-6]) == 1
    assert "env/sound[broken_world:factory] is not finite at step 0" in capsys.readouterr().err


def gymnax_like():
    def step(key, state, action, params):
        return jnp.zeros(1), 0, jnp.nan, False, False, {"final_observation": jnp.zeros(1)}

    return SimpleNamespace(
        reset=lambda key, params: (jnp.zeros(1), 0),
        step=step,
        default_params=SimpleNamespace(),
        observation_space=lambda params: spaces.Box(0.0, 1.0, (1,), jnp.float32),
        action_space=lambda params: spaces.Discrete(2),
    )


def test_all_that_is_random_in_an_iteration_has_a_key_of_its_own():
    """Starts, steps, actions and learning, of three iterations: no two draw the same number."""
    envs, length = 3, 4

    def reset(key):
        return jax.random.uniform(key, (1,)), ()

    def step(key, state, action, start):
        ends = jnp.ones((), bool)
        return Step(start[0], (), jax.random.uniform(key), ends, ~ends, jnp.zeros(1))

    space = spaces.Box(0, 1, (1,))
    environment = Environment("drawing", space, spaces.Discrete(2), reset, step)

    def learn(learner, rollout, key, index):
        # With the first part of its key, as the first start is.
        drawn = rollout.observation[1:], rollout.reward, rollout.extras, jax.random.uniform(jax.random.split(key)[0])
        return jnp.concatenate([leaf.reshape(-1) for leaf in drawn]), {}

    agent = Agent(
        init=lambda key, hypers: jnp.zeros(3 * length * envs - envs + 1),
        act=lambda learner, observation, noise, *others: (jnp.zeros(envs, jnp.int32), (), noise),
        learn=learn,
        policy=lambda learner, observation, key, memory, first, greedy: (jnp.zeros(len(first), jnp.int32), memory),
        noise=lambda key, envs: jax.random.uniform(key, (envs,)),
    )
    experiment = make_experiment(environment, agent, (), envs, length)
    state, numbers = experiment.init(jax.random.key(0), ()), []
    iteration = jax.jit(lambda state, index: experiment.step(state, None, index)[0])
    for index in range(3):
        state = iteration(state, jnp.int32(index))
        numbers.append(np.asarray(state.learner))
    numbers = np.concatenate(numbers)
    assert len(np.unique(numbers)) == len(numbers)
