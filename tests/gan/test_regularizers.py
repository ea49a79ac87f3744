"""Laws of the penalties: exact values for critics whose gradients are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxarch.gan.regularizers import (
    consistency,
    gradient_at,
    gradient_norms,
    gradient_penalty,
    path_length_penalty,
    path_lengths,
)

NORMAL = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)


def test_gradient_of_a_linear_critic_is_its_weights():
    weights = jnp.asarray(NORMAL[0])
    norms = gradient_norms(lambda x: jnp.sum(x * weights, axis=(1, 2, 3)), jnp.asarray(NORMAL))
    np.testing.assert_allclose(norms, np.full(5, np.sum(NORMAL[0] ** 2)), rtol=1e-5)


def test_gradient_of_a_quadratic_critic_differs_by_sample():
    norms = gradient_norms(lambda x: jnp.sum(x**2, axis=(1, 2, 3)) / 2, jnp.asarray(NORMAL))
    np.testing.assert_allclose(norms, np.sum(NORMAL**2, axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        gradient_at(lambda x: jnp.sum(x**2, axis=(1, 2, 3)) / 2, jnp.asarray(NORMAL)),
        np.mean(np.sum(NORMAL**2, axis=(1, 2, 3))),
        rtol=1e-5,
    )


def test_samples_may_be_of_several_arrays():
    samples = {"a": jnp.asarray(NORMAL), "b": jnp.asarray(2 * NORMAL)}
    norms = gradient_norms(lambda x: jnp.sum(x["a"] + 3 * x["b"], axis=(1, 2, 3)), samples)
    np.testing.assert_allclose(norms, np.full(5, 48 * (1 + 9)), rtol=1e-5)


def test_gradient_penalty_is_of_points_between():
    """Of |x|^2 / 2 the gradient is x, here of one number: between 2 and 6 its distance from 1 is uniform on [1, 5]."""
    real, fake = jnp.full((20_000, 1), 2.0), jnp.full((20_000, 1), 6.0)
    value = gradient_penalty(lambda x: jnp.sum(x**2, axis=1) / 2, real, fake, jax.random.key(0))
    np.testing.assert_allclose(value, (5**3 - 1) / 3 / 4, rtol=0.02)
    constant = gradient_penalty(lambda x: 0 * x[:, 0], real, fake, jax.random.key(0))
    np.testing.assert_allclose(constant, 1, rtol=1e-4)
    gradient = jax.grad(lambda a: gradient_penalty(lambda x: a * x[:, 0], real, fake, jax.random.key(0)))(0.0)
    assert jnp.isfinite(gradient)


def test_path_length_of_a_linear_generator_is_its_matrix():
    """E |J^T y|^2 is |J|^2 over the pixels, channels apart."""
    jacobian = np.random.default_rng(1).normal(size=(2, 6, 4 * 4 * 3)).astype(np.float32)  # layers, dim, pixels

    def synthesize(styles):
        return jnp.einsum("nld,ldp->np", styles, jacobian).reshape(-1, 4, 4, 3)

    styles = jnp.ones((4000, 2, 6))
    lengths = path_lengths(synthesize, styles, jax.random.key(0))
    np.testing.assert_allclose(jnp.mean(lengths**2), np.sum(jacobian**2) / 16 / 2, rtol=0.05)


def test_the_mean_of_lengths_moves_by_its_decay():
    value, mean = path_length_penalty(jnp.array([1.0, 3.0]), jnp.asarray(1.0), decay=0.5)
    assert (value, mean) == (((1 - 1.5) ** 2 + (3 - 1.5) ** 2) / 2, 1.5)


def test_consistency_is_a_squared_distance():
    assert consistency(jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])) == 2.5
