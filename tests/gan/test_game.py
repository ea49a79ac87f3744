"""What each player minimises, with a discriminator simple enough to write its losses out."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.game import (
    Augment,
    Game,
    GameConfig,
    Seen,
    discriminator_loss,
    generator_loss,
    judge,
    path_length_loss,
    penalty,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(size=(2, 5, 3)).astype(np.float32)
LABELS, W = np.array([0, 2, 1, 1, 0]), np.array([0.5, -1.0, 2.0], np.float32)
SEEN = Seen(jnp.asarray(REAL), jnp.asarray(LABELS), jnp.ones(()))


class Judge(nn.Module):
    """A logit of w . x times one more than the label; the samples themselves are the classes' logits."""

    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return samples @ self.param("w", nn.initializers.zeros, (3,)) * (1 + condition), samples


class Bowl(nn.Module):
    """|x|^2 / 2, whose gradient is x, in few bits."""

    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return (jnp.sum(samples**2, axis=-1) / 2).astype(jnp.bfloat16)


def logits(samples, labels=LABELS):
    return samples @ W * (1 + labels)


def cross_entropy(class_logits):
    return np.mean(np.log(np.exp(class_logits).sum(1)) - class_logits[np.arange(5), LABELS])


RULES = GameConfig("wasserstein", "none", mismatch=0.3, auxiliary=0.7, consistency=0.2)
TWICE = Augment(lambda key, samples, probability: 2 * probability * samples)
PLAYED = Game(Judge(), Judge(), RULES, TWICE, lambda fake, real, labels: jnp.mean(fake * real) + labels[1])
PARAMS = {"w": jnp.asarray(W)}


def test_the_discriminators_loss_is_the_sum_of_its_terms():
    """Everything but the plain side of consistency is augmented; a label of another is that of the one before."""
    actual, (of_real, of_fake, _) = discriminator_loss(PLAYED, PARAMS, {}, jnp.asarray(FAKE), SEEN, KEY, 1.0)
    real, fake, wrong = logits(2 * REAL), logits(2 * FAKE), logits(2 * REAL, np.roll(LABELS, 1))
    expected = fake.mean() - real.mean() + 0.3 * (wrong.mean() - real.mean())
    expected += 0.7 * cross_entropy(2 * REAL) + 0.2 * np.mean((logits(REAL) - real) ** 2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(of_real.logits, real, rtol=1e-5)
    np.testing.assert_allclose(of_fake.logits, fake, rtol=1e-5)


@pytest.mark.parametrize("objective", ["wasserstein", "relativistic"])
def test_the_generators_loss_is_the_sum_of_its_terms(objective):
    played = PLAYED._replace(config=replace(RULES, objective=objective))
    actual = generator_loss(played, PARAMS, {}, jnp.asarray(FAKE), SEEN, jax.random.split(KEY))
    fake, real = logits(2 * FAKE), logits(2 * REAL)
    expected = -fake.mean() if objective == "wasserstein" else np.log1p(np.exp(real - fake)).mean()
    expected += 0.7 * cross_entropy(2 * FAKE) + np.mean(FAKE * REAL) + LABELS[1]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected", "error"),
    [("r1", 1 / 2, 1e-6), ("r2", 9 / 2, 1e-6), ("r1_r2", 5, 1e-6), ("gradient", 4 / 3, 0.1)],
)
def test_where_a_penalty_is_taken(name, expected, error):
    """The gradient is 1 long at real samples, 3 at generated ones, between them 1 + 2 u with u of [0, 1]."""
    played = Game(Bowl(), Bowl(), GameConfig(penalty=name))
    real = jnp.zeros((1000, 3)).at[:, 0].set(1)
    seen = Seen(real, None, jnp.ones(()))
    np.testing.assert_allclose(penalty(played, {}, {}, 3 * real, seen, KEY), expected, rtol=error)
    value, (_, _, penalized) = discriminator_loss(played, {}, {}, 3 * real, seen, KEY, 10.0)
    np.testing.assert_allclose(penalized, expected, rtol=error)
    # Relativistic: the logits are 1 / 2 and 9 / 2.
    np.testing.assert_allclose(value - 10 * penalized, np.log1p(np.exp(4)), rtol=1e-5)


def test_logits_are_in_the_precision_of_parameters():
    said = judge(Game(Bowl(), Bowl(), GameConfig()), {}, {}, jnp.asarray(REAL), SEEN, KEY)
    assert said.logits.dtype == jnp.float32


class Square(nn.Module):
    """A style is the latent, a picture of one pixel 3 style^2 / 2."""

    latent_dim: int = 1

    def mapping(self, latents, condition=None, *, train=True):
        return latents[:, None, :]

    def synthesis(self, styles, *, train=True):
        return 3 * styles[:, :, None] ** 2 / 2


def test_a_path_is_as_long_as_its_latent_and_its_noise_say():
    """|3 s y| of two independent normal numbers: 3 * 2 / pi on average, 9 squared; the mean moves by a hundredth."""
    played = Game(Square(), Bowl(), GameConfig())
    loss, (mean, length) = path_length_loss(played, {}, {}, None, 100_000, jnp.ones(()), KEY)
    np.testing.assert_allclose(length, 6 / np.pi, rtol=0.02)
    np.testing.assert_allclose(mean, 0.99 + 0.01 * length, rtol=1e-5)
    np.testing.assert_allclose(loss, 9 - 2 * mean * length + mean**2, rtol=0.03)
