"""Spectral normalisation: weights divided by their largest singular value (Miyato et al. 2018)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FIRST_STEPS = 15  # of power iteration, when the parameters are drawn


def power_iteration(
    matrix: Float[Array, "rows columns"], vector: Float[Array, " columns"], steps: int = 1, eps: float = 1e-12
) -> tuple[Float[Array, ""], Float[Array, " columns"]]:
    """The largest singular value as it stands after some steps, and the right singular vector (alg. 1).

    vector: an estimate of it. The gradient of the value is that with both singular vectors held fixed (eq. 11).
    """
    vector = _unit(vector, eps)
    left = _unit(matrix @ vector, eps)
    for _ in range(steps):
        vector = _unit(left @ matrix, eps)
        left = _unit(matrix @ vector, eps)
    left, vector = jax.lax.stop_gradient((left, vector))
    return left @ matrix @ vector, vector


def _unit(vector: Array, eps: float) -> Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), eps)


def spectral_kernel(
    module: nn.Module, kernel: Float[Array, "*axes features"], train: bool
) -> Float[Array, "*axes features"]:
    """A module's kernel over its largest singular value, as a matrix of `features` columns.

    The vector is kept in the module's collection `spectral`; with `train` one step moves it.
    """
    matrix = kernel.reshape(-1, kernel.shape[-1])

    def first() -> Array:
        drawn = jax.random.normal(module.make_rng("params"), matrix.shape[1:], matrix.dtype)
        return power_iteration(matrix, drawn, FIRST_STEPS)[1]

    vector: Any = module.variable("spectral", "vector", first)
    moves = train and not module.is_initializing()
    value, moved = power_iteration(matrix, vector.value, steps=1 if moves else 0)
    if moves:
        vector.value = moved
    return kernel / jnp.maximum(value, 1e-12)
