"""Soft actor-critic: soft values against integrals and sums, what the entropy converges to, the probe environments."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from gymnax.environments import spaces

from jaxarch.rl.agent import Rollout
from jaxarch.rl.algorithms import sac
from jaxarch.rl.algorithms.sac import SACConfig
from jaxarch.rl.networks import NetworkConfig
from jaxarch.run import ConfigError
from tests.rl import probes, together

LINEAR = NetworkConfig(layers=0)
CONFIG = SACConfig(random_steps=7, capacity=1, batch_size=4, tau=0.1, gamma=0.9, temperature=0.7, model=LINEAR)
SEEN, NEXT, REWARD = 0.3, -0.7, 2.0


def dense(kernel, bias):
    return {"Dense_0": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}


# Of a discrete policy, two critics and their targets, all of one observed number o: kernel * o + bias.
POLICY = dense([[1.0, -0.5]], [0.2, 0.1])
CRITICS = dense([[2.0, -1.0]], [0.5, 1.5]), dense([[-1.0, 1.0]], [0.1, 2.0])

TARGETS = dense([[1.0, -0.5]], [0.7, 1.2]), dense([[-2.0, 1.5]], [0.3, 2.5])


def soft_value_by_hand(observed, temperature, critics=CRITICS):
    def outputs(params):
        return observed * np.asarray(params["Dense_0"]["kernel"])[0] + np.asarray(params["Dense_0"]["bias"])

    logits, first, second = map(outputs, (POLICY, *critics))
    probs = np.exp(logits) / np.exp(logits).sum()
    return probs @ (np.minimum(first, second) - temperature * np.log(probs)), -probs @ np.log(probs)


@functools.cache
def compiled():
    """An agent of discrete actions, its learner with the networks above, and `learn`."""
    agent = sac.make_agent(probes.BY_ACTION, CONFIG, envs=1, length=1)
    learner = jax.jit(agent.init)(jax.random.key(0), CONFIG.hypers(probes.BY_ACTION))
    networks = learner.networks._replace(policy=POLICY, critics=CRITICS, targets=TARGETS)
    return agent, replace(learner, networks=networks), jax.jit(agent.learn)


def one_step(terminated=False, truncated=False):
    flag = jnp.zeros((1, 1), bool)
    observation, following = (jnp.full((1, 1, 1), number) for number in (SEEN, NEXT))
    reward, action = jnp.full((1, 1), REWARD), jnp.zeros((1, 1), jnp.int32)
    return Rollout(observation, flag, action, reward, flag | terminated, flag | truncated, following, (), ())


def learned(index=7, step=None, **hypers):
    _, learner, learn = compiled()
    learner = replace(learner, hypers=learner.hypers._replace(**hypers))
    after, metrics = learn(learner, step or one_step(), jax.random.key(index), jnp.asarray(index))
    return learner.networks, after.networks, {name: mean.total / mean.weight for name, mean in metrics.items()}


def test_a_discrete_soft_value_is_the_sum_over_actions():
    actor = sac.discrete(probes.BY_ACTION, CONFIG)
    found = actor.soft_value(POLICY, CRITICS, jnp.array([[SEEN], [NEXT]]), jnp.asarray(0.7), jax.random.key(0))
    expected = np.transpose([soft_value_by_hand(observed, 0.7) for observed in (SEEN, NEXT)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_continuous_soft_value_is_the_integral_over_actions_in_the_mean():
    """In u, where the action is tanh u and u is Gaussian of mean 0.4 and deviation e^-0.5."""
    actor = sac.continuous(probes.TO_HALF, CONFIG)
    policy = dense([[0.0, 0.0]], [0.4, -0.5])
    critics = dense([[0.0], [1.0]], [0.0]), dense([[0.0], [-2.0]], [0.3])
    observations = jnp.zeros((100_000, 1))
    value, entropy = actor.soft_value(policy, critics, observations, jnp.asarray(0.7), jax.random.key(0))
    u = np.linspace(-6, 6, 20_001)
    density, action = scipy.stats.norm(0.4, np.exp(-0.5)).pdf(u), np.tanh(u)
    log_prob = np.log(density) - np.log(1 - action**2)
    expected = np.trapezoid(density * (np.minimum(action, 0.3 - 2 * action) - 0.7 * log_prob), u)
    np.testing.assert_allclose(value.mean(), expected, atol=5 * float(value.std()) / np.sqrt(100_000))
    np.testing.assert_allclose(
        entropy.mean(), -np.trapezoid(density * log_prob, u), atol=5 * float(entropy.std()) / np.sqrt(100_000)
    )


@pytest.mark.parametrize("terminated, truncated", [(False, False), (True, False), (False, True)])
def test_critics_learn_the_reward_and_the_next_soft_value(terminated, truncated):
    *_, metrics = learned(step=one_step(terminated, truncated))
    expected = REWARD + (0 if terminated else 0.9 * soft_value_by_hand(NEXT, 0.7, TARGETS)[0])
    np.testing.assert_allclose(metrics["train/value"], expected, rtol=1e-5)
    errors = np.array([2 * SEEN + 0.5, -SEEN + 0.1]) - expected  # of action 0
    np.testing.assert_allclose(metrics["train/value_loss"], np.square(errors).sum() / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/td_error"], np.abs(errors).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/entropy"], soft_value_by_hand(SEEN, 0.7)[1], rtol=1e-5)


def test_targets_follow_the_new_critics():
    before, after, _ = learned()
    assert float(after.critics[0]["Dense_0"]["bias"][0]) != float(before.critics[0]["Dense_0"]["bias"][0])
    for old, new, found in zip(*map(jax.tree.leaves, (before.targets, after.critics, after.targets))):
        np.testing.assert_allclose(found, 0.9 * np.asarray(old) + 0.1 * np.asarray(new), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("target, sign", [(0.1, -1), (0.69, 1)])
def test_the_temperature_falls_where_there_is_entropy_enough(target, sign):
    """The policy's entropy is 0.65 nats; Adam's first step is the learning rate by the gradient's sign."""
    assert 0.1 < soft_value_by_hand(SEEN, 0.7)[1] < 0.69
    before, after, _ = learned(target_entropy=target)
    np.testing.assert_allclose(after.log_temperature - before.log_temperature, sign * 3e-4, rtol=1e-3)
    np.testing.assert_allclose(before.log_temperature, np.log(0.7), rtol=1e-5)


