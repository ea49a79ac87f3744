"""Laws of the losses: closed forms on both sides of nought, what the generator's gradient tends to, Dirac's game."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.objectives import OBJECTIVES, auxiliary_loss
from jaxarch.gan.regularizers import gradient_at, gradient_penalty


def sigma(x):
    return 1 / (1 + math.exp(-x))


def log(x):
    return math.log(x)


# The definitions in sigma, for one real and one generated logit.
DEFINED = {
    "minimax": (lambda r, f: -log(sigma(r)) - log(1 - sigma(f)), lambda f, r: log(1 - sigma(f))),
    "non_saturating": (lambda r, f: -log(sigma(r)) - log(1 - sigma(f)), lambda f, r: -log(sigma(f))),
    "least_squares": (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda f, r: 0.5 * (f - 1) ** 2),
    "wasserstein": (lambda r, f: f - r, lambda f, r: -f),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda f, r: -f),
    "relativistic": (lambda r, f: -log(sigma(r - f)), lambda f, r: -log(sigma(f - r))),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_the_definition_on_both_sides(name):
    real, fake = np.array([2.0, -1.5, 0.3, -4.0]), np.array([-0.7, 3.0, 0.1, -2.0])
    of_d, of_g = DEFINED[name]
    d = np.mean([of_d(r, f) for r, f in zip(real, fake, strict=True)])
    g = np.mean([of_g(f, r) for r, f in zip(real, fake, strict=True)])
    real, fake = jnp.asarray(real), jnp.asarray(fake)
    np.testing.assert_allclose(OBJECTIVES[name].discriminator(real, fake), d, rtol=1e-6)
    np.testing.assert_allclose(OBJECTIVES[name].generator(fake, real), g, rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_patches_count_as_samples(name):
    real, fake = jnp.arange(6.0).reshape(1, 2, 3) - 2, jnp.linspace(-1, 2, 6).reshape(1, 2, 3)
    for loss in OBJECTIVES[name][:2]:
        np.testing.assert_allclose(loss(real, fake), loss(real.reshape(6), fake.reshape(6)), atol=1e-6)


@pytest.mark.parametrize(
    "name, limit", [("minimax", 0.0), ("non_saturating", -1.0), ("relativistic", -1.0), ("wasserstein", -1.0)]
)
def test_the_generators_gradient_where_the_discriminator_wins(name, limit):
    """It vanishes in the minimax game, and in that alone."""
    gradient = jax.grad(OBJECTIVES[name].generator)(jnp.array([-40.0]), jnp.array([40.0]))
    np.testing.assert_allclose(gradient, limit, atol=1e-6)


def test_no_loss_overflows():
    for objective in OBJECTIVES.values():
        for sign in (1, -1):
            logits = jnp.array([sign * 1e4])
            values = [*objective[0:1], *objective[1:2]]
            assert all(jnp.isfinite(jax.grad(loss)(logits, -logits)).all() for loss in values)


def test_auxiliary_loss_is_the_cross_entropy():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    np.testing.assert_allclose(auxiliary_loss(logits, jnp.array([0, 1])), -(log(0.5) + log(0.1)) / 2, rtol=1e-6)


def dirac(name, penalty, gamma=1.0, rate=0.1, steps=1500, alternating=True):
    """Distances from the equilibrium, over the steps, of the game of Mescheder et al. 2018, def. 2.1: the data are 0,
    the generator says theta, the discriminator psi * x; gradient descent by turns.
    """
    objective = OBJECTIVES[name]
    real = jnp.zeros((1, 1))

    def d_loss(psi, theta):
        fake = theta.reshape(1, 1)

        def critic(x):
            return psi * x[:, 0]

        value = objective.discriminator(critic(real), critic(fake))
        if penalty == "r1":
            value += gamma / 2 * gradient_at(critic, real)
        if penalty == "gradient":
            value += gamma * gradient_penalty(critic, real, fake, jax.random.key(0))
        return value

    def g_loss(theta, psi):
        return objective.generator(psi * theta.reshape(1), jnp.zeros(1))

    def step(point, _):
        psi, theta = point
        psi = psi - rate * jax.grad(d_loss)(psi, theta)
        theta = theta - rate * jax.grad(g_loss)(theta, psi)
        return (psi, theta), jnp.hypot(psi, theta)

    return jax.jit(lambda: jax.lax.scan(step, (jnp.asarray(1.0), jnp.asarray(1.0)), None, length=steps)[1])()


@pytest.mark.parametrize("name", ["minimax", "non_saturating", "wasserstein", "relativistic"])
def test_diracs_game_circles_without_a_penalty_and_converges_with_r1(name):
    """Mescheder et al. 2018, lemmas 2.3 to 2.5 and theorem 4.1. Where the generator's gradient does not vanish, the
    circle narrows, but more slowly than any exponential.
    """
    assert dirac(name, "none")[-200:].min() > 0.2
    assert dirac(name, "r1")[-1] < 1e-3


def test_diracs_game_does_not_converge_with_the_gradient_penalty():
    """Ibid., lemma 2.8: about the equilibrium |psi| = 1 is asked for, where psi should be 0."""
    assert dirac("wasserstein", "gradient")[-200:].max() > 0.3
