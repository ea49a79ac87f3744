"""A line fitted by gradient descent: the smallest experiment with data.

python -m tests.run.sketches.line --steps 100
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.run import ConfigError, Experiment, Mean, main


class Hypers(NamedTuple):
    learning_rate: float = 0.05


@flax.struct.dataclass
class State:
    params: dict
    ema: dict
    key: jax.Array
    hypers: Hypers


@dataclass(frozen=True)
class Config:
    steps: int = 60
    batch_size: int = 4
    dim: int = 3
    noise: float = 0.1
    nan_at: int = -1
    """the step whose update is made not finite"""
    nan_above: float = 1e9
    """a learning rate above this makes it so instead, for one member of a sweep"""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"--dim {self.dim} is below 1; 3 would do.")


def experiment(config: Config) -> Experiment:
    import grain

    xs = np.random.default_rng(0).normal(size=(30, config.dim)).astype(np.float32)
    examples = [(x, x.sum()) for x in xs]
    held_out = np.random.default_rng(1).normal(size=(20_000, config.dim)).astype(np.float32)

    def init(key, hypers):
        params = {"w": jax.random.normal(key, (config.dim,))}
        return State(params, params, key, hypers)

    def step(state, batch, index):
        x, y = batch
        noise = config.noise * jax.random.normal(jax.random.fold_in(state.key, index), y.shape)

        def objective(params):
            return jnp.mean((x @ params["w"] - y + noise) ** 2)

        loss, grads = jax.value_and_grad(objective)(state.params)
        rate = state.hypers.learning_rate
        rate = jnp.where((index == config.nan_at) & (rate > 0) | (rate > config.nan_above), jnp.nan, rate)
        params = jax.tree.map(lambda p, g: p - rate * g, state.params, grads)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params)
        # A lazily computed penalty: of weight 0 where it is not due, so that its mean is right.
        lazy = jax.lax.cond(
            index % 4 == 0,
            lambda: Mean(loss, jnp.ones_like(loss)),
            lambda: Mean(jnp.zeros_like(loss), jnp.zeros_like(loss)),
        )
        count = jnp.full_like(loss, len(y))
        return state.replace(params=params, ema=ema), {"train/loss": Mean(loss * count, count), "train/lazy": lazy}

    def evaluate(state, key):
        return {"val/loss": jnp.mean((held_out @ state.params["w"] - held_out.sum(1)) ** 2)}

    def report(state, key, folder: Path):
        (folder / "weights.txt").write_text(" ".join(f"{w:.3f}" for w in state.params["w"][:10]))
        return {"val/largest": state.params["w"].max()}

    data = grain.MapDataset.source(examples).seed(0).shuffle().repeat()
    return Experiment(init, step, evaluate, data, config.batch_size, report, hypers=Hypers(), weights=("params", "ema"))


if __name__ == "__main__":
    main(experiment, Config, {"wide": Config(dim=7)})
