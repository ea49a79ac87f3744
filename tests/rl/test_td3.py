"""TD3 and DDPG: each of the three additions by itself, on networks that are linear, and the probe environments."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms import ddpg, td3
from jaxarch.rl.algorithms.td3 import TD3Config
from jaxarch.rl.networks import ActionValue, NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import probes, together

LINEAR = NetworkConfig(layers=0)
# Many times the same transition, so that a mean over the noise is known well; the policy at each third update.
CONFIG = TD3Config(random_steps=7, capacity=1, batch_size=20_000, delay=3, tau=0.1, model=LINEAR)
SEEN, NEXT, REWARD = 0.3, -0.7, 2.0


@functools.cache
def compiled():
    """The agent, a learner before anything, and `learn`: compiled once for all tests."""
    agent = td3.make_agent(probes.TO_HALF, CONFIG, envs=1, length=1)
    return agent, jax.jit(agent.init)(jax.random.key(0), CONFIG.hypers), jax.jit(agent.learn)


def linear(learner, now=False, policy=(0.0, 0.0), first=(0.0, 0.0, 0.0), second=(0.0, 0.0, 0.0)):
    """policy: tanh(p0 o + p1); values: v0 o + v1 a + v2. Of the targets, and unless `now` of the networks too, which
    are zero then.
    """

    def dense(weights, bias):
        return {"Dense_0": {"kernel": jnp.asarray(weights, jnp.float32)[:, None], "bias": jnp.full(1, bias)}}

    critics = tuple(dense(numbers[:2], numbers[2]) for numbers in (first, second))
    actor = dense(policy[:1], policy[1])
    kind = learner.networks
    current = jax.tree.map(jnp.zeros_like, (actor, critics)) if now else (actor, critics)
    networks = kind._replace(policy=current[0], critics=current[1], policy_target=actor, critic_targets=critics)
    return replace(learner, networks=networks)


def one_step(action=0.5, terminated=False, truncated=False):
    """A rollout of one step, which is all that the replay then holds."""
    flag = jnp.zeros((1, 1), bool)
    observation, action, following = (jnp.full((1, 1, 1), number) for number in (SEEN, action, NEXT))
    return Rollout(
        observation, flag, action, jnp.full((1, 1), REWARD), flag | terminated, flag | truncated, following, (), ()
    )


def learned(index=9, step=None, hypers=(), **networks):
    """The networks before and after learning from one step, and the metrics."""
    _, learner, learn = compiled()
    before = replace(linear(learner, **networks), hypers=CONFIG.hypers._replace(**dict(hypers)))
    after, metrics = learn(before, step or one_step(), jax.random.key(index), jnp.asarray(index))
    return before.networks, after.networks, {name: mean.total / mean.weight for name, mean in metrics.items()}


@pytest.mark.parametrize("terminated, truncated", [(False, False), (True, False), (False, True)])
def test_the_target_is_the_smaller_value_of_the_target_policy_s_action(terminated, truncated):
    step, hypers = one_step(terminated=terminated, truncated=truncated), {"gamma": 0.9, "target_noise": 0.0}
    *_, metrics = learned(step=step, hypers=hypers, policy=(0.5, 0.1), first=(1.0, 2.0, 3.0), second=(-1.0, 3.0, 1.0))
    action = np.tanh(0.5 * NEXT + 0.1)
    smaller = min(NEXT + 2 * action + 3, -NEXT + 3 * action + 1)
    expected = REWARD + (0 if terminated else 0.9 * smaller)
    np.testing.assert_allclose(metrics["train/value"], expected, rtol=1e-5)
    values = np.array([SEEN + 2 * 0.5 + 3, -SEEN + 3 * 0.5 + 1])
    np.testing.assert_allclose(metrics["train/value_loss"], np.square(values - expected).sum(), rtol=1e-5)


def test_the_target_is_of_the_target_networks():
    *_, metrics = learned(
        hypers={"gamma": 0.9, "target_noise": 0.0},
        now=True,
        policy=(0.0, 0.1),
        first=(1.0, 2.0, 3.0),
        second=(9.0,) * 3,
    )
    expected = REWARD + 0.9 * min(NEXT + 2 * np.tanh(0.1) + 3, 9 * (NEXT + np.tanh(0.1) + 1))
    np.testing.assert_allclose(metrics["train/value"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/value_loss"], 2 * expected**2, rtol=1e-5)


def test_the_target_s_noise_is_clipped_and_so_is_the_action():
    """By an expectation: values are the action itself, of a policy that says 0.9."""
    hypers = {"gamma": 1.0, "target_noise": 0.4, "target_noise_clip": 0.3}
    ways = {"policy": (0.0, np.arctanh(0.9)), "first": (0.0, 1.0, 0.0), "second": (0.0, 1.0, 0.0)}
    *_, metrics = learned(hypers=hypers, **ways)
    noise = np.clip(scipy.stats.norm(scale=0.4).ppf((np.arange(100_000) + 0.5) / 100_000), -0.3, 0.3)
    acted = np.clip(0.9 + noise, -1, 1)
    np.testing.assert_allclose(metrics["train/value"] - REWARD, acted.mean(), atol=5 * acted.std() / np.sqrt(20_000))


def test_the_policy_and_the_targets_wait_for_their_turn():
    ways = {"policy": (0.5, 0.1), "first": (1.0, 2.0, 3.0), "second": (-1.0, 3.0, 1.0)}
    for index in (9, 10, 11):
        before, after, metrics = learned(index, **ways)
        moved = {name: changed(getattr(before, name), getattr(after, name)) for name in before._fields}
        turn = index == 11  # of updates 9, 10, 11 the third
        assert moved["critics"] and moved["critics_opt"]
        assert [moved[name] for name in ("policy", "policy_opt", "policy_target", "critic_targets")] == [turn] * 4
        assert np.isfinite(metrics["train/policy_loss"]) == turn
    # The last turn's targets: a tenth of the way to what their networks became.
    for target, name in (("policy_target", "policy"), ("critic_targets", "critics")):
        olds, news, founds = map(
            jax.tree.leaves, (getattr(before, target), getattr(after, name), getattr(after, target))
        )
        for old, new, found in zip(olds, news, founds):
            np.testing.assert_allclose(found, 0.9 * np.asarray(old) + 0.1 * np.asarray(new), rtol=1e-5)


def changed(before, after):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))


def test_several_updates_an_iteration_keep_the_rhythm():
    """Two an iteration, the policy at each fourth: numbers 2 and 3, 4 and 5, 6 and 7."""
    agent = td3.make_agent(probes.TO_HALF, replace(CONFIG, delay=4, updates=2, batch_size=2, random_steps=1), 1, 1)
    _, learner, _ = compiled()
    learn = jax.jit(agent.learn)
    for index, turns in ((1, 1), (2, 0), (3, 1)):
        after, metrics = learn(learner, one_step(), jax.random.key(1), jnp.asarray(index))
        assert metrics["train/policy_loss"].weight == turns and metrics["train/value_loss"].weight == 2
        assert after.networks.policy_opt.count == turns and after.networks.critics_opt.count == 2


def test_the_policy_climbs_the_first_critic():
    """Adam's first step is the learning rate by the gradient's sign."""
    before, after, _ = learned(11, first=(0.0, 1.0, 0.0), second=(0.0, -1.0, 0.0))
    moved = after.policy["Dense_0"]["bias"] - before.policy["Dense_0"]["bias"]
    np.testing.assert_allclose(moved, CONFIG.learning_rate, rtol=1e-4)


def test_actions_are_random_then_noisy_then_clipped():
    # 4 steps an iteration: 2 random iterations.
    agent = td3.make_agent(probes.TO_HALF, CONFIG, envs=2, length=2)
    learner = linear(compiled()[1], policy=(0.0, np.arctanh(0.8)))
    learner = replace(learner, hypers=CONFIG.hypers._replace(exploration=0.5))
    observations = jnp.zeros((20_000, 1))
    act = jax.jit(lambda index: agent.act(learner, observations, jax.random.key(1), (), None, index)[0][:, 0])
    assert scipy.stats.kstest(np.asarray(act(1)), scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01
    noisy = np.asarray(act(2))
    below = noisy[noisy < 1]
    assert noisy.max() == 1 and noisy.min() >= -1
    np.testing.assert_allclose(np.mean(noisy == 1), scipy.stats.norm.sf(0.2 / 0.5), atol=0.015)
    np.testing.assert_allclose(np.median(below[below < 0.8]), 0.8 + 0.5 * scipy.stats.norm.ppf(0.25), atol=0.03)
    greedy, _ = agent.policy(learner, observations, None, (), None, True)
    np.testing.assert_allclose(greedy, 0.8, rtol=1e-6)


def test_nothing_is_learned_before_the_random_steps():
    before, after, metrics = learned(index=6)
    assert not changed(before, after) and not np.isfinite(metrics["train/value_loss"])
    before, after, metrics = learned(index=7)
    assert changed(before, after) and np.isfinite(metrics["train/value_loss"])


def test_replicas_keep_the_condition():
    """Under vmap with one index it is no selection between both branches: those cost as much as the updates."""
    agent, learner, _ = compiled()
    learners, rollouts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), (learner, one_step()))
    learn = jax.vmap(agent.learn, (0, 0, 0, None))
    text = str(jax.make_jaxpr(learn)(learners, rollouts, jax.random.split(jax.random.key(1), 2), jnp.asarray(0)))
    assert text.count("cond[") == 2


SMALL = TD3Config(
    learning_rate=3e-3,
    gamma=together.GAMMA,
    tau=0.05,
    exploration=0.5,
    random_steps=512,
    updates=4,
    batch_size=64,
    capacity=2048,
    model=NetworkConfig(layers=2, width=32),
)


@pytest.mark.parametrize("algorithm, config", [(td3, SMALL), (ddpg, ddpg.reduced(SMALL))], ids=["td3", "ddpg"])
def test_probe_environments(algorithm, config):
    agent = algorithm.make_agent(together.BOXED, SMALL, envs=8, length=1)
    state, _ = together.train(together.BOXED, agent, config.hypers, 8, 1, 1000)
    networks = state.learner.networks
    assert len(networks.critics) == config.critics

    def act(observations):
        return agent.policy(state.learner, observations, None, (), None, True)[0]

    for critic in networks.critics:
        values = ActionValue(config.model).apply({"params": critic}, together.OBSERVATIONS, act(together.OBSERVATIONS))
        np.testing.assert_allclose(values, together.VALUES, atol=0.06)
    np.testing.assert_allclose(act(together.BY_BOTH)[:, 0], [0.5, -0.5], atol=0.1)


def test_ddpg_has_none_of_the_additions():
    config = ddpg.reduced(TD3Config(target_noise=0.3, exploration=0.4))
    assert (config.critics, config.delay, config.hypers.target_noise, config.exploration) == (1, 1, 0, 0.4)


def test_discrete_actions_are_refused():
    with pytest.raises(ConfigError, match="td3 gives continuous actions; those of by-action are discrete"):
        td3.make_agent(probes.BY_ACTION, TD3Config(), 1, 1)
