"""An algorithm and an environment as an experiment: replicas, evaluation on whole episodes, and a run that breaks."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces

from experiments import a2c, dqn, iqn, ppo, pqn, reinforce, sac, td3
from jaxarch.rl.agent import Agent
from jaxarch.rl.environments import Environment, Step, make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.training import iterations, make_experiment, play
from jaxarch.run.program import Member
from jaxarch.run.protocol import ConfigError
from tests.rl import probes
from tests.run.running import after, assert_same, exit_code, log, resumed, wide

TINY = [
    "--env-steps",
    96,
    "--envs",
    2,
    "--length",
    8,
    "--episodes",
    2,
    "--agent.model.width",
    8,
    "--agent.model.layers",
    1,
]
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


TINY_REPLAY = {"starts": 10, "replay": 16, "batch_size": 4, "target_every": 8, "epsilon_steps": 20}
TINY_ACTOR = {"random_steps": 10, "capacity": 16, "batch_size": 4}
# Of each algorithm its options, and those of its hypers that the second replica has otherwise.
SWEPT = {
    dqn: ({**TINY_REPLAY, "prioritized": True}, {"gamma": 0.5, "epsilon": 0.3, "alpha": 0.9, "beta": 0.1}),
    iqn: (TINY_REPLAY, {"gamma": 0.5, "epsilon": 0.3, "risk": 0.5}),
    pqn: ({"minibatches": 2, "epsilon_steps": 20}, {"gamma": 0.5, "q_lambda": 0.2}),
    sac: (TINY_ACTOR, {"gamma": 0.5, "tau": 0.3, "temperature": 0.1, "target_entropy": 0.2}),
    td3: (TINY_ACTOR, {"gamma": 0.5, "tau": 0.3, "exploration": 0.4, "target_noise": 0.6}),
    a2c: ({}, {"gamma": 0.5, "gae_lambda": 0.3, "entropy": 0.2, "value": 2.0}),
    reinforce: ({}, {"gamma": 0.5, "entropy": 0.2, "value": 2.0}),
}


@pytest.mark.parametrize("module", [dqn, *(pytest.param(m, marks=pytest.mark.slow) for m in SWEPT if m is not dqn)])
def test_a_member_of_a_sweep_is_the_solo_run_with_these_options(module):
    """In float64, over seven iterations: learning begins, targets follow, and the ring of a replay comes round."""
    with jax.enable_x64(True):
        options, hypers = SWEPT[module]
        hypers = {"learning_rate": 0.02, **hypers}
        config = module.Config(env_options=("max_steps_in_episode=5",), env_steps=28, envs=2, length=2)
        agent = dataclasses.replace(config.agent, **options, model=dataclasses.replace(config.agent.model, layers=0))

        def learners(agent, points):
            """Of seeds 3, 4, ... at these points, side by side where there are several."""
            experiment = wide(module.experiment(dataclasses.replace(config, agent=agent)))

            def run(seed, hypers):
                state = experiment.init(jax.random.key(seed), hypers)
                return jax.lax.scan(lambda state, i: experiment.step(state, None, i), state, jnp.arange(7))[0].learner

            several = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(experiment.hypers._replace(**p) for p in points)
            )
            fast = {"xla_backend_optimization_level": 0}
            seeds = jnp.arange(3, 3 + len(points)) if len(points) > 1 else jnp.array([4])
            return jax.jit(jax.vmap(run), compiler_options=fast)(seeds, several)

        alone, together = learners(dataclasses.replace(agent, **hypers), [{}]), learners(agent, [{}, hypers])
        own, member, other = (
            jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree, i in ((alone, 0), (together, 1), (together, 0))
        )
        for one, another in zip(*map(jax.tree.leaves, (own, member)), strict=True):
            np.testing.assert_allclose(one, another, rtol=1e-6, atol=1e-7)
        assert not all(map(np.allclose, *map(jax.tree.leaves, (own, other))))


LONG = {
    ppo: ppo.Config(agent=ppo.PPOConfig(model=NetworkConfig(width=8))),
    dqn: dqn.Config(agent=dqn.DQNConfig(prioritized=True, anneal=True, model=NetworkConfig(width=8))),
    sac: sac.Config(agent=sac.SACConfig(model=NetworkConfig(width=8))),
}


@pytest.mark.parametrize("module", LONG, ids=lambda module: module.__name__)
def test_memory_does_not_grow_with_the_number_of_steps(module):
    """A step is the same program, of the same state, whether the run has 1e5 of them or 1e9; but for constants, as the
    rate at which a schedule falls.
    """

    def program(env_steps):
        experiment = module.experiment(dataclasses.replace(LONG[module], env_steps=env_steps))
        state = jax.eval_shape(experiment.init, jax.random.key(0), experiment.hypers)
        lowered = jax.jit(experiment.step).lower(state, None, jnp.int32(0))
        return state, re.sub(r"dense<[^>]*>", "", lowered.as_text())

    (state, text), (of_long, long_text) = program(100_000), program(1_000_000_000)
    assert state == of_long and text == long_text


@pytest.mark.slow
def test_a_long_run_takes_no_more_memory_than_a_short_one(tmp_path):
    """The peak of the process, with all that the loop, the log and the checkpoints keep."""
    code = (
        "import sys; from experiments import ppo; from jaxarch.run import main\n"
        "try: main(ppo.experiment, ppo.Config, ppo.PRESETS)\n"
        "finally: print([line for line in open('/proc/self/status') if 'VmHWM' in line][0])"
    )
    peaks = {}
    for env_steps in (100_000, 1_000_000):
        options = ["--env-steps", env_steps, "--envs", 16, "--runs", tmp_path, "--name", env_steps, "--scan", 8]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True, check=True
        )
        peaks[env_steps] = int(re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)[0])
    assert peaks[1_000_000] < 1.05 * peaks[100_000]


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
    said = capsys.readouterr().err
    assert "env/sound[broken_world:factory] is not finite at step 0" in said
    assert "The environment gave a reward or an observation that is no number." in said


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


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (dqn.Config(envs=10), "--mesh data=4 does not divide --envs 10; 1, 2, 5, 10 would."),
        (ppo.Config(envs=8), "--mesh data=4 does not divide --agent.groups 1; 4 would do."),
    ],
)
def test_what_a_mesh_does_not_divide_is_said_in_the_words_of_the_command_line(config, line, monkeypatch):
    monkeypatch.setattr("jaxarch.rl.layout.size_of", lambda axis: 4)
    experiment = sys.modules[type(config).__module__].experiment(config)
    with pytest.raises(ConfigError, match=re.escape(line)):
        state = jax.eval_shape(experiment.init, jax.random.key(0), experiment.hypers)
        jax.eval_shape(experiment.step, state, None, jnp.int32(0))
