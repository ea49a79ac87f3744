"""Training a Transformer: objectives, optimisers, schedule, and the pure step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.data.text import Tokens
from jaxarch.run.protocol import ConfigError, Index, Mean, Metrics, check_least
from jaxarch.transformer.layout import IN_LAYERS, micro_batches, used

PRECISIONS = {"f32": jnp.float32, "bf16": jnp.bfloat16}

# `(params, batch, key)` to the sum of the losses and the sum of their weights. What is learned is the quotient; sums of
# micro-batches add up to those of the batch.
Objective = Callable[[PyTree, Any, Key[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]]


class Hypers(NamedTuple):
    """The numbers that a sweep may vary."""

    learning_rate: float | Float[Array, ""] = 1e-3
    weight_decay: float | Float[Array, ""] = 0.1


@flax.struct.dataclass
class TrainState:
    """What a run of a Transformer carries. Also holds shapes or a leading axis of replicas, so its types are plain.

    ema: exponential moving average of the parameters, which is what is evaluated and sampled from; None: there is none.
    """

    params: PyTree
    opt_state: PyTree
    ema: PyTree
    key: Any
    hypers: Any

    @property
    def evaluated(self) -> PyTree:
        return self.params if self.ema is None else self.ema


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the blocks' matrices, Adam for all else"""
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "stable"] = "cosine"
    """cosine to the end, or stable and then linear over the last fifth"""
    warmup: int = 100
    """steps of linear warm-up"""
    final: float = 0.1
    """the learning rate at the end, as a fraction"""
    weight_decay: float = 0.1
    """decoupled, on matrices only"""
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    """largest norm of the gradient (0: no clipping)"""
    ema: float = 0.0
    """decay of the moving average that is evaluated (0: none)"""
    accumulate: int = 1
    """micro-batches a step"""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"--optim.learning-rate {self.learning_rate:g} is not above 0; 1e-3 is usual.")
        for name, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("ema", 0, 1), ("final", 0, 1.0000001)):
            if not low <= getattr(self, name) < high:
                raise ConfigError(f"--optim.{name} {getattr(self, name):g} is not in [{low}, 1).")
        check_least(self, ("warmup", "clip", "weight_decay"), 0, "optim.")
        if self.accumulate < 1:
            raise ConfigError(f"--optim.accumulate {self.accumulate} is below 1.")


def check_sizes(config: Any, counts: Sequence[str], seeds: Sequence[str]) -> None:
    """Of an experiment's configuration. Raises ConfigError where a count is below 1 or a seed below 0, or where the
    micro-batches do not divide the batch.
    """
    check_least(config, counts, 1)
    check_least(config, seeds, 0)
    if config.batch_size % config.optim.accumulate:
        raise ConfigError(
            f"--optim.accumulate {config.optim.accumulate} does not divide --batch-size {config.batch_size}."
        )


