"""What the discriminator sees, changed at random so that it cannot learn a small data set by heart.

An augmentation is a function `(key, pictures, probability) -> pictures`, differentiable, of pictures in [-1, 1],
applied to all that the discriminator sees in both players' steps: `diff_augment` here, and `adaptive` with a
probability that `adapt` holds where the discriminator does not overfit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxarch.run.protocol import ConfigError, Index

# --- adaptive augmentation: its controller; its transforms are in `jaxarch.gan.adaptive` ----------


class AugmentationState(NamedTuple):
    """The probability, and since it last moved: the sum of the logits' signs on real pictures, and their number."""

    probability: Float[Array, "*replicas"]
    sign_sum: Float[Array, "*replicas"]
    count: Float[Array, "*replicas"]


def initial(probability: float | Float[Array, ""] = 0.0) -> AugmentationState:
    zero = jnp.zeros((), jnp.float32)
    return AugmentationState(jnp.asarray(probability, jnp.float32), zero, zero)


def adapt(
    state: AugmentationState,
    real_logits: Float[Array, "batch *patches"],
    index: Index,
    *,
    batch_size: int | None = None,
    target: float = 0.6,
    interval: int = 4,
    thousands: float = 500.0,
) -> AugmentationState:
    """The state after step `index`: every `interval` steps the probability goes one notch up or down.

    Up while the mean sign of the logits on (augmented) real pictures is above `target`, a sign of overfitting (Karras
    et al. 2020, "Training GANs with limited data", eq. 1 and sec. 3.1, r_t), else down.

    batch_size: pictures a step; by default there are as many as there are rows of logits (packed ones are fewer).
    thousands: of pictures in which the probability could rise from 0 to 1.
    """
    notch = (len(real_logits) if batch_size is None else batch_size) * interval / (thousands * 1000)
    sign_sum = state.sign_sum + jnp.sum(jnp.sign(real_logits.astype(jnp.float32)))
    count = state.count + real_logits.size
    moved = jnp.clip(state.probability + notch * jnp.sign(sign_sum / count - target), 0, 1)
    due = (index + 1) % interval == 0
    return AugmentationState(
        jnp.where(due, moved, state.probability), jnp.where(due, 0, sign_sum), jnp.where(due, 0, count)
    )


# --- differentiable augmentation ------------------------------------------------------------------


@dataclass(frozen=True)
class DiffAugmentConfig:
    """Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", sec. 3.2."""

    color: bool = True
    """brightness, saturation and contrast"""
    translation: float = 0.125
    """how far at most, as a fraction of the picture (0: off)"""
    cutout: float = 0.5
    """height and width of the hole, as a fraction of the picture (0: off)"""

    def __post_init__(self) -> None:
        for name in ("translation", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"DiffAugment's {name} {getattr(self, name):g} is not in [0, 1]; 0 is off.")


def diff_augment(
    config: DiffAugmentConfig = DiffAugmentConfig(),
) -> Callable[..., Float[Array, "batch height width channels"]]:
    """The augmentation; every picture is changed, whatever the probability.

    What comes in from outside, and the hole, is 0, a middle grey. Of RGBA the colours alone change.
    """

    def augment(
        key: Key[Array, ""],
        pictures: Float[Array, "batch height width channels"],
        probability: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "batch height width channels"]:
        color_key, translation_key, cutout_key = jax.random.split(key, 3)
        if config.color:
            colors = random_color(color_key, pictures[..., :3])
            pictures = jnp.concatenate([colors, pictures[..., 3:]], -1)
        if config.translation:
            pictures = random_translation(translation_key, pictures, config.translation)
        if config.cutout:
            pictures = random_cutout(cutout_key, pictures, config.cutout)
        return pictures

    return augment


def random_color(
    key: Key[Array, ""], pictures: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width channels"]:
    """Brighter by -0.5 to 0.5; then 0 to 2 times as far from each pixel's grey; then 0.5 to 1.5 times as far from the
    picture's mean.
    """
    shift, saturation, contrast = jax.random.uniform(key, (3, len(pictures), 1, 1, 1), pictures.dtype)
    pictures = pictures + (shift - 0.5)
    grey = jnp.mean(pictures, -1, keepdims=True)
    pictures = grey + 2 * saturation * (pictures - grey)
    mean = jnp.mean(pictures, (1, 2, 3), keepdims=True)
    return mean + (contrast + 0.5) * (pictures - mean)


def random_translation(
    key: Key[Array, ""], pictures: Float[Array, "batch height width channels"], fraction: float
) -> Float[Array, "batch height width channels"]:
    """By whole pixels, up to this fraction of each side."""
    batch, height, width, channels = pictures.shape
    down, across = (int(size * fraction + 0.5) for size in (height, width))
    padded = jnp.pad(pictures, [(0, 0), (down, down), (across, across), (0, 0)])
    corners = jax.random.randint(key, (batch, 2), 0, jnp.array([2 * down + 1, 2 * across + 1]))

    def cut(picture: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (*corner, 0), (height, width, channels))

    return jax.vmap(cut)(padded, corners)


def random_cutout(
    key: Key[Array, ""], pictures: Float[Array, "batch height width channels"], fraction: float
) -> Float[Array, "batch height width channels"]:
    """A hole of this fraction of each side, whose centre lies anywhere; what reaches beyond the edge is cut off."""
    height, width = pictures.shape[1:3]

    def inside(size: int, key: Key[Array, ""]) -> Array:
        hole = int(size * fraction + 0.5)
        # An even hole's centre lies between pixels, and so at their outer edges too.
        first = jax.random.randint(key, (len(pictures), 1), 0, size + 1 - hole % 2) - hole // 2
        place = jnp.arange(size)
        return (place >= first) & (place < first + hole)

    row_key, column_key = jax.random.split(key)
    hole = inside(height, row_key)[:, :, None] & inside(width, column_key)[:, None, :]
    return jnp.where(hole[..., None], 0, pictures)
