"""A Vision Transformer that tells pictures apart.

    python -m experiments.vit
    python -m experiments.vit --data flowers --size 64 --model.patch 8 8 --augment.crop 6 --augment.flip True

Data: `--data` a folder with a subfolder of pictures for each class, or with `train` and `val` folders of such; by
default scikit-learn's handwritten digits (1,797 of 8 x 8 pixels). Where the folder does not say what is held out, a
fifth of each class is, at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.data.augmentation import cutmix, mixup, random_crop, random_flip
from jaxarch.data.images import Pictures, load_images, scaled
from jaxarch.run import ConfigError, Experiment, Mean, Metrics, main
from jaxarch.transformer.training import (
    PRECISIONS,
    Hypers,
    Objective,
    OptimConfig,
    TrainState,
    cross_entropy,
    make_init,
    make_step,
    summed,
)
from jaxarch.transformer.vision import VisionConfig, VisionTransformer, looked_at, vision

SHOWN = 10  # pictures in a row of a report


@dataclass(frozen=True)
class AugmentConfig:
    crop: int = 1
    """pixels by which a picture moves at most, along each axis"""
    flip: bool = False
    """mirror half of them left to right; not for digits"""
    mixup: float = 0.0
    """alpha of the shares in which two pictures are mixed (0: off)"""
    cutmix: float = 0.0
    """alpha of the share of a box that comes from another picture (0: off; with mixup one of them a step)"""
    smoothing: float = 0.1
    """the part of a target that all classes share"""

    def __post_init__(self) -> None:
        for name in ("crop", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--augment.{name} {getattr(self, name):g} is below 0; 0 is off.")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"--augment.smoothing {self.smoothing:g} is not in [0, 1); 0.1 is usual.")


@dataclass(frozen=True)
class Config:
    data: str | None = None
    """folder of pictures, a subfolder a class (default: scikit-learn's digits)"""
    size: int = 0
    """height and width that pictures are brought to (0: 8 for the digits, 64 for a folder)"""
    gray: bool = False
    """read a folder's pictures in grey"""
    held_out: float = 0.2
    """the fraction of each class held out"""
    split_seed: int = 0
    """seed of what is held out"""
    data_seed: int = 0
    """seed of the data's order"""
    steps: int = 2000
    """length of the run and of the schedule"""
    batch_size: int = 64
    """pictures a step"""
    precision: Literal["f32", "bf16"] = "f32"
    """of the computation; parameters are f32"""
    eval_pictures: int = 10_000
    """held-out pictures that an evaluation reads at most"""
    model: VisionConfig = VisionConfig()
    optim: OptimConfig = OptimConfig(weight_decay=0.1, beta2=0.99)
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_pictures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1.")
        for name in ("data_seed", "split_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 0.")
        if self.batch_size % self.optim.accumulate:
            raise ConfigError(
                f"--optim.accumulate {self.optim.accumulate} does not divide --batch-size {self.batch_size}."
            )


def experiment(config: Config) -> Experiment:
    data = load_images(
        config.data,
        size=config.size,
        gray=config.gray,
        held_out=config.held_out,
        split_seed=config.split_seed,
        most_held_out=config.eval_pictures,
        seed=config.data_seed,
        say=print,
    )
    model = vision(config.model, data.shape, data.classes, dtype=PRECISIONS[config.precision])

    def report(state: TrainState, key: Key[Array, ""], folder: Path) -> Metrics:
        draw(model, state.evaluated, data.validation, folder / "predictions.png")
        return {}

    return Experiment(
        init=make_init(model, model.inputs(), config.optim),
        step=make_step(classification(model, config.augment), config.optim, config.steps),
        evaluate=make_evaluate(model, data.validation, batch_size=256),
        data=data.train,
        batch_size=config.batch_size,
        report=report,
        hypers=Hypers(config.optim.learning_rate, config.optim.weight_decay),
        assets=data.save,
        weights=("params", "ema"),
    )


def classification(model: VisionTransformer, augment: AugmentConfig) -> Objective:
    """The cross-entropy of changed pictures against smoothed targets (Szegedy et al. 2016, sec. 7)."""

    def objective(params: PyTree, batch: Pictures, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        augment_key, dropout_key = jax.random.split(key)
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, len(model.labels)), augment.smoothing)
        pictures, targets = augmented(augment_key, scaled(batch.pixels), targets, augment)
        logits = model.apply({"params": params}, pictures, deterministic=False, rngs={"dropout": dropout_key})
        losses = optax.softmax_cross_entropy(logits, targets)
        return jnp.sum(losses * batch.weights), jnp.sum(batch.weights)

    return objective


