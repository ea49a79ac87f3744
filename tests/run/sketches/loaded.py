"""Fine-tuning: `init` reads weights from a file instead of drawing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxarch.run import ConfigError, Experiment, main


class Hypers(NamedTuple):
    learning_rate: float = 0.1


@flax.struct.dataclass
class State:
    params: dict
    start: dict
    key: jax.Array
    hypers: Hypers


@dataclass(frozen=True)
class Config:
    steps: int = 20
    batch_size: int = 2
    weights: str = ""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ConfigError("--weights FILE is needed.")


def experiment(config: Config) -> Experiment:
    import grain

    weights = load_file(config.weights)

    def init(key, hypers):
        params = jax.tree.map(jnp.asarray, weights)
        return State(params, params, key, hypers)

    def step(state, batch, index):
        def objective(params):
            return jnp.mean((params["w"].mean(0) - batch) ** 2)

        loss, grads = jax.value_and_grad(objective)(state.params)
        params = jax.tree.map(lambda p, g: p - state.hypers.learning_rate * g, state.params, grads)
        return state.replace(params=params), {"train/loss": loss}

    def evaluate(state, key):
        return {"val/loss": jnp.abs(state.params["w"].mean(0)).mean()}

    data = grain.MapDataset.source(np.eye(4, weights["w"].shape[1], dtype=np.float32)).seed(0).shuffle().repeat()
    return Experiment(init, step, evaluate, data, config.batch_size, hypers=Hypers())


if __name__ == "__main__":
    main(experiment, Config)
