"""Terms of the game that are asked for by a weight, with a discriminator that is a plane."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.gan.game import Augment, Game, GameConfig, Seen, discriminator_loss

PLANE = {"plane": jnp.array([1.5, -2.0])}


class Plane(nn.Module):
    """Points to their product with a vector."""

    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return samples @ self.param("plane", nn.initializers.normal(), (2,))


def loss(config, augment=None):
    real, fake = jax.random.normal(jax.random.key(0), (2, 5, 2))
    game = Game(Plane(), Plane(), config, augment)
    seen = Seen(real, None, jnp.ones(()))
    return real, discriminator_loss(game, PLANE, {}, fake, seen, jax.random.key(1), 1.0)[0]


def test_consistency_compares_real_samples_with_themselves_augmented():
    """Of samples that augmentation halves, the logits differ by a half."""
    halved = Augment(lambda key, samples, probability: samples / 2)
    real, without = loss(GameConfig(penalty="none"), halved)
    _, with_it = loss(GameConfig(penalty="none", consistency=3.0), halved)
    np.testing.assert_allclose(with_it - without, 3 * jnp.mean((real @ PLANE["plane"] / 2) ** 2), rtol=1e-5)