def augmented(
    key: Key[Array, ""],
    pictures: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    augment: AugmentConfig,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    crop_key, flip_key, mixup_key, cutmix_key, coin_key = jax.random.split(key, 5)
    if augment.crop:
        pictures = random_crop(crop_key, pictures, augment.crop, fill=-1.0)  # black
    if augment.flip:
        pictures = random_flip(flip_key, pictures)
    mixed = []
    if augment.mixup:
        mixed.append(mixup(mixup_key, pictures, targets, augment.mixup))
    if augment.cutmix:
        mixed.append(cutmix(cutmix_key, pictures, targets, augment.cutmix))
    if len(mixed) == 2:
        heads = jax.random.bernoulli(coin_key)
        return jax.tree.map(lambda one, other: jnp.where(heads, one, other), *mixed)
    return mixed[0] if mixed else (pictures, targets)


def make_evaluate(model: VisionTransformer, validation: Pictures, batch_size: int):
    """Loss and accuracy over all held-out pictures."""

    def evaluate(state: TrainState, key: Key[Array, ""]) -> Metrics:
        def sums(batch: Pictures) -> tuple[Array, Array, Array]:
            logits = model.apply({"params": state.evaluated}, scaled(batch.pixels))
            hits = (logits.argmax(-1) == batch.labels) * batch.weights
            return cross_entropy(logits, batch.labels, batch.weights), hits.sum(), batch.weights.sum()

        total, hits, weight = summed(sums, validation, batch_size)
        return {"val/loss": Mean(total, weight), "val/accuracy": Mean(hits, weight)}

    return evaluate


# --- the report ---------------------------------------------------------------------------------


def draw(model: VisionTransformer, params: PyTree, pictures: Pictures, path: Path) -> None:
    """The first held-out pictures and those least well classified: what the model says, and what it looks at.

    Below each picture stands the rollout of its attention weights (`looked_at`), brightest where it is largest.
    """
    from matplotlib.figure import Figure

    @jax.jit
    def answers(params: PyTree, pixels: Array) -> tuple[Array, Array]:
        pictures = scaled(pixels)
        return jax.nn.softmax(model.apply({"params": params}, pictures)), looked_at(model, params, pictures)

    some = jax.tree.map(lambda leaf: leaf[:256], pictures)
    probabilities, maps = (np.asarray(part) for part in answers(params, jnp.asarray(some.pixels)))
    of_truth = probabilities[np.arange(len(some.labels)), some.labels]
    first, worst = np.arange(len(some.labels))[:SHOWN], np.argsort(of_truth, kind="stable")[:SHOWN]
    figure = Figure(figsize=(1.1 * SHOWN, 6), layout="constrained")
    axes = figure.subplots(4, SHOWN, squeeze=False)
    for row, numbers in ((0, first), (2, worst)):
        for column, number in enumerate(numbers):
            said, truth = probabilities[number].argmax(), some.labels[number]
            wrong = f", is {model.labels[truth]}" if said != truth else ""
            title = f"{model.labels[said]} {100 * probabilities[number, said]:.0f} %{wrong}"
            axes[row, column].set_title(title, fontsize=7, color="tab:red" if wrong else "black")
            axes[row, column].imshow(some.pixels[number].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row + 1, column].imshow(maps[number], cmap="magma", vmin=0)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("held-out pictures: the first ones, and those least well told apart", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(experiment, Config)
