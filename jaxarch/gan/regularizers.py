"""Penalties that keep a game from diverging, each a function of a critic: samples -> logits.

A penalty is a mean over the batch without its weight; a half, where the paper has one, belongs to the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Critic = Callable[[PyTree], Float[Array, "batch *patches"]]


def gradient_norms(critic: Critic, samples: PyTree) -> Float[Array, " rows"]:
    """Squared norms of the critic's gradient at each sample: |d D(x) / d x|^2; at each pack, where it judges packs.

    Exact where a sample's logits depend on that sample alone; batch statistics mix in the others' logits.
    """

    def total(samples: PyTree) -> tuple[Array, Array]:
        logits = critic(samples)
        return jnp.sum(logits), logits

    gradients, logits = jax.grad(total, has_aux=True)(samples)
    squares = [jnp.sum(jnp.square(leaf).reshape(len(logits), -1), axis=1) for leaf in jax.tree.leaves(gradients)]
    return sum(squares[1:], squares[0])


def gradient_at(critic: Critic, samples: PyTree) -> Float[Array, ""]:
    """E |grad D(x)|^2: R1 at real samples (Mescheder et al. 2018, eq. 9), R2 at generated ones (eq. 10).

    Both there have the weight gamma / 2.
    """
    return jnp.mean(gradient_norms(critic, samples))


def gradient_penalty(critic: Critic, real: PyTree, fake: PyTree, key: Key[Array, ""]) -> Float[Array, ""]:
    """E (|grad D(x)| - 1)^2 at random points between real and generated samples (Gulrajani et al. 2017, eq. 3)."""
    batch = len(jax.tree.leaves(real)[0])

    def between(one: Array, other: Array) -> Array:
        share = jax.random.uniform(key, (batch,) + (1,) * (one.ndim - 1), one.dtype)
        return one + share * (other - one)

    norms = gradient_norms(critic, jax.tree.map(between, real, fake))
    return jnp.mean((jnp.sqrt(norms + 1e-12) - 1) ** 2)  # the root has no derivative at 0


def path_lengths(
    synthesize: Callable[[Float[Array, "batch layers dim"]], Float[Array, "batch height width channels"]],
    styles: Float[Array, "batch layers dim"],
    key: Key[Array, ""],
) -> Float[Array, " batch"]:
    """How far a picture moves with its styles: |J^T y| for y ~ N(0, I) / sqrt(pixels) (Karras et al. 2020, eq. 4).

    The norm is over a style's numbers, its square a mean over layers.
    """

    def projected(styles: Array) -> Array:
        pictures = synthesize(styles)
        height, width = pictures.shape[1:3]
        noise = jax.random.normal(key, pictures.shape, pictures.dtype) / (height * width) ** 0.5
        return jnp.sum(pictures * noise)

    gradients = jax.grad(projected)(styles)
    return jnp.sqrt(jnp.mean(jnp.sum(gradients**2, axis=2), axis=1))


def path_length_penalty(
    lengths: Float[Array, " batch"], mean: Float[Array, ""], decay: float = 0.01
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """E (length - a)^2 and the running mean a that these lengths have moved (Karras et al. 2020, eq. 4, app. B)."""
    mean = mean + decay * (jnp.mean(lengths) - mean)
    return jnp.mean((lengths - mean) ** 2), jax.lax.stop_gradient(mean)


def consistency(one: Float[Array, "batch *patches"], other: Float[Array, "batch *patches"]) -> Float[Array, ""]:
    """E (D(x) - D(T(x)))^2 of the logits of samples and of the same ones changed (Zhang et al. 2020, eq. 4)."""
    return jnp.mean((one - other) ** 2)
