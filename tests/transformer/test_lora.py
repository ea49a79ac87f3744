"""What is trained of a model: low-rank adapters against the definition, and what must not move."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxarch.data.text import Tokens
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.layers import dense
from jaxarch.transformer.lora import (
    LoraConfig,
    TunedState,
    divided,
    init,
    make_tuned_step,
    merged,
    tuned_state,
)
from jaxarch.transformer.training import Hypers, OptimConfig, make_step, next_token, train_state

VOCAB, LENGTH, BATCH = 11, 6, 4
CONFIG = ModelConfig(layers=2, heads=2, dim=8, kv_heads=1, bias=True, tied=False)
MODEL = decoder(CONFIG, VOCAB, LENGTH)
LORA = LoraConfig(rank=2, alpha=6.0, targets=("query", "value", "up"))
KEY = jax.random.key(0)
SHAPES = jax.eval_shape(MODEL.init, KEY, jnp.zeros((1, 1), jnp.int32))["params"]


def drawn(tree, seed: int, size: float = 0.3):
    """Random values in the shapes of a tree: nothing at 0 or 1, so that no part is without effect."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32), tree)


PARAMS = drawn(SHAPES, 0)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, size=(BATCH, LENGTH + 1)).astype(np.int32)
TEXT = Tokens(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((BATCH, LENGTH), np.float32))


def flat(tree) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(tree, sep=".")


def test_adapters_have_the_rank_and_add_nothing_yet():
    adapters = init(PARAMS, 2, LORA.targets, KEY)
    shapes = {name: leaf.shape for name, leaf in flat(adapters).items()}
    assert shapes == {
        f"layers_{layer}.{module}.lora_{which}": shape
        for layer in (0, 1)
        for module, columns in {"attention.query": 8, "attention.value": 4, "feed_forward.up": 32}.items()
        for which, shape in {"a": (8, 2), "b": (2, columns)}.items()
    }
    jax.tree.map(np.testing.assert_array_equal, merged(PARAMS, adapters, 3.0), PARAMS)
    leaves = [leaf for name, leaf in flat(adapters).items() if name.endswith("lora_a")]
    assert len({float(leaf[0, 0]) for leaf in leaves}) == len(leaves)  # each is drawn on its own


def test_a_is_gaussian_and_keeps_the_size_of_what_it_multiplies():
    wide = init({"one": {"kernel": jnp.zeros((400, 50))}}, 40, ("one",), KEY)["one"]["lora_a"] * 20
    assert abs(wide.mean()) < 0.03 and abs(wide.std() - 1) < 0.03 and abs((wide**4).mean() - 3) < 0.2


def test_merged_is_the_sum_of_both_paths():
    """x W + b + scale (x A) B, and only where there is a pair."""
    adapters = drawn(init(PARAMS, 2, LORA.targets, KEY), 3)
    whole = merged(PARAMS, adapters, LORA.scale)
    assert LORA.scale == 3.0 and jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    x = np.random.default_rng(2).normal(size=(5, 8))
    for name, before in flat(PARAMS).items():
        path, _, last = name.rpartition(".")
        pair = [flat(adapters).get(f"{path}.lora_{which}") for which in "ab"]
        if last != "kernel" or pair[0] is None:
            np.testing.assert_array_equal(flat(whole)[name], before, err_msg=name)
            continue
        a, b = (np.asarray(leaf, np.float64) for leaf in pair)
        expected = x @ np.asarray(before, np.float64) + 3 * ((x @ a) @ b)
        actual = dense(jnp.asarray(x, jnp.float32), flat(whole)[name])
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        assert np.linalg.matrix_rank(np.asarray(flat(whole)[name] - before, np.float64), tol=1e-4) == 2


def test_stacked_layers_are_adapted_layer_by_layer():
    params, adapters = stack_layers(PARAMS), init(stack_layers(PARAMS), 2, LORA.targets, KEY)
    assert adapters["layers"]["attention"]["query"]["lora_a"].shape == (2, 8, 2)
    adapters = drawn(adapters, 4)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], adapters["layers"]) for i in (0, 1)]
    expected = merged(PARAMS, {"layers_0": each[0], "layers_1": each[1]}, 3.0)
    chex.assert_trees_all_close(merged(params, adapters, 3.0), stack_layers(expected), rtol=1e-6)


@pytest.mark.parametrize("tune", ["full", "lora", "head"])
def test_the_parts_are_the_model(tune):
    trained, frozen = divided(PARAMS, tune, ("readout", "classifier"), LORA, KEY)
    jax.tree.map(np.testing.assert_array_equal, merged(frozen, trained, LORA.scale), PARAMS)
    names = set(flat(trained))
    if tune == "full":
        assert frozen is None and names == set(flat(PARAMS))
        return
    assert set(flat(frozen)) == set(flat(PARAMS)) - {"readout.kernel"}
    adapters = {name for name in names if "lora_" in name}
    assert names - adapters == {"readout.kernel"} and len(adapters) == (12 if tune == "lora" else 0)


