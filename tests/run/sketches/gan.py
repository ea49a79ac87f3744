"""A generator and a discriminator on a circle of Gaussians: two optimisers, n critic updates, lazy R1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxarch.run import Experiment, Mean, main


class Hypers(NamedTuple):
    learning_rate: float = 1e-3
    gamma: float = 0.1


@flax.struct.dataclass
class State:
    generator: Any
    discriminator: Any
    average: Any
    g_opt: Any
    d_opt: Any
    key: jax.Array
    hypers: Hypers


@dataclass(frozen=True)
class Config:
    steps: int = 40
    batch_size: int = 16
    critics: int = 2
    every: int = 4
    """steps between penalties"""


class Net(nn.Module):
    out: int

    @nn.compact
    def __call__(self, x):
        dtype = jnp.zeros(()).dtype  # float64 where that is asked for
        return nn.Dense(self.out, param_dtype=dtype)(nn.tanh(nn.Dense(16, param_dtype=dtype)(x)))


def experiment(config: Config) -> Experiment:
    import grain

    angles = 2 * np.pi * np.arange(8) / 8
    centres = np.stack([np.cos(angles), np.sin(angles)], 1)
    real = (centres.repeat(50, 0) + 0.02 * np.random.default_rng(0).normal(size=(400, 2))).astype(np.float32)
    g, d = Net(2), Net(1)
    direction = optax.scale_by_adam(b1=0.0)

    def init(key, hypers):
        g_key, d_key, key = jax.random.split(key, 3)
        generator, discriminator = g.init(g_key, jnp.zeros((1, 4))), d.init(d_key, jnp.zeros((1, 2)))
        opts = direction.init(generator), direction.init(discriminator)
        return State(generator, discriminator, generator, *opts, key, hypers)

    def descend(params, opt, grads, hypers):
        updates, opt = direction.update(grads, opt)
        return jax.tree.map(lambda p, u: p - hypers.learning_rate * u, params, updates), opt

    def penalty(discriminator, x):
        grads = jax.vmap(jax.grad(lambda x: d.apply(discriminator, x)[0]))(x)
        return jnp.mean(jnp.sum(grads**2, -1))

    def step(state, batch, index):
        key = jax.random.fold_in(state.key, index)

        batch = batch.astype(jnp.zeros(()).dtype)

        def d_loss(discriminator, x, z):
            fake = g.apply(state.generator, z)
            value = jnp.mean(nn.softplus(-d.apply(discriminator, x)) + nn.softplus(d.apply(discriminator, fake)))
            due = index % config.every == 0
            r1 = jax.lax.cond(due, lambda: penalty(discriminator, x), lambda: jnp.zeros_like(value))
            return value + state.hypers.gamma / 2 * config.every * r1, (value, r1)

        discriminator, d_opt = state.discriminator, state.d_opt
        for n, x in enumerate(jnp.split(batch, config.critics)):
            z = jax.random.normal(jax.random.fold_in(key, n), (len(x), 4))
            grads, (value, r1) = jax.grad(d_loss, has_aux=True)(discriminator, x, z)
            discriminator, d_opt = descend(discriminator, d_opt, grads, state.hypers)

        def g_loss(generator):
            z = jax.random.normal(jax.random.fold_in(key, config.critics), (config.batch_size, 4))
            return jnp.mean(nn.softplus(-d.apply(discriminator, g.apply(generator, z))))

        loss, grads = jax.value_and_grad(g_loss)(state.generator)
        generator, g_opt = descend(state.generator, state.g_opt, grads, state.hypers)
        average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, state.average, generator)
        due = (index % config.every == 0).astype(r1.dtype)
        metrics = {"train/d_loss": value, "train/g_loss": loss, "train/r1": Mean(r1 * due, due)}
        return state.replace(
            generator=generator, discriminator=discriminator, average=average, g_opt=g_opt, d_opt=d_opt
        ), metrics

    def evaluate(state, key):
        fake = g.apply(state.average, jax.random.normal(key, (256, 4)))
        nearest = jnp.linalg.norm(fake[:, None] - centres, axis=-1).min(-1)
        return {"val/distance": nearest.mean()}

    data = grain.MapDataset.source(real).seed(0).shuffle().repeat()
    return Experiment(
        init,
        step,
        evaluate,
        data,
        config.batch_size * config.critics,
        monitor="val/distance",
        hypers=Hypers(),
        weights=("generator", "discriminator", "average"),
    )


if __name__ == "__main__":
    main(experiment, Config)
