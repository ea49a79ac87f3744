"""Laws of the training step: what is summed, what decays, what the schedule and the average do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib._muon import orthogonalize_via_newton_schulz

from jaxarch.data.text import Tokens, windows
from jaxarch.run.protocol import ConfigError, Mean
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.training import (
    Hypers,
    OptimConfig,
    TrainState,
    cross_entropy,
    direction,
    is_matrix,
    make_evaluate,
    make_init,
    make_step,
    next_token,
    orthogonalized,
    schedule,
)

VOCAB, LENGTH = 11, 8
MODEL = ModelConfig(layers=1, heads=2, dim=16, positions="rotary")


def batch_of(rows: int, seed: int = 0, weights: np.ndarray | None = None) -> Tokens:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH + 1), np.int32)
    weights = np.ones((rows, LENGTH), np.float32) if weights is None else weights.astype(np.float32)
    return Tokens(tokens[:, :-1], tokens[:, 1:], weights)


def trained(
    optim: OptimConfig,
    batch: Tokens,
    steps: int,
    total: int | None = None,
    model: ModelConfig = MODEL,
    dtype=jnp.float32,
):
    """The metrics of the last of some steps on one batch, and the state after it."""
    network = decoder(model, VOCAB, LENGTH, dtype)
    hypers = jax.tree.map(jnp.float32, Hypers(optim.learning_rate, optim.weight_decay))
    state = jax.jit(make_init(network, (jnp.zeros((1, LENGTH), jnp.int32),), optim))(jax.random.key(0), hypers)
    step = jax.jit(make_step(next_token(network), optim, total or steps))
    metrics = {}
    for index in range(steps):
        state, metrics = step(state, batch, jnp.int32(index))
    return metrics, state


def test_cross_entropy_by_hand():
    """Two tokens: -log(1/4) of weight 2, and one of weight 0 whose logits do not matter."""
    logits = jnp.array([[0.0, jnp.log(3.0)], [5.0, -900.0]])
    total = cross_entropy(logits, jnp.array([0, 1]), jnp.array([2.0, 0.0]))
    np.testing.assert_allclose(total, 2 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(optimizer):
    optim = OptimConfig(optimizer=optimizer, learning_rate=1e-2, warmup=5, weight_decay=0.0)
    metrics, _ = trained(optim, batch_of(4), 150)
    loss = metrics["train/loss"]
    assert loss.total / loss.weight < 0.05


def test_micro_batches_of_unequal_weight_are_one_batch():
    """Rows with 8, 1, 0 and 3 counted tokens, in two micro-batches: a mean of means would be another number."""
    weights = np.arange(LENGTH)[None] < np.array([8, 1, 0, 3])[:, None]
    batch = batch_of(4, weights=weights)
    whole, one = trained(OptimConfig(clip=0.0), batch, 1)
    parts, two = trained(OptimConfig(clip=0.0, accumulate=2), batch, 1)
    np.testing.assert_allclose(whole["train/loss"], parts["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(whole["train/grad_norm"], parts["train/grad_norm"], rtol=1e-4)
    # Adam's first step has the size of the rate whatever the gradient: its moments tell the gradients apart.
    moments = [jax.tree.leaves(state.opt_state[1].mu) for state in (one, two)]
    for left, right in zip(*moments, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)
    means = [jnp.mean(jnp.array([cross_entropy_mean(batch, rows) for rows in halves])) for halves in [((0, 2), (2, 4))]]
    assert abs(float(means[0]) - float(whole["train/loss"].total / whole["train/loss"].weight)) > 1e-3


def cross_entropy_mean(batch: Tokens, rows: tuple[int, int]) -> float:
    part = jax.tree.map(lambda leaf: leaf[slice(*rows)], batch)
    metrics, _ = trained(OptimConfig(), part, 1)
    return float(metrics["train/loss"].total / metrics["train/loss"].weight)


def test_only_matrices_decay():
    """With all weights of the loss 0 the gradient is 0, and decay alone acts: p (1 - rate * decay)."""
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.5, warmup=0, schedule="stable")
    batch = batch_of(2, weights=np.zeros((2, LENGTH)))
    _, start = trained(optim, batch, 0, total=100, model=ModelConfig(layers=1, heads=2, dim=16, bias=True))
    _, end = trained(optim, batch, 1, total=100, model=ModelConfig(layers=1, heads=2, dim=16, bias=True))
    matrices = is_matrix(start.params)
    assert set(jax.tree.leaves(matrices)) == {True, False}

    def check(matrix: bool, before: jax.Array, now: jax.Array) -> None:
        np.testing.assert_allclose(now, before * (0.95 if matrix else 1.0), rtol=1e-5)

    jax.tree.map(check, matrices, start.params, end.params)


def test_stacked_biases_are_not_matrices():
    network = decoder(ModelConfig(layers=2, heads=2, dim=16, bias=True, scan_layers=True), VOCAB, LENGTH)
    params = network.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    flat = jax.tree_util.tree_leaves_with_path(is_matrix(params))
    assert {jax.tree_util.keystr(path[-1:], simple=True): matrix for path, matrix in flat} == {
        "kernel": True, "embedding": True, "bias": False, "scale": False,
    }  # fmt: skip


def test_the_gradient_is_clipped_to_its_norm():
    clip = direction(OptimConfig(clip=1.0, beta1=0.0))
    grads = {"kernel": jnp.array([3.0, 4.0])}
    _, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(state[1].mu["kernel"], [0.6, 0.8], rtol=1e-6)


def test_muon_turns_the_blocks_matrices_and_adam_all_else():
    """Newton-Schulz brings every singular value near 1 (0.68 to 1.13 with these coefficients, Jordan 2024)."""
    transform = direction(OptimConfig(optimizer="muon", clip=0.0))
    gradient = jax.random.normal(jax.random.key(0), (16, 64))
    grads = {"layers_0": {"up": {"kernel": gradient, "bias": jnp.array([2.0])}}, "embedding": {"embedding": gradient}}
    updates, _ = transform.update(grads, transform.init(grads), grads)
    singular = np.linalg.svd(updates["layers_0"]["up"]["kernel"], compute_uv=False) / (0.2 * 64**0.5)
    assert singular.min() > 0.65 and singular.max() < 1.3
    np.testing.assert_allclose(updates["layers_0"]["up"]["bias"], 1.0, rtol=1e-4)  # Adam's first step: the sign
    np.testing.assert_allclose(updates["embedding"]["embedding"], jnp.sign(gradient), rtol=1e-3)
    stacked = {"layers": jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), grads["layers_0"])}
    both, _ = transform.update(stacked, transform.init(stacked), stacked)
    np.testing.assert_allclose(both["layers"]["up"]["kernel"][0], updates["layers_0"]["up"]["kernel"], atol=2e-2)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 24)])
def test_newton_schulz_equals_another_implementation(shape):
    matrix = jax.random.normal(jax.random.key(0), shape)
    other = orthogonalize_via_newton_schulz(matrix, jnp.array([3.4445, -4.7750, 2.0315]))
    np.testing.assert_allclose(orthogonalized(matrix), other, atol=1e-5)


def test_schedules_by_hand():
    """Warm-up over 10 steps to 1; the cosine's middle is halfway between 1 and the end; the last fifth falls."""
    cosine = schedule(OptimConfig(warmup=10, final=0.2), 110)
    stable = schedule(OptimConfig(warmup=10, final=0.0, schedule="stable"), 100)
    np.testing.assert_allclose([cosine(0), cosine(10), cosine(60), cosine(110)], [1 / 11, 1, 0.6, 0.2], rtol=1e-5)
    np.testing.assert_allclose([stable(10), stable(79), stable(90), stable(100)], [1, 1, 0.5, 0], atol=1e-6)
    assert float(schedule(OptimConfig(warmup=100), 1)(0)) > 0  # a run shorter than its warm-up still moves