def cross_entropy(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array | np.ndarray, "*batch"],
    weights: Float[Array | np.ndarray, "*batch"],
) -> Float[Array, ""]:
    """The weighted sum of -log p(target), in nats. Divide by `weights.sum()` for the mean."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - own) * weights)


def schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a fraction of its peak, by the step's number.

    cosine: Loshchilov & Hutter 2017, eq. 5, without restarts. stable: warm-up, stable, decay
    (Hu et al. 2024, sec. 4), linear over the last fifth.
    """
    warmup = min(optim.warmup, max(steps - 1, 0))
    rise = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
    if optim.schedule == "cosine":
        return optax.join_schedules(
            [rise, optax.cosine_decay_schedule(1.0, max(steps - warmup, 1), optim.final)], [warmup]
        )
    decay = max(steps // 5, 1)
    stable = max(steps - decay, warmup)
    fall = optax.linear_schedule(1.0, optim.final, decay)
    return optax.join_schedules([rise, optax.constant_schedule(1.0), fall], [warmup, stable])


def is_matrix(params: PyTree) -> PyTree:
    """True for what a product or a table is made of; by name, since stacked biases have two axes as well."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in ("kernel", "embedding"), params)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def direction(optim: OptimConfig) -> optax.GradientTransformation:
    """What the learning rate multiplies: clipped and rescaled gradients, before decay.

    adamw: Kingma & Ba 2015, alg. 1. muon: Jordan 2024, orthogonalised Nesterov momentum, for the blocks'
    matrices, scaled to the size of Adam's steps so that one learning rate serves both (Liu et al. 2025, eq. 4).
    """
    adam = optax.scale_by_adam(optim.beta1, optim.beta2)
    chosen = adam
    if optim.optimizer == "muon":
        muon = optax.chain(
            optax.trace(0.95, nesterov=True), optax.stateless(lambda updates, _: jax.tree.map(_muon_update, updates))
        )
        chosen = optax.partition({"muon": muon, "adam": adam}, _muon_labels)
    clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    return optax.chain(clip, chosen)


def orthogonalized(matrix: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """Its singular values brought near 1, to within 0.68 and 1.13, by five Newton-Schulz steps (Jordan 2024).

    Half the time of `optax.contrib.muon`'s on XLA:CPU.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    x = matrix / (jnp.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def _muon_update(update: Float[Array, "*layers rows columns"]) -> Float[Array, "*layers rows columns"]:
    one = orthogonalized if update.ndim == 2 else jax.vmap(orthogonalized)
    return 0.2 * max(update.shape[-2:]) ** 0.5 * one(update)


def _muon_labels(params: PyTree) -> PyTree:
    def label(path: tuple, _: Array) -> str:
        in_block = any("layers" in jax.tree_util.keystr((key,)) for key in path)
        return "muon" if in_block and _name(path) == "kernel" else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def make_init(
    model: nn.Module, inputs: Sequence[Any], optim: OptimConfig
) -> Callable[[Key[Array, ""], Hypers], TrainState]:
    """`(key, hypers) -> state` with parameters drawn from the key.

    inputs: any with which `model.init(key, *inputs)` makes all parameters.
    """

    def init(key: Key[Array, ""], hypers: Hypers) -> TrainState:
        params_key, key = jax.random.split(key)
        return train_state(model.init(params_key, *inputs)["params"], optim, key, hypers)

    return init


def train_state(params: PyTree, optim: OptimConfig, key: Key[Array, ""], hypers: Hypers) -> TrainState:
    """A state at step 0 with these parameters, drawn or pretrained."""
    return TrainState(params, direction(optim).init(params), params if optim.ema else None, key, hypers)


def logits_of(
    model: nn.Module, params: PyTree, batch: Tokens, dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "batch length vocab"]:
    """What the model says of the token after each of the inputs; with dropout where there is a key."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return cast(Array, model.apply({"params": params}, batch.inputs, deterministic=dropout_key is None, rngs=rngs))


def next_token(model: nn.Module) -> Objective:
    """The cross-entropy of the token after each of a batch of `Tokens`."""

    def objective(params: PyTree, batch: Tokens, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        logits = logits_of(model, params, batch, key)
        return cross_entropy(logits, batch.targets, batch.weights), jnp.sum(batch.weights)

    return objective


def make_step(
    objective: Objective, optim: OptimConfig, steps: int
) -> Callable[[TrainState, Any, Index], tuple[TrainState, Metrics]]:
    """One optimiser update on a batch: `(state, batch, index) -> (state, metrics)`.

    steps: length of the schedule.
    """
    transform, fraction = direction(optim), schedule(optim, steps)

    def whole(params: PyTree, batch: Any, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The objective; parameters of layers are made whole along `fsdp` where they are used, the others here."""
        return objective(used(params, leave=IN_LAYERS), batch, key)

    def step(state: TrainState, batch: Any, index: Index) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, index)
        (total, weight), grads = accumulated(whole, state.params, batch, key, optim.accumulate)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1), grads)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        rate = state.hypers.learning_rate * fraction(index)
        decay = state.hypers.weight_decay

        def updated(param: Array, update: Array, matrix: bool) -> Array:
            return param - rate * (update + decay * param if matrix else update)

        params = jax.tree.map(updated, state.params, updates, is_matrix(state.params))
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: optim.ema * e + (1 - optim.ema) * p, ema, params)
        metrics = {
            "train/loss": Mean(total, weight),
            "train/grad_norm": optax.tree.norm(grads),
            "train/learning_rate": rate,
        }
        return replace(state, params=params, opt_state=opt_state, ema=ema), metrics

    return step


def accumulated(
    objective: Objective, params: PyTree, batch: Any, key: Key[Array, ""], parts: int
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], PyTree]:
    """The sums that `objective` gives over the batch and the first one's gradient, `parts` micro-batches in turn.

    Sums, not means, are added, so that micro-batches of unequal weight count as they would in one batch.
    """
    value_and_grad = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        return value_and_grad(params, batch, key)
    split = micro_batches(batch, parts)

    def add(sums: tuple, part: tuple) -> tuple[tuple, None]:
        micro_batch, number = part
        return jax.tree.map(jnp.add, sums, value_and_grad(params, micro_batch, jax.random.fold_in(key, number))), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda leaf: leaf[0], split), key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, (split, jnp.arange(parts)))[0]


def summed(sums: Callable[[Any], PyTree], examples: PyTree, batch_size: int) -> PyTree:
    """What `sums` gives of all examples, as the sum of what it gives of batches.

    examples: a pytree of arrays with a leading axis of examples. The last batch is filled up with zeros, so what has a
        weight of 0 must not count.
    """
    count = len(jax.tree.leaves(examples)[0])
    batch_size = min(batch_size, count)
    batches = -(-count // batch_size)

    def cut(array: np.ndarray) -> Array:
        padding = [(0, batches * batch_size - count)] + [(0, 0)] * (array.ndim - 1)
        return jnp.asarray(np.pad(array, padding).reshape(batches, batch_size, *array.shape[1:]))

    return jax.tree.map(lambda parts: parts.sum(0), jax.lax.map(sums, jax.tree.map(cut, examples)))


def make_evaluate(
    model: nn.Module, validation: Tokens, batch_size: int, characters_per_token: float
) -> Callable[[TrainState, Key[Array, ""]], Metrics]:
    """Loss, perplexity, bits per character and accuracy over the whole of `validation`, `[windows, length]` each."""

    def evaluate(state: TrainState, key: Key[Array, ""]) -> Metrics:
        params = used(state.evaluated, leave=IN_LAYERS)

        def sums(batch: Tokens) -> tuple[Array, Array, Array]:
            logits = logits_of(model, params, batch)
            hits = (logits.argmax(-1) == batch.targets) * batch.weights
            return cross_entropy(logits, batch.targets, batch.weights), hits.sum(), batch.weights.sum()

        total, hits, weight = summed(sums, validation, batch_size)
        loss = total / weight
        return {
            "val/loss": Mean(total, weight),
            "val/perplexity": jnp.exp(loss),
            "val/bits_per_character": loss / jnp.log(2.0) / characters_per_token,
            "val/accuracy": Mean(hits, weight),
        }

    return evaluate
