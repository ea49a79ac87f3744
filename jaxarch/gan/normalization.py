"""Batch normalisation, plain and conditional on a class, with running statistics."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def column_sums(rows: Float[Array, "rows features"]) -> Float[Array, " features"]:
    """The sum over rows, as a product with ones: XLA:CPU sums columns with one core and few lanes."""
    return (jnp.ones((1, len(rows)), rows.dtype) @ rows)[0]


def chosen(
    table: Float[Array, "classes features"], labels: Int[Array | np.ndarray, " batch"] | None
) -> Float[Array, "batch features"]:
    """The row of each label, as a product: the gradient of a look-up is a loop.

    Raises ValueError where there are no labels.
    """
    if labels is None:
        raise ValueError("a conditional network needs labels.")
    return jax.nn.one_hot(labels, len(table), dtype=table.dtype) @ table


def batch_norm(
    x: Float[Array, "*batch features"],
    scale: Float[Array, "*#batch features"],
    bias: Float[Array, "*#batch features"],
    eps: float,
) -> tuple[Float[Array, "*batch features"], Float[Array, " features"], Float[Array, " features"]]:
    """scale (x - mean) / sqrt(variance + eps) + bias, the mean and the variance (Ioffe & Szegedy 2015, alg. 1).

    Both are over all axes but the last.
    """
    rows = x.reshape(-1, x.shape[-1])
    mean = column_sums(rows) / len(rows)
    centred = rows - mean
    variance = column_sums(centred * centred) / len(rows)
    normalized = (centred * jax.lax.rsqrt(variance + eps)).reshape(x.shape)
    return normalized * scale + bias, mean, variance


class BatchNorm(nn.Module):
    """`batch_norm` with parameters and running statistics of its own, in float32.

    With `train` by the batch's mean and variance, which move the running ones (`batch_stats`); else by the latter.

    decay: what a step keeps of the running statistics.
    classes: each has a scale and a bias of its own, chosen by the label (Dumoulin et al. 2017, eq. 5); 0: one for all.
    """

    classes: int = 0
    decay: float = 0.9
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *positions features"],
        labels: Int[Array | np.ndarray, " batch"] | None = None,
        train: bool = True,
    ) -> Float[Array, "batch *positions features"]:
        features = x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = (self.classes, features) if self.classes else (features,)
        scale = cast(Array, self.param("scale", nn.initializers.ones, shape))
        bias = cast(Array, self.param("bias", nn.initializers.zeros, shape))
        running_mean: Any = self.variable("batch_stats", "mean", jnp.zeros, (features,), wide.dtype)
        running_variance: Any = self.variable("batch_stats", "var", jnp.ones, (features,), wide.dtype)
        if self.classes:
            each = (len(x), *[1] * (x.ndim - 2), features)
            scale, bias = chosen(scale, labels).reshape(each), chosen(bias, labels).reshape(each)
        if not train:
            normalized = (wide - running_mean.value) * jax.lax.rsqrt(running_variance.value + self.eps)
            return (normalized * scale + bias).astype(x.dtype)
        y, mean, variance = batch_norm(wide, scale, bias, self.eps)
        if not self.is_initializing():
            # Of the variance the unbiased estimate, alg. 2; a batch of one number has none.
            count = x.size // features
            unbiased = variance * (count / max(count - 1, 1))
            running_mean.value = self.decay * running_mean.value + (1 - self.decay) * mean
            running_variance.value = self.decay * running_variance.value + (1 - self.decay) * unbiased
        return y.astype(x.dtype)
