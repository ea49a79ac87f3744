"""PPO by its definition in float64, what it learns of probes, and its parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from experiments import ppo as experiments_ppo
from jaxarch.rl.actor_critic import actor_critic
from jaxarch.rl.algorithms import ppo
from jaxarch.rl.algorithms.ppo import PPOConfig, make_agent, permutations
from jaxarch.rl.collecting import begin, collect
from jaxarch.rl.environments import make, rescaled
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import probes, together
from tests.run.running import exit_code

PROBING = PPOConfig(
    learning_rate=1e-2,
    anneal=False,
    gamma=together.GAMMA,
    gae_lambda=0.9,
    clip_value=False,
    epochs=4,
    minibatches=2,
    model=NetworkConfig(layers=1, width=32),
)
ENVS, LENGTH = 4, 6


@pytest.mark.parametrize("networks", ["separate", "shared"])
def test_probe_environments(networks):
    """That of `endless` tells that truncation is no death."""
    environment, config = together.DISCRETE, dataclasses.replace(PROBING, networks=networks)
    agent = make_agent(environment, config, 16, 8, 120)
    state, _ = together.train(environment, agent, config.hypers, 16, 8, 120)
    network = actor_critic(environment, config.model, networks == "shared", "ppo")
    _, values = network.apply({"params": state.learner.params}, together.OBSERVATIONS)
    np.testing.assert_allclose(values, together.VALUES, atol=0.25)
    policy, _ = network.apply({"params": state.learner.params}, together.BY_BOTH)
    np.testing.assert_array_equal(policy.mode(), [1, 0])


def test_continuous_probes():
    environment = together.BOXED
    config = dataclasses.replace(PROBING, entropy=0.0)
    agent = make_agent(environment, config, 16, 8, 150)
    state, _ = together.train(environment, agent, config.hypers, 16, 8, 150)
    actions, _ = agent.policy(state.learner, together.BY_BOTH, jax.random.key(0), (), None, True)
    np.testing.assert_allclose(actions[:, 0], [0.5, -0.5], atol=0.15)
    network = actor_critic(environment, config.model, False, "ppo")
    _, values = network.apply({"params": state.learner.params}, together.OBSERVATIONS)
    np.testing.assert_allclose(values, together.VALUES, atol=0.25)


def played(config, environment, iterations=0, seed=0):
    """An agent that has learned for some iterations, and a rollout of it."""
    agent = make_agent(environment, config, ENVS, LENGTH, 10)
    agent = agent._replace(learn=jax.jit(agent.learn))
    learner = agent.init(jax.random.key(seed), jax.tree.map(jnp.asarray, config.hypers))
    world = begin(environment, agent, ENVS, jax.random.key(1))
    some = jax.jit(lambda learner, world, key, index: collect(environment, agent, learner, world, key, index, LENGTH))
    for index in range(iterations + 1):
        world, rollout, _ = some(learner, world, jax.random.key(index), jnp.asarray(index))
        if index < iterations:
            learner, _ = agent.learn(learner, rollout, jax.random.key(index), jnp.asarray(index))
    return agent, learner, rollout


CARTPOLE = make("CartPole-v1", {"max_steps_in_episode": 4})
PENDULUM = rescaled(make("Pendulum-v1", {"max_steps_in_episode": 4}))


@pytest.mark.parametrize("environment", [CARTPOLE, PENDULUM], ids=["discrete", "continuous"])
def test_the_first_minibatch_has_ratio_1(environment):
    """By what acted and by what learns: observations are normalised by the same moments in both."""
    with jax.enable_x64(True):
        model = NetworkConfig(width=8)
        once = PPOConfig(epochs=1, minibatches=1, normalize_observations=True, learning_rate=0.1, model=model)
        agent, learner, rollout = played(once, environment, iterations=2)
        assert learner.observations.count == 2 * ENVS * LENGTH
        _, metrics = agent.learn(learner, rollout, jax.random.key(9), jnp.asarray(2))
        assert abs(metrics["train/approx_kl"]) < 1e-12 and metrics["train/clip_fraction"] == 0
        again = make_agent(environment, dataclasses.replace(once, epochs=2), ENVS, LENGTH, 10)
        _, metrics = jax.jit(again.learn)(learner, rollout, jax.random.key(9), jnp.asarray(2))
        assert metrics["train/approx_kl"] > 1e-4  # the measure can tell


def by_definition(config, environment, learner, rollout, index):
    """The parameters after one update on a whole rollout, as the paper's objective is written (eq. 7, 9 and 11)."""
    network = actor_critic(environment, config.model, False, "ppo")
    old, values = network.apply({"params": learner.params}, rollout.observation)
    _, next_values = network.apply({"params": learner.params}, rollout.next_observation)
    advantages = np.zeros((LENGTH, ENVS))
    for env in range(ENVS):
        after = 0.0
        for t in reversed(range(LENGTH)):
            alive = 1 - rollout.terminated[t, env]
            error = rollout.reward[t, env] + config.gamma * alive * next_values[t, env] - values[t, env]
            goes_on = alive * (1 - rollout.truncated[t, env])
            after = error + config.gamma * config.gae_lambda * goes_on * after
            advantages[t, env] = after
    targets = advantages + values
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def loss(params):
        new, found = network.apply({"params": params}, rollout.observation)
        ratio = jnp.exp(new.log_prob(rollout.action) - old.log_prob(rollout.action))
        clipped = jnp.where(
            ratio > 1 + config.clip, 1 + config.clip, jnp.where(ratio < 1 - config.clip, 1 - config.clip, ratio)
        )
        gain = jnp.where(ratio * scaled < clipped * scaled, ratio * scaled, clipped * scaled)
        error = (found - targets) ** 2
        return -jnp.mean(gain) + config.value * jnp.mean(error) / 2 - config.entropy * jnp.mean(new.entropy())

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_norm), optax.adam(config.learning_rate * (1 - index / 10), eps=1e-5)
    )
    params, opt, gradient = learner.params, optimizer.init(learner.params), jax.jit(jax.grad(loss))
    for _ in range(config.epochs):
        updates, opt = optimizer.update(gradient(params), opt)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("environment", [CARTPOLE, PENDULUM], ids=["discrete", "continuous"])
