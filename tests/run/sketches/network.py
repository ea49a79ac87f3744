"""A small network that a mesh cuts, its data counted as they are read: for tests of several devices and processes.

python -m tests.run.sketches.network --mesh data=2,fsdp=4
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxarch.run import ConfigError, Experiment, Mean, main
from jaxarch.run.mesh import BATCH, current, pinned, present
from jaxarch.run.protocol import Layout

WIDTH = 64  # of a layer: its 4,096 numbers are as many as are cut


class Hypers(NamedTuple):
    learning_rate: float = 0.1


@flax.struct.dataclass
class State:
    params: dict
    momentum: dict
    key: jax.Array
    hypers: Hypers


@dataclass(frozen=True)
class Config:
    steps: int = 12
    batch_size: int = 16
    reads: str = ""
    """folder in which each process writes the numbers of the examples that it reads"""
    pause: float = 0.0
    """seconds that reading an example takes"""


class Counted:
    """A dataset that notes what is read of it."""

    def __init__(self, data, config: Config):
        self.data, self.pause = data, config.pause
        self.path = Path(config.reads) / str(jax.process_index()) if config.reads else None

    def __getitem__(self, number: int):
        time.sleep(self.pause)
        if self.path:
            with self.path.open("a") as file:
                file.write(f"{number}\n")
        return self.data[number]


def hidden(x: jax.Array) -> jax.Array:
    """tanh, on a mesh in a shard_map as attention is: each device that of its own rows."""
    mesh = current()
    if mesh is None:
        return jnp.tanh(x)
    rows = PartitionSpec(present(BATCH, mesh))
    return jax.shard_map(jnp.tanh, in_specs=rows, out_specs=rows, check_vma=False)(x)


def experiment(config: Config) -> Experiment:
    import grain

    if os.environ.get("NETWORK_WITHOUT_DATA"):  # on one host of several
        raise ConfigError("there are no data; --data FILE would do.")
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(50, WIDTH)).astype(np.float32)
    held_out = rng.normal(size=(32, WIDTH)).astype(np.float32)

    def init(key, hypers):
        keys = jax.random.split(key)
        params = {name: jax.random.normal(key, (WIDTH, WIDTH)) / 8 for name, key in zip("ab", keys, strict=True)}
        return State(params, jax.tree.map(jnp.zeros_like, params), key, hypers)

    def step(state, batch, index):
        x, y = batch
        noise = jax.random.normal(jax.random.fold_in(state.key, index), x.shape) / 8
        noisy = pinned(x + noise, BATCH)

        def objective(params):
            return jnp.mean((hidden(noisy @ params["a"]) @ params["b"] - y) ** 2)

        loss, grads = jax.value_and_grad(objective)(state.params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
        params = jax.tree.map(lambda p, m: p - state.hypers.learning_rate * m, state.params, momentum)
        count = jnp.full_like(loss, len(y))
        return state.replace(params=params, momentum=momentum), {"train/loss": Mean(loss * count, count)}

    def evaluate(state, key):
        predicted = jnp.tanh(held_out @ state.params["a"]) @ state.params["b"]
        return {"val/loss": jnp.mean((predicted - held_out[:, ::-1]) ** 2)}

    def report(state, key, folder: Path):
        largest = jnp.max(state.params["a"])
        (folder / f"largest-{jax.process_index()}.txt").write_text(f"{largest:.3f}")
        return {"val/largest": largest}

    data = grain.MapDataset.source([(x, x[::-1].copy()) for x in xs]).seed(0).shuffle().repeat()
    layout = Layout(axes=("data", "fsdp"), state=((r"\.key$", ()),), batch=(BATCH,))
    return Experiment(
        init, step, evaluate, Counted(data, config), config.batch_size, report, hypers=Hypers(), layout=layout
    )


if __name__ == "__main__":
    main(experiment, Config)
