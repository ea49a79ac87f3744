"""What a discriminator may know of a batch as a whole."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def minibatch_deviation(
    x: Float[Array, "batch height width features"], group: int = 4, maps: int = 1, eps: float = 1e-8
) -> Float[Array, "batch height width features_and_maps"]:
    """The features and, for each of the `maps` parts of them, one more: how much they differ within a group of samples.

    It is the standard deviation over the group, averaged over the part's features and all positions (Karras et al.
    2018, sec. 3). A generator that makes the same picture again and again is seen by it.

    group: at most so many samples, as many as divide the batch; they lie batch / group apart.
    """
    batch, height, width, features = x.shape
    group = next(number for number in range(min(group, batch), 0, -1) if batch % number == 0)
    grouped = x.reshape(group, batch // group, height, width, maps, features // maps)
    grouped = grouped.astype(jnp.promote_types(x.dtype, jnp.float32))
    deviation = jnp.sqrt(jnp.var(grouped, axis=0) + eps).mean(axis=(1, 2, 4))
    maps_of_each = jnp.tile(deviation, (group, 1)).astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(maps_of_each[:, None, None], (batch, height, width, maps))], axis=-1)
