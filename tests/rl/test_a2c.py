"""A2C and REINFORCE: their gradients by definition in float64, what they learn of probes."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import a2c as experiments_a2c
from experiments import reinforce as experiments_reinforce
from jaxarch.rl.actor_critic import actor_critic
from jaxarch.rl.algorithms import a2c, reinforce
from jaxarch.rl.algorithms.a2c import A2CConfig
from jaxarch.rl.algorithms.reinforce import ReinforceConfig
from jaxarch.rl.collecting import begin, collect
from jaxarch.rl.environments import make, rescaled
from jaxarch.rl.networks import NetworkConfig
from tests.rl import together
from tests.run.running import assert_same, exit_code, resumed, run

SMALL = NetworkConfig(layers=1, width=32)
ENVS, LENGTH = 3, 7
PENDULUM = rescaled(make("Pendulum-v1", {"max_steps_in_episode": 4}))
CARTPOLE = make("CartPole-v1", {"max_steps_in_episode": 4})


def test_probe_environments_by_a2c():
    environment = together.DISCRETE
    config = A2CConfig(learning_rate=1e-2, anneal=False, gamma=together.GAMMA, gae_lambda=0.9, model=SMALL)
    agent = a2c.make_agent(environment, config, 500)
    state, _ = together.train(environment, agent, config.hypers, 16, 8, 500)
    network = actor_critic(environment, SMALL, False, "a2c")
    policy, _ = network.apply({"params": state.learner.params}, together.BY_BOTH)
    np.testing.assert_array_equal(policy.mode(), [1, 0])
    _, values = network.apply({"params": state.learner.params}, together.OBSERVATIONS)
    np.testing.assert_allclose(values, together.VALUES, atol=0.3)


def test_probe_environments_by_reinforce():
    """Without a bootstrap what a limit cuts off counts nothing: `endless` is worth between 1 and four discounted."""
    environment = together.DISCRETE
    config = ReinforceConfig(learning_rate=1e-2, gamma=together.GAMMA, model=SMALL)
    agent = reinforce.make_agent(environment, config, 300)
    state, _ = together.train(environment, agent, config.hypers, 16, 12, 300)
    network = actor_critic(environment, SMALL, False, "reinforce")
    policy, _ = network.apply({"params": state.learner.params}, together.BY_BOTH)
    np.testing.assert_array_equal(policy.mode(), [1, 0])
    _, values = network.apply({"params": state.learner.params}, together.OBSERVATIONS)
    np.testing.assert_allclose(values[:-1], together.VALUES[:-1], atol=0.3)
    assert 1 < values[-1] < (1 - together.GAMMA**4) / (1 - together.GAMMA)


def rollout_of(environment, agent, hypers):
    learner = agent.init(jax.random.key(0), jax.tree.map(jnp.asarray, hypers))
    # So that values and probabilities are nothing special.
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), learner.params)
    learner = learner.replace(params=params)
    world = begin(environment, agent, ENVS, jax.random.key(1))
    _, rollout, _ = jax.jit(
        lambda: collect(environment, agent, learner, world, jax.random.key(2), jnp.asarray(0), LENGTH)
    )()
    assert rollout.truncated.any() and not rollout.ended[-1].all()
    return learner, rollout


def stepped(optimizer, max_norm, params, loss):
    optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer)
    updates, _ = optimizer.update(jax.jit(jax.grad(loss))(params), optimizer.init(params))
    return optax.apply_updates(params, updates)


def assert_close(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("environment", [CARTPOLE, PENDULUM], ids=["discrete", "continuous"])
def test_the_gradient_of_a2c(environment):
    """Targets are all rewards of the rollout, then the value of where it, or an episode's limit, cut it off."""
    with jax.enable_x64(True):
        config = A2CConfig(model=NetworkConfig(layers=1, width=5), max_norm=1e9)
        agent = a2c.make_agent(environment, config, 10)
        learner, rollout = rollout_of(environment, agent, config.hypers)
        network = actor_critic(environment, config.model, False, "a2c")
        _, values = network.apply({"params": learner.params}, rollout.observation)
        _, following = network.apply({"params": learner.params}, rollout.next_observation)
        targets = np.zeros((LENGTH, ENVS))
        for env in range(ENVS):
            for t in reversed(range(LENGTH)):
                cut = t == LENGTH - 1 or rollout.truncated[t, env]
                after = following[t, env] if cut else targets[min(t + 1, LENGTH - 1), env]
                targets[t, env] = rollout.reward[t, env] + config.gamma * after * (not rollout.terminated[t, env])

        def loss(params):
            policy, found = network.apply({"params": params}, rollout.observation)
            gain = jnp.mean(policy.log_prob(rollout.action) * (targets - values))
            error = jnp.mean(jnp.square(found - targets)) / 2
            return -gain + config.value * error - config.entropy * jnp.mean(policy.entropy())

        wanted = stepped(optax.rmsprop(config.learning_rate * 0.7, 0.99, 1e-5), 1e9, learner.params, loss)
        found, _ = agent.learn(learner, rollout, jax.random.key(0), jnp.asarray(3))
        assert_close(found.params, wanted)