def test_nothing_is_learned_before_the_random_steps():
    before, after, metrics = learned(index=6)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not np.isfinite(metrics["train/value_loss"])


def test_actions_are_random_then_sampled():
    agent = sac.make_agent(probes.BY_ACTION, CONFIG, envs=2, length=2)  # 4 steps an iteration: 2 random iterations
    _, learner, _ = compiled()
    observations = jnp.full((20_000, 1), SEEN)
    act = jax.jit(lambda index: agent.act(learner, observations, jax.random.key(1), (), None, index)[0])
    logits = SEEN * np.array([1.0, -0.5]) + np.array([0.2, 0.1])
    prob = 1 / (1 + np.exp(logits[0] - logits[1]))
    for index, expected in ((1, 0.5), (2, prob)):
        np.testing.assert_allclose(np.mean(act(index)), expected, atol=5 * 0.5 / np.sqrt(20_000))
    greedy, _ = agent.policy(learner, observations, None, (), None, True)
    assert set(np.asarray(greedy)) == {0}


def test_target_entropies_by_default():
    assert CONFIG.hypers(probes.TO_HALF).target_entropy == -1
    np.testing.assert_allclose(CONFIG.hypers(probes.BY_ACTION).target_entropy, 0.98 * np.log(2), rtol=1e-6)
    assert replace(CONFIG, target_entropy=0.3).hypers(probes.BY_ACTION).target_entropy == 0.3


ENTROPY = SACConfig(
    learning_rate=3e-3,
    temperature=0.2,
    random_steps=64,
    updates=4,
    batch_size=64,
    capacity=2048,
    model=NetworkConfig(layers=1, width=32),
)


