"""Distributions of returns against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.rl.distributional import projected, quantile_loss


def shared_out(probabilities, atoms, support):
    """Atom by atom, as Bellemare et al. write it."""
    apart = support[1] - support[0]
    out = np.zeros(len(support))
    for probability, atom in zip(probabilities, atoms, strict=True):
        place = (np.clip(atom, support[0], support[-1]) - support[0]) / apart
        below, above = int(np.floor(place)), int(np.ceil(place))
        if below == above:
            out[below] += probability
        else:
            out[below] += probability * (above - place)
            out[above] += probability * (place - below)
    return out


def test_projection_shares_each_atom_between_its_neighbours():
    """Inside, at the points themselves, and beyond both ends."""
    rng = np.random.default_rng(0)
    support = np.linspace(-2, 3, 11)
    probabilities = rng.dirichlet(np.ones(11), size=40)
    atoms = 1.3 * rng.normal(size=(40, 1)) + rng.uniform(-1, 1, (40, 1)) * support
    atoms[0], atoms[1], atoms[2] = support, 10.0, -10.0
    got = projected(*(jnp.asarray(x, jnp.float32) for x in (probabilities, atoms, support)))
    wanted = [shared_out(p, a, support) for p, a in zip(probabilities, atoms, strict=True)]
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(got[0], probabilities[0], atol=1e-6)


def test_quantile_loss_is_its_double_sum():
    rng = np.random.default_rng(0)
    quantiles, samples = rng.normal(size=(3, 5)), 2 * rng.normal(size=(3, 7))
    levels = rng.uniform(size=(3, 5))
    for kappa in (1.0, 0.3, 0.0):
        wanted = np.zeros(3)
        for b in range(3):
            for i in range(5):
                for sample in samples[b]:
                    error = sample - quantiles[b, i]
                    if kappa == 0:
                        huber = abs(error)
                    elif abs(error) <= kappa:
                        huber = error**2 / 2 / kappa
                    else:
                        huber = (kappa * (abs(error) - kappa / 2)) / kappa
                    wanted[b] += abs(levels[b, i] - float(error < 0)) * huber / 7
        got = quantile_loss(*(jnp.asarray(x, jnp.float32) for x in (quantiles, levels, samples)), kappa)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_what_minimises_the_loss_are_the_quantiles():
    """Of skewed samples, by gradient descent."""
    samples = np.random.default_rng(0).exponential(size=400).astype(np.float32)
    levels = (np.arange(8) + 0.5) / 8

    def descend(_, quantiles):
        return quantiles - 0.02 * jax.grad(quantile_loss)(quantiles, jnp.asarray(levels), jnp.asarray(samples), 0.0)

    got = jax.jit(lambda: jax.lax.fori_loop(0, 3000, descend, jnp.zeros(8)))()
    np.testing.assert_allclose(got, np.quantile(samples, levels), atol=0.05)
