"""What the discriminator sees, changed at random so that it cannot learn a small data set by heart.

An augmentation is a function `(key, pictures, probability) -> pictures`, differentiable, of pictures in [-1, 1],
applied to all that the discriminator sees in both players' steps. Its probability is held where the discriminator
does not overfit by `adapt`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxarch.run.protocol import Index


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