@pytest.mark.parametrize("tune", ["lora", "head"])
def test_steps_leave_what_is_frozen_bit_for_bit(tune):
    """And move all that is trained; the optimiser remembers nothing of what is frozen, nor does the average."""
    optim = OptimConfig(learning_rate=0.01, warmup=0, ema=0.5)
    parts = divided(PARAMS, tune, ("readout",), LORA, KEY)
    before, start = jax.tree.map(np.array, parts.frozen), jax.tree.map(np.array, parts.trained)
    state = tuned_state(parts, optim, KEY, Hypers(0.01, 0.1))
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(start))
    step = jax.jit(make_tuned_step(next_token(MODEL), optim, 10, LORA.scale))
    for index in range(3):
        state, metrics = step(state, TEXT, index)
    assert isinstance(state, TunedState) and metrics["train/grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, start)
    assert all(jax.tree.leaves(moved)), moved
    assert jax.tree.structure(state.ema) == jax.tree.structure(start)
    whole = merged(state.frozen, state.ema, LORA.scale)
    jax.tree.map(np.testing.assert_array_equal, state.whole(LORA.scale), whole)


def test_a_full_step_is_the_plain_one():
    optim = OptimConfig(learning_rate=0.01, warmup=0)
    hypers = Hypers(0.01, 0.1)
    tuned = tuned_state(divided(PARAMS, "full", (), LORA, KEY), optim, KEY, hypers)
    tuned, _ = jax.jit(make_tuned_step(next_token(MODEL), optim, 10, LORA.scale))(tuned, TEXT, 0)
    plain, _ = jax.jit(make_step(next_token(MODEL), optim, 10))(train_state(PARAMS, optim, KEY, hypers), TEXT, 0)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, plain.params)


def test_the_gradient_of_a_pair_is_that_of_the_sum():
    """dA = scale x^T (dy B^T), dB = scale (x A)^T dy, against autodiff of the model written with both paths."""
    kernel, a, b = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(5, 7), (5, 2), (2, 7)]))
    x, target = np.random.default_rng(9).normal(size=(6, 5)), np.random.default_rng(8).normal(size=(6, 7))
    with jax.enable_x64(True):

        def loss(over):
            whole = merged({"one": {"kernel": jnp.asarray(kernel)}}, over, 1.5)
            return 0.5 * jnp.square(x @ whole["one"]["kernel"] - target).sum()

        grads = jax.grad(loss)({"one": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}})["one"]
    error = x @ kernel + 1.5 * (x @ a) @ b - target
    np.testing.assert_allclose(grads["lora_a"], 1.5 * x.T @ (error @ b.T), rtol=1e-10)
    np.testing.assert_allclose(grads["lora_b"], 1.5 * (x @ a).T @ error, rtol=1e-10)


BAD = {
    "--lora.rank 0 is below 1; 8 is usual.": lambda: LoraConfig(rank=0),
    "--lora.alpha 0 is not above 0; twice --lora.rank is usual.": lambda: LoraConfig(alpha=0.0),
    "--lora.targets names no module; query value is usual.": lambda: LoraConfig(targets=()),
    "--lora.targets gate is no matrix of this model; it has down, key, out, query, readout, up, value.": (
        lambda: init(PARAMS, 2, ("query", "gate"), KEY)
    ),
    "--lora.rank 5 is more than value has, which is 8 x 4.": lambda: init(PARAMS, 5, ("query", "value"), KEY),
    "--tune head: this model has no head apart from its body; full or lora would do.": (
        lambda: divided(PARAMS, "head", ("classifier",), LORA, KEY)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_adapted_is_one_clear_line(message):
    with pytest.raises(ConfigError) as error:
        BAD[message]()
    assert str(error.value) == message


def test_biases_are_not_decayed_nor_are_adapters():
    """Decay would pull what was learned back to the pretrained model; on matrices trained as they are it acts."""
    optim = OptimConfig(learning_rate=0.01, warmup=0)
    parts = divided(PARAMS, "lora", ("readout",), LORA, KEY)
    step = jax.jit(make_tuned_step(next_token(MODEL), optim, 10, LORA.scale))
    decays = [step(tuned_state(parts, optim, KEY, Hypers(0.01, decay)), TEXT, 0)[0].params for decay in (0.0, 0.5)]
    same = {name: bool((leaf == flat(decays[1])[name]).all()) for name, leaf in flat(decays[0]).items()}
    assert {name for name, equal in same.items() if not equal} == {"readout.kernel"}


def test_the_state_is_taken_up_by_name():
    """Checkpoints and --init-from go by the fields."""
    names = [field.name for field in dataclasses.fields(TunedState)]
    assert names == ["params", "opt_state", "ema", "key", "hypers", "frozen"]