def at_the_end(environment, config, steps=1500):
    """The temperature and the entropy, means over the last third."""
    agent = sac.make_agent(environment, config, envs=8, length=1)
    _, metrics = together.train(environment, agent, config.hypers(environment), 8, 1, steps)
    names = "train/temperature", "train/entropy"
    return [np.mean(metrics[name].total[-steps // 3 :]) / config.updates for name in names]


def test_the_entropy_of_continuous_actions_converges_to_its_target():
    """The best policy for the reward -(a - 1/2)^2 is exp of it over the temperature: a Gaussian of variance
    temperature / 2, and the entropy of a Gaussian is log(2 pi e variance) / 2.
    """
    temperature, entropy = at_the_end(probes.TO_HALF, ENTROPY)
    np.testing.assert_allclose(entropy, -1, atol=0.05)
    np.testing.assert_allclose(temperature, 2 * np.exp(-2) / (2 * np.pi * np.e), rtol=0.15)


def test_the_entropy_of_discrete_actions_converges_to_its_target():
    """The best policy for the rewards 1 and -1 has logits 2 / temperature apart."""
    temperature, entropy = at_the_end(probes.BY_ACTION, replace(ENTROPY, target_entropy=0.3))
    np.testing.assert_allclose(entropy, 0.3, atol=0.02)
    prob = scipy.optimize.brentq(lambda p: scipy.stats.entropy([p, 1 - p]) - 0.3, 0.5, 1 - 1e-9)
    np.testing.assert_allclose(temperature, 2 / np.log(prob / (1 - prob)), rtol=0.1)


SMALL = replace(
    ENTROPY,
    gamma=together.GAMMA,
    tau=0.05,
    temperature=0.01,
    learn_temperature=False,
    random_steps=512,
    model=NetworkConfig(layers=2, width=32),
)


@pytest.mark.parametrize("environment", [together.BOXED, together.DISCRETE], ids=["continuous", "discrete"])
def test_probe_environments(environment):
    agent = sac.make_agent(environment, SMALL, envs=8, length=1)
    state, _ = together.train(environment, agent, SMALL.hypers(environment), 8, 1, 1000)
    np.testing.assert_allclose(jnp.exp(state.learner.networks.log_temperature), 0.01, rtol=1e-5)

    def act(observations):
        return agent.policy(state.learner, observations, None, (), None, True)[0]

    continuous = environment is together.BOXED
    actor = (sac.continuous if continuous else sac.discrete)(environment, SMALL)
    values = actor.values(state.learner.networks.critics, together.OBSERVATIONS, act(together.OBSERVATIONS))
    np.testing.assert_allclose(values, np.stack([together.VALUES] * 2), atol=0.12)
    if continuous:
        np.testing.assert_allclose(act(together.BY_BOTH)[:, 0], [0.5, -0.5], atol=0.1)
    else:
        np.testing.assert_array_equal(act(together.BY_BOTH), [1, 0])


def test_observations_may_be_numbers_of_a_discrete_space():
    def reset(key):
        observation, state = probes.BY_ACTION.reset(key)
        return observation[0].astype(jnp.int32), state

    environment = probes.BY_ACTION._replace(observation_space=spaces.Discrete(3), reset=reset)
    agent = sac.make_agent(environment, CONFIG, envs=1, length=1)
    step = one_step()
    step = step._replace(
        observation=step.observation[..., 0].astype(jnp.int32),
        next_observation=step.next_observation[..., 0].astype(jnp.int32),
    )
    learner = jax.eval_shape(agent.init, jax.random.key(0), CONFIG.hypers(environment))
    jax.eval_shape(agent.learn, learner, step, jax.random.key(0), jnp.asarray(0))
    assert learner.networks.policy["Dense_0"]["kernel"].shape == (3, 2)


def test_a_temperature_that_has_no_logarithm_is_refused():
    with pytest.raises(ConfigError, match="--agent.temperature 0 is not above 0"):
        SACConfig(temperature=0.0)
