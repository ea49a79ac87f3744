"""Policies that remember: a sequence at once is its steps one by one, episodes are forgotten, and PPO learns by it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import memory as experiment
from jaxarch.rl import recurrent
from jaxarch.rl.algorithms.ppo_memory import MemoryPPOConfig, make_agent, network_of
from jaxarch.rl.collecting import begin, collect
from jaxarch.rl.environments import make
from jaxarch.rl.networks import NetworkConfig
from jaxarch.rl.recurrent import MemoryConfig
from tests.rl import together
from tests.run.running import assert_same, exit_code, log, resumed, run

TIME, ENVS, FEATURES = 9, 2, 3
KINDS = {
    "gru": MemoryConfig("gru", width=8),
    "transformer": MemoryConfig("transformer", width=8, layers=2, heads=2, context=4),
}


def network(kind, seed=0, **others):
    config = KINDS[kind]
    module = recurrent.remembering(config)
    key = jax.random.key(seed)
    x = jax.random.normal(key, (TIME, ENVS, FEATURES))
    nothing = recurrent.nothing_remembered(config, ENVS)
    first = jnp.zeros((TIME, ENVS), bool).at[0].set(True)
    params = jax.jit(module.init)(key, x, nothing, first)
    # Biases begin at zero: with them so, the places of two of them could be mistaken.
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    return jax.jit(lambda *given: module.apply(params, *given)), x, nothing, first


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_its_steps_one_by_one(kind):
    """Begun in the middle of an episode, with ends within, and longer than what a block sees."""
    apply, x, memory, first = network(kind)
    first = first.at[3, 0].set(True).at[4, 0].set(True).at[7, 1].set(True)
    _, memory = apply(x[::-1], memory, first)  # something to remember
    first = first.at[0, 0].set(False)
    at_once, kept = apply(x, memory, first)
    for t in range(TIME):
        found, memory = apply(x[t : t + 1], memory, first[t : t + 1])
        np.testing.assert_allclose(found[0], at_once[t], atol=2e-5)
    for one, other in zip(jax.tree.leaves(memory), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_knows_nothing_of_the_one_before(kind):
    apply, x, memory, first = network(kind)
    first = first.at[5, 0].set(True)
    changed, other = x.at[4].add(1.0), jax.tree.map(lambda leaf: leaf, apply(x, memory, first)[1])
    before, after = apply(x, memory, first)[0], apply(changed, memory, first)[0]
    np.testing.assert_array_equal(before[5:, 0], after[5:, 0])
    assert (np.abs(before[5:, 1] - after[5:, 1]).max(axis=-1) > 1e-6).all()
    np.testing.assert_array_equal(apply(x, other, first)[0], before)  # nor of the rollout before


def test_how_far_back_a_block_sees():
    config = MemoryConfig("transformer", width=8, layers=1, heads=2, context=4)
    module = recurrent.remembering(config)
    x = jax.random.normal(jax.random.key(0), (TIME, 1, FEATURES))
    nothing = recurrent.nothing_remembered(config, 1)
    first = jnp.zeros((TIME, 1), bool).at[0].set(True)
    params = jax.jit(module.init)(jax.random.key(0), x, nothing, first)
    slopes = jax.jit(jax.jacobian(lambda x: module.apply(params, x, nothing, first)[0].sum(axis=(1, 2))))(x)
    seen = np.abs(slopes).sum(axis=(2, 3)) > 1e-9
    steps = np.arange(TIME)
    back = steps[:, None] - steps
    np.testing.assert_array_equal(seen, (back >= 0) & (back <= 4))


def test_attention_against_its_definition():
    """Content and distance of each pair, one by one (Dai et al. 2019, sec. 3.3)."""
    context, time, heads, width = 3, 4, 2, 8
    rng = np.random.default_rng(0)
    x, window = (jnp.asarray(rng.normal(size=(1, steps, width)), jnp.float32) for steps in (time, context))
    others = jnp.concatenate([window, x], axis=1)
    first = jnp.zeros((time, 1), bool).at[2].set(True)
    seen = recurrent.visible(jnp.array([[False, True, True]]), first, context)
    module = recurrent.Attention(heads, context)
    params = module.init(jax.random.key(0), x, others, seen)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    wave = recurrent.sinusoids(context + 1, width)
    expected, x_, others_ = np.zeros((time, width)), np.asarray(x[0], np.float64), np.asarray(others[0], np.float64)
    for t in range(time):
        # Of the window, steps -3, -2 and -1, the first is of another episode; the sequence's third begins one.
        allowed = [s for s in range(-2, t + 1) if t - s <= context] if t < 2 else list(range(2, t + 1))
        assert sorted(np.flatnonzero(seen[0, t]) - context) == allowed
        for h in range(heads):
            q = x_[t] @ p["query"]["kernel"][:, h]
            scores = []
            for s in allowed:
                k = others_[context + s] @ p["key"]["kernel"][:, h]
                place = wave[t - s] @ p["place"]["kernel"][:, h]
                scores.append(
                    ((q + p["content_bias"][h]) @ k + (q + p["place_bias"][h]) @ place) / np.sqrt(width / heads)
                )
            weights = np.exp(scores - np.max(scores))
            for weight, s in zip(weights / weights.sum(), allowed, strict=True):
                value = others_[context + s] @ p["value"]["kernel"][:, h]
                expected[t] += weight * value @ p["out"]["kernel"][h]
    np.testing.assert_allclose(module.apply(params, x, others, seen)[0], expected, rtol=1e-4, atol=1e-3)


def test_a_gate():
    """g = (1 - z) x + z h (Parisotto et al. 2020), and shut it lets x through."""
    x, y = np.random.default_rng(0).normal(size=(2, 5, 4))
    module = recurrent.Gate(bias=0.7)
    params = module.init(jax.random.key(0), jnp.asarray(x), jnp.asarray(y))
    w = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params["params"].items() if name != "bias"}

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    r = sigmoid(y @ w["reset_layer"] + x @ w["reset_input"])
    z = sigmoid(y @ w["update_layer"] + x @ w["update_input"] - 0.7)
    h = np.tanh(y @ w["found_layer"] + (r * x) @ w["found_input"])
    found = module.apply(params, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, (1 - z) * x + z * h, rtol=1e-4, atol=1e-5)
    shut = jax.tree.map(lambda leaf: leaf, params)
    shut["params"]["bias"] = jnp.full(4, 50.0)
    np.testing.assert_allclose(module.apply(shut, jnp.asarray(x), jnp.asarray(y)), x, rtol=1e-6)


# --- PPO ------------------------------------------------------------------------------------------


def config_of(kind, **others):
    small = {"model": NetworkConfig(layers=1, width=8), "memory": KINDS[kind]}
    return MemoryPPOConfig(**{"epochs": 1, "minibatches": 1, **small, **others})


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_from_is_what_was_done(kind):
    """The first minibatch has the ratio 1, though episodes end within it, and each step's value is that which the next
    step has where the episode goes on.
    """
    environment = make("MemoryChain-bsuite", {"memory_length": 4})
    config, envs, length = config_of(kind), 3, 16
    agent = make_agent(environment, config, envs, 10)
    learner = agent.init(jax.random.key(0), jax.tree.map(jnp.asarray, config.hypers))
    stirred = jax.tree.map(lambda p: p + 0.5 * jax.random.normal(jax.random.key(5), p.shape), learner.params)
    learner = learner.replace(params=stirred)
    world = begin(environment, agent, envs, jax.random.key(1))
    gather = jax.jit(lambda world, key: collect(environment, agent, learner, world, key, jnp.int32(0), length))
    world, _, _ = gather(world, jax.random.key(2))
    world, rollout, _ = gather(world, jax.random.key(3))
    assert rollout.ended.any() and not rollout.first[0].all()
    network = network_of(environment, config)
    apply = jax.jit(
        lambda memory: network.apply({"params": learner.params}, rollout.observation, memory, rollout.first)
    )
    policy, _, _ = apply(rollout.memory)
    np.testing.assert_allclose(policy.log_prob(rollout.action), rollout.extras, atol=1e-5)
    forgotten, _, _ = apply(agent.memory(envs))
    assert np.abs(forgotten.log_prob(rollout.action) - rollout.extras).max() > 1e-4
    _, metrics = jax.jit(agent.learn)(learner, rollout, jax.random.key(4), jnp.int32(0))
    assert abs(metrics["train/approx_kl"]) < 1e-7 and metrics["train/clip_fraction"] == 0


@pytest.mark.parametrize("kind", ["gru", pytest.param("transformer", marks=pytest.mark.slow)])
def test_probe_environments(kind):
    """That of `endless` tells that truncation is no death. The second step of `delayed` is seen after the first."""
    environment = together.DISCRETE
    memory = MemoryConfig("gru", 16) if kind == "gru" else MemoryConfig("transformer", 16, layers=1, heads=2, context=4)
    config = MemoryPPOConfig(
        learning_rate=1e-2,
        anneal=False,
        gamma=together.GAMMA,
        gae_lambda=0.9,
        epochs=4,
        minibatches=2,
        model=NetworkConfig(layers=1, width=32),
        memory=memory,
    )
    agent = make_agent(environment, config, 16, 120)
    state, _ = together.train(environment, agent, config.hypers, 16, 8, 120)

    def seen(observations):
        envs = observations.shape[1]
        first = jnp.zeros(observations.shape[:2], bool).at[0].set(True)
        given = {"params": state.learner.params}, observations, agent.memory(envs), first
        return jax.jit(network_of(environment, config).apply)(*given)

    delayed = [case for case, _, _, _ in together.CASES].index("delayed, first")
    _, values, _ = seen(
        jnp.stack([together.OBSERVATIONS, together.OBSERVATIONS[delayed + 1] + 0 * together.OBSERVATIONS])
    )
    found = values[0].at[delayed + 1].set(values[1, delayed])
    np.testing.assert_allclose(found, together.VALUES, atol=0.3)
    policy, _, _ = seen(together.BY_BOTH[None])
    np.testing.assert_array_equal(policy.mode()[0], [1, 0])


TINY = ["--env-steps", 256, "--envs", 4, "--length", 8, "--episodes", 4, "--eval-every", 4]
SMALL = ["--agent.memory.width", 8, "--agent.memory.context", 3, "--agent.model.width", 8]


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    options = ["--env-options", "memory_length=5", "--agent.memory.kind", "transformer", *TINY, *SMALL]
    whole = run(experiment, tmp_path, *options, "--checkpoint-every", 4)
    assert_same(whole, resumed(experiment, whole, 4))
    assert {"eval/return", "train/approx_kl", "train/entropy"} <= log(whole)[-1].keys()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--envs", 6], "--agent.minibatches 4 does not divide --envs 6"),
        (["--agent.memory.width", 12], "--agent.memory.width 12 is not a multiple of twice --agent.memory.heads 4"),
        (["--agent.memory.context", 0], "--agent.memory.context 0 is below 1"),
    ],
)
def test_bad_options(options, said, tmp_path, capsys):
    assert exit_code(experiment, "--runs", tmp_path, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "none"])
def test_who_remembers_is_right(kind, tmp_path):
    whole = run(experiment, tmp_path, "--agent.memory.kind", kind, "--scan", 20)
    found = log(whole)[-1]["eval/return"]
    assert found > 0.9 if kind == "gru" else abs(found) < 0.5