def test_the_average_has_its_half_life():
    """decay 0.5: each step halves the distance to parameters that no longer move."""
    optim = OptimConfig(learning_rate=1e-12, ema=0.5, weight_decay=0.0)
    network = decoder(MODEL, VOCAB, LENGTH)
    init = make_init(network, (jnp.zeros((1, LENGTH), jnp.int32),), optim)
    state = init(jax.random.key(0), Hypers(1e-12, 0.0))
    shifted = state.replace(ema=jax.tree.map(lambda p: p + 1.0, state.params))
    step = jax.jit(make_step(next_token(network), optim, 10))
    for index in range(3):
        shifted, _ = step(shifted, batch_of(2), jnp.int32(index))
    for average, param in zip(jax.tree.leaves(shifted.ema), jax.tree.leaves(shifted.params), strict=True):
        np.testing.assert_allclose(average - param, 0.125, rtol=1e-4)
    assert shifted.evaluated is shifted.ema and state.replace(ema=None).evaluated is state.params


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_counts_every_held_out_token_once(batch_size):
    """Against the same sum over single windows, whatever the batch; 50 tokens are 49 targets."""
    network = decoder(MODEL, VOCAB, LENGTH)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 50, np.int32)
    params = network.init(jax.random.key(3), tokens[None, :LENGTH])["params"]
    state = TrainState(params, (), None, jax.random.key(0), ())
    cut = windows(tokens, LENGTH)
    metrics = jax.jit(make_evaluate(network, cut, batch_size, 2.0))(state, jax.random.key(0))
    total = 0.0
    for start in range(0, 49, LENGTH):
        piece = tokens[start : start + LENGTH + 1]
        logits = np.asarray(network.apply({"params": params}, piece[None, :-1])[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_probs[np.arange(len(piece) - 1), piece[1:]].sum()
    loss = metrics["val/loss"]
    assert isinstance(loss, Mean) and loss.weight == 49
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["val/perplexity"], np.exp(total / 49), rtol=1e-4)
    np.testing.assert_allclose(metrics["val/bits_per_character"], total / 49 / np.log(2) / 2, rtol=1e-4)


def test_bf16_trains_within_a_bound_of_f32():
    """The loss after 30 steps on one batch differs by less than 5 %."""
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        metrics, _ = trained(OptimConfig(warmup=5), batch_of(4), 30, dtype=dtype)
        losses.append(float(metrics["train/loss"].total / metrics["train/loss"].weight))
    assert losses[0] < 2.3 and abs(losses[0] - losses[1]) < 0.05 * losses[0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"learning_rate": 0.0}, "--optim.learning-rate 0 is not above 0; 1e-3 is usual."),
        ({"beta2": 1.0}, "--optim.beta2 1 is not in"),
        ({"accumulate": 0}, "--optim.accumulate 0 is below 1."),
        ({"weight_decay": -1.0}, "--optim.weight-decay -1 is below 0."),
    ],
)
def test_wrong_numbers_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**wrong)
