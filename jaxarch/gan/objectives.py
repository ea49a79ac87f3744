"""What the two players of a GAN minimise, as functions of the discriminator's logits.

Each is a mean over the batch, and over patches where the discriminator judges patches. r is a logit of a real
sample, f one of a generated sample, sigma the logistic function; log sigma(x) = -softplus(-x).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import relu, softplus
from jaxtyping import Array, Float

Logits = Float[Array, "batch *patches"]
ObjectiveName = Literal["minimax", "non_saturating", "least_squares", "wasserstein", "hinge", "relativistic"]


class Objective(NamedTuple):
    """The losses of a game.

    discriminator: `(real_logits, fake_logits) -> loss`.
    generator: `(fake_logits, real_logits) -> loss`.
    pairs: the generator's loss reads the logits of real samples, each against the generated one of its place.
    """

    discriminator: Callable[[Logits, Logits], Float[Array, ""]]
    generator: Callable[[Logits, Logits], Float[Array, ""]]
    pairs: bool = False


def _logistic(real: Logits, fake: Logits) -> Float[Array, ""]:
    return jnp.mean(softplus(-real)) + jnp.mean(softplus(fake))


def _least_squares(real: Logits, fake: Logits) -> Float[Array, ""]:
    return (jnp.mean((real - 1) ** 2) + jnp.mean(fake**2)) / 2


OBJECTIVES: dict[ObjectiveName, Objective] = {
    # Goodfellow et al. 2014, eq. 1: E log sigma(r) + E log(1 - sigma(f)). The generator's gradient vanishes where
    # the discriminator wins.
    "minimax": Objective(_logistic, lambda fake, real: -jnp.mean(softplus(fake))),
    # The same, sec. 3: the generator maximises E log sigma(f). Its gradient tends to -1 where the discriminator wins.
    "non_saturating": Objective(_logistic, lambda fake, real: jnp.mean(softplus(-fake))),
    # Mao et al. 2017, eq. 9: targets 1 for real, 0 for generated, 1 for the generator.
    "least_squares": Objective(_least_squares, lambda fake, real: jnp.mean((fake - 1) ** 2) / 2),
    # Arjovsky et al. 2017, eq. 3: the discriminator must be kept Lipschitz, by clipping or a penalty.
    "wasserstein": Objective(lambda real, fake: jnp.mean(fake) - jnp.mean(real), lambda fake, real: -jnp.mean(fake)),
    # Lim & Ye 2017; Miyato et al. 2018, eq. 16 and 17.
    "hinge": Objective(
        lambda real, fake: jnp.mean(relu(1 - real)) + jnp.mean(relu(1 + fake)), lambda fake, real: -jnp.mean(fake)
    ),
    # Jolicoeur-Martineau 2019, sec. 4.2; Huang et al. 2024, eq. 2: each sample is judged against one of the other kind,
    # so no mode can be dropped at no cost.
    "relativistic": Objective(
        lambda real, fake: jnp.mean(softplus(fake - real)), lambda fake, real: jnp.mean(softplus(real - fake)), True
    ),
}


def auxiliary_loss(class_logits: Float[Array, "batch classes"], labels: jax.Array) -> Float[Array, ""]:
    """The cross-entropy of an auxiliary classifier (Odena et al. 2017, eq. 3).

    The discriminator minimises it on real samples, the generator on its own.
    """
    own = jnp.take_along_axis(class_logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(class_logits, axis=-1) - own)
