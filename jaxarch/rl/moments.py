"""Running means and variances of what is observed, as explicit state."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Moments(NamedTuple):
    """count: of values seen; squares: the sum of squared deviations from the mean."""

    count: Float[Array, ""]
    mean: Float[Array, "*shape"]
    squares: Float[Array, "*shape"]

    @property
    def variance(self) -> Float[Array, "*shape"]:
        """1 before anything was seen."""
        return jnp.where(self.count > 0, self.squares / jnp.maximum(self.count, 1), 1.0)


def nothing_seen(shape: tuple[int, ...] = ()) -> Moments:
    return Moments(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))


def updated(moments: Moments, values: Float[Array, "*batch_and_shape"]) -> Moments:
    """With these values too, `[..., *shape]` (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    axes = tuple(range(values.ndim - moments.mean.ndim))
    number = float(values.size // max(moments.mean.size, 1))
    mean = values.mean(axes)
    squares = jnp.square(values - mean).sum(axes)
    count = moments.count + number
    apart = mean - moments.mean
    return Moments(
        count,
        moments.mean + apart * number / count,
        moments.squares + squares + jnp.square(apart) * moments.count * number / count,
    )


def normalized(
    moments: Moments, values: Float[Array, "*batch_and_shape"], limit: float = 10.0
) -> Float[Array, "*batch_and_shape"]:
    """In standard deviations from the mean, at most `limit`."""
    return jnp.clip((values - moments.mean) / jnp.sqrt(moments.variance + 1e-8), -limit, limit)