def test_the_update_is_that_of_the_paper(environment, monkeypatch):
    """In float64, three epochs of the whole rollout, annealed; then the same in parts of a minibatch."""
    with jax.enable_x64(True):
        model = NetworkConfig(width=8)
        config = PPOConfig(learning_rate=0.02, epochs=3, minibatches=1, clip=0.05, clip_value=False, model=model)
        agent, learner, rollout = played(config, environment)
        assert rollout.truncated.any()
        found, metrics = agent.learn(learner, rollout, jax.random.key(9), jnp.asarray(4))
        assert metrics["train/clip_fraction"] > 0
        wanted = by_definition(config, environment, learner, rollout, 4)
        monkeypatch.setattr(ppo, "AT_ONCE", ENVS * LENGTH // 3)
        agent = make_agent(environment, config, ENVS, LENGTH, 10)
        in_parts, said = jax.jit(agent.learn)(learner, rollout, jax.random.key(9), jnp.asarray(4))
        for name, value in metrics.items():  # Adam would not tell a sum from a mean
            np.testing.assert_allclose(said[name], value, rtol=1e-7, atol=1e-9)
        for one, part, other in zip(*map(jax.tree.leaves, (found.params, in_parts.params, wanted)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(part, other, rtol=1e-7, atol=1e-9)


def test_a_clipped_value_moves_no_further_than_the_clip():
    """The value's loss of one update, from a critic that is far off: the larger of both errors, so the gradient of a
    value that has gone beyond the clip is 0, and it stays there.
    """
    config = PPOConfig(
        learning_rate=0.005, anneal=False, epochs=200, minibatches=1, clip=0.2, model=NetworkConfig(layers=0)
    )
    moved = {}
    for clips in (True, False):
        agent, learner, rollout = played(dataclasses.replace(config, clip_value=clips), probes.ENDLESS)
        network = actor_critic(probes.ENDLESS, config.model, False, "ppo")
        after, _ = agent.learn(learner, rollout, jax.random.key(0), jnp.asarray(0))
        values = [network.apply({"params": one.params}, jnp.zeros((1, 1)))[1][0] for one in (learner, after)]
        moved[clips] = values[1] - values[0]
    assert 0.2 < moved[True] < 0.3 and moved[False] > 0.8  # Adam's momentum carries it a little beyond


def test_orders_are_random_permutations():
    orders = np.asarray(permutations(jax.random.key(0), 600, 4))
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(4), (600, 1)))
    counts = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3
    for size in (1, 5, 512, 513):
        (order,) = permutations(jax.random.key(1), 1, size)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_rewards_are_divided_by_the_deviation_of_returns():
    """Two iterations of CONSTANT's kind, against numpy over all returns so far."""
    config = PPOConfig(normalize_rewards=True, gamma=0.9, epochs=1, minibatches=1, model=NetworkConfig(layers=0))
    agent, learner, rollout = played(config, CARTPOLE)
    seen, under_way = [], np.zeros(ENVS)
    for index in range(2):
        rewards = np.random.default_rng(index).normal(size=(LENGTH, ENVS)).astype(np.float32)
        learner, _ = agent.learn(
            learner, rollout._replace(reward=jnp.asarray(rewards)), jax.random.key(0), jnp.asarray(index)
        )
        for t in range(LENGTH):
            under_way = 0.9 * under_way + rewards[t]
            seen.append(under_way)
            under_way = np.where(rollout.ended[t], 0, under_way)
    np.testing.assert_allclose(learner.returns.variance, np.var(seen), rtol=1e-5)
    np.testing.assert_allclose(learner.under_way, under_way, rtol=1e-5)


def test_a_rollout_must_be_whole_minibatches():
    with pytest.raises(ConfigError, match="--agent.minibatches 4 does not divide the 6 steps"):
        make_agent(CARTPOLE, PPOConfig(), 3, 2, 1)


def test_the_number_of_a_state_is_not_normalised():
    with pytest.raises(ConfigError, match="--agent.normalize-observations: FrozenLake-misc observes the number"):
        make_agent(make("FrozenLake-misc"), PPOConfig(normalize_observations=True), 4, 1, 1)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--length", 0], "--length 0 is below 1"),
        (["--agent.gamma", 1.5], "--agent.gamma 1.5 is not in [0, 1]"),
        (["--agent.learning-rate", "nan"], "--agent.learning-rate nan is not 0 or above"),
        (["--agent.epochs", 0], "--agent.epochs 0 is below 1"),
        (["--agent.max-norm", -1], "--agent.max-norm -1 is not 0 or above"),
        (["--env-options", "gravity"], "write it as name=value"),
        (["--sweep", "clip=0.1,-1"], "--sweep clip=0.1,-1: --agent.clip -1 is not 0 or above"),
        (["--agent.model.layers", -1], "--agent.model.layers -1 is below 0"),
    ],
)
def test_bad_options_are_told_in_a_line(options, said, tmp_path, capsys):
    assert exit_code(experiments_ppo, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset, scan, least", [("cartpole", 49, 490), ("acrobot", 49, -90), ("pendulum", 15, -250)])
def test_what_the_presets_reach(preset, scan, least, tmp_path: Path):
    """The interquartile mean of ten seeds."""
    options = ["--scan", scan, "--eval-every", 977, "--replicas", 10]
    assert exit_code(experiments_ppo, preset, "--runs", tmp_path, "--name", "a", *options) == 0
    result = json.loads((tmp_path / "ppo" / "a" / "result.json").read_text())
    assert result["eval/return/iqm"] >= least
