"""A GAN on mixtures whose modes can be counted.

python -m experiments.gan_toy --replicas 10
python -m experiments.gan_toy --data grid --game.objective non_saturating --game.penalty none --replicas 10
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jaxarch.gan import toy
from jaxarch.gan.training import (
    WEIGHTS,
    GameConfig,
    GANState,
    OptimConfig,
    check_batch,
    hypers,
    latents_of,
    make_init,
    make_sampler,
    make_step,
)
from jaxarch.run import ConfigError, Experiment, Index, Metrics, main

MIXTURES = {"ring": toy.ring(), "grid": toy.grid()}
COUNTED = 2500  # samples of an evaluation
REAL = 1  # what is folded into a step's key to draw its real samples


@dataclass(frozen=True)
class Config:
    data: Literal["ring", "grid"] = "ring"
    """8 Gaussians on a circle, or 25 on a square"""
    data_seed: int = 0
    """seed of the data"""
    steps: int = 4000
    """length of the run and of the schedule"""
    batch_size: int = 256
    """samples that a player sees a step"""
    latents: int = 2
    """numbers that a sample is made of"""
    width: int = 128
    """units of a hidden layer"""
    layers: int = 3
    """hidden layers of each network"""
    game: GameConfig = GameConfig(gamma=0.1)
    optim: OptimConfig = OptimConfig(learning_rate=1e-3, final=0.1, average=50)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "latents", "width", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1.")
        check_batch(self.batch_size, self.game)


def experiment(config: Config) -> Experiment:
    mixture = MIXTURES[config.data]
    generator = generator_of(config)
    discriminator = toy.PointDiscriminator(config.width, config.layers)
    examples = np.zeros((config.game.pack, 2), np.float32)
    played = make_step(generator, discriminator, config.game, config.optim, lambda points: (points, None), config.steps)

    def step(state: GANState, batch: None, index: Index) -> tuple[GANState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, index), REAL)
        return played(state, mixture.samples(key, config.batch_size * config.game.critics), index)

    sample = make_sample(config)

    def evaluate(state: GANState, key: Key[Array, ""]) -> Metrics:
        modes = toy.modes_of(sample(state, key), mixture)
        return {
            "val/modes": modes.found,
            "val/high_quality": modes.high_quality,
            "val/reverse_kl": modes.reverse_kl,
        }

    return Experiment(
        init=make_init(generator, discriminator, config.game, config.optim, examples),
        step=step,
        evaluate=evaluate,
        report=make_report(jax.jit(sample), mixture),
        monitor="val/reverse_kl",
        hypers=hypers(config.game, config.optim),
        weights=WEIGHTS if config.optim.average else WEIGHTS[:2],
    )


def generator_of(config: Config) -> toy.PointGenerator:
    return toy.PointGenerator(config.latents, config.width, config.layers)


def make_sample(config: Config) -> Callable[[GANState, Key[Array, ""]], Float[Array, "count 2"]]:
    """As many generated points as an evaluation counts."""
    generator = generator_of(config)
    sample = make_sampler(generator)
    return lambda state, key: sample(state, latents_of(generator, key, COUNTED))


def make_report(
    sample: Callable[[GANState, Key[Array, ""]], Float[Array, "count 2"]], mixture: toy.Mixture
) -> Callable[[GANState, Key[Array, ""], Path], Metrics]:
    """Draws generated points over the mixture's."""

    def report(state: GANState, key: Key[Array, ""], folder: Path) -> Metrics:
        draw(np.asarray(sample(state, key)), mixture, folder / "points.png")
        return {}

    return report


def draw(points: np.ndarray, mixture: toy.Mixture, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="tight")
    axes = figure.subplots()
    axes.scatter(*points.T, s=2, alpha=0.3, color="tab:blue")
    axes.scatter(*mixture.centres.T, s=40, marker="x", color="tab:orange", linewidths=1)
    reach = 1.5 * np.abs(mixture.centres).max()
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(experiment, Config)
