"""The smallest GAN of pictures: digits of 4 x 4 pixels, each network one layer; by labels where `labels` is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxarch.data.images import load_images, scaled
from jaxarch.gan.finished import save_description
from jaxarch.gan.training import WEIGHTS, GameConfig, OptimConfig, hypers, make_init, make_sampler, make_step
from jaxarch.run import Experiment, main


class Dots(nn.Module):
    """Its mean brightness is kept by a collection, and its pictures can be drawn towards grey."""

    latent_dim: int
    shape: tuple[int, int, int]
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents, condition=None, *, train=True, truncation=1.0):
        x = latents.astype(self.dtype)
        if self.classes:
            x = x + nn.Embed(self.classes, self.latent_dim, name="embed")(condition)
        x = nn.Dense(self.shape[0] * self.shape[1] * self.shape[2], name="out")(x)
        seen = self.variable("averages", "seen", jnp.zeros, ())
        if train:
            seen.value = seen.value + 1
        return truncation * jnp.tanh(x + 1e-3 * seen.value).reshape(-1, *self.shape)


class Plain(nn.Module):
    """Without truncation."""

    latent_dim: int
    shape: tuple[int, int, int]
    classes: int = 0

    @nn.compact
    def __call__(self, latents, condition=None, *, train=True):
        return jnp.tanh(nn.Dense(self.shape[0] * self.shape[1], name="out")(latents)).reshape(-1, *self.shape)


class Judge(nn.Module):
    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return nn.Dense(1, name="out")(samples.reshape(len(samples), -1))[:, 0]


@dataclass(frozen=True)
class Config:
    steps: int = 2
    batch_size: int = 8
    labels: bool = False
    plain: bool = False
    average: float = 0.02


def experiment(config: Config) -> Experiment:
    data = load_images("digits", size=4)
    generator = (Plain if config.plain else Dots)(3, data.shape, 10 if config.labels else 0)
    game, optim = GameConfig("non_saturating", "none"), OptimConfig(0.1, average=config.average, ramp=0.0)
    samples = jnp.zeros((2, *data.shape))
    condition = jnp.zeros(2, jnp.int32) if config.labels else None

    def assets(folder):
        data.save(folder)
        save_description(folder, generator, "labels" if config.labels else "none")

    sample = make_sampler(generator)

    def prepare(batch):
        return scaled(batch.pixels), batch.labels if config.labels else None

    def evaluate(state, key):
        return {"val/loss": jnp.mean(sample(state, jnp.zeros((2, 3)), condition))}

    return Experiment(
        init=make_init(generator, Judge(), game, optim, samples, condition),
        step=make_step(generator, Judge(), game, optim, prepare),
        evaluate=evaluate,
        data=data.train,
        batch_size=config.batch_size,
        hypers=hypers(game, optim),
        assets=assets,
        weights=WEIGHTS,
    )


if __name__ == "__main__":
    main(experiment, Config)