@pytest.mark.parametrize("baseline", [True, False])
def test_the_gradient_of_reinforce(baseline):
    """Of each step whose episode ended within the rollout: the rewards from it on, discounted, less the value."""
    with jax.enable_x64(True):
        model = NetworkConfig(layers=1, width=5)
        config = ReinforceConfig(baseline=baseline, normalize=False, model=model, max_norm=0.5)
        agent = reinforce.make_agent(CARTPOLE, config, 10)
        learner, rollout = rollout_of(CARTPOLE, agent, config.hypers)
        network = actor_critic(CARTPOLE, model, False, "reinforce")
        kept = []
        for env in range(ENVS):
            for t in range(LENGTH):
                ends = [k for k in range(t, LENGTH) if rollout.ended[k, env]]
                if ends:
                    rewards = rollout.reward[t : ends[0] + 1, env]
                    kept.append((t, env, sum(config.gamma**n * float(r) for n, r in enumerate(rewards))))
        times, envs, returns = map(np.array, zip(*kept, strict=True))
        assert 0 < len(kept) < LENGTH * ENVS
        _, values = network.apply({"params": learner.params}, rollout.observation)
        lead = returns - values[times, envs] * baseline

        def loss(params):
            policy, found = network.apply({"params": params}, rollout.observation)
            gain = jnp.mean(policy.log_prob(rollout.action)[times, envs] * lead)
            error = jnp.mean(jnp.square(found[times, envs] - returns)) / 2
            return -gain + config.value * error - config.entropy * jnp.mean(policy.entropy())

        wanted = stepped(optax.adam(config.learning_rate), config.max_norm, learner.params, loss)
        found, metrics = agent.learn(learner, rollout, jax.random.key(0), jnp.asarray(3))
        assert_close(found.params, wanted)
        # Adam would not tell a sum from a mean.
        np.testing.assert_allclose(metrics["train/value_loss"], np.mean((values[times, envs] - returns) ** 2) / 2)


def test_a_rollout_without_an_end_teaches_reinforce_nothing_of_returns():
    config = ReinforceConfig(entropy=0.0, model=NetworkConfig(layers=0))
    environment = make("CartPole-v1")
    agent = reinforce.make_agent(environment, config, 10)
    learner = agent.init(jax.random.key(0), jax.tree.map(jnp.asarray, config.hypers))
    world = begin(environment, agent, 2, jax.random.key(1))
    _, rollout, _ = collect(environment, agent, learner, world, jax.random.key(2), jnp.asarray(0), 3)
    after, _ = agent.learn(learner, rollout, jax.random.key(0), jnp.asarray(0))
    assert not rollout.ended.any()
    assert_close(after.params, learner.params)


@pytest.mark.parametrize("module", [experiments_a2c, pytest.param(experiments_reinforce, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_uninterrupted(module, tmp_path):
    options = [
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
    options += ["--env-options", "max_steps_in_episode=5", "--eval-every", 3, "--checkpoint-every", 3]
    whole = run(module, tmp_path, *options)
    assert_same(whole, resumed(module, whole, 3))


@pytest.mark.slow
@pytest.mark.parametrize("module, scan, least", [(experiments_a2c, 100, 450), (experiments_reinforce, 25, 400)])
def test_cartpole_is_learned(module, scan, least, tmp_path: Path):
    """The interquartile mean of ten seeds."""
    options = ["--scan", scan, "--eval-every", 12500, "--replicas", 10]
    assert exit_code(module, "--runs", tmp_path, "--name", "a", *options) == 0
    name = module.__name__.rsplit(".", 1)[-1]
    result = json.loads((tmp_path / name / "a" / "result.json").read_text())
    assert result["eval/return/iqm"] >= least
