"""The controller against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan.augmentation import AugmentationState, adapt, initial

# --- the controller -----------------------------------------------------------------------------


def test_the_probability_follows_the_definition():
    """Steps of 3 pictures with logits of either sign and of 0, written out in plain numbers."""
    rng = np.random.default_rng(0)
    logits = rng.choice([-2.0, -0.1, 0.0, 0.3, 5.0], p=[0.1, 0.1, 0.1, 0.2, 0.5], size=(60, 3)).astype(np.float32)
    step = jax.jit(lambda state, logits, index: adapt(state, logits, index, target=0.4, interval=5, thousands=0.06))
    state, probability, signs = initial(0.3), 0.3, []
    seen = set()
    for index, row in enumerate(logits):
        state = step(state, row, index)
        signs += list(np.sign(row))
        if index % 5 == 4:
            before, probability = probability, min(max(probability + 3 * 5 / 60 * np.sign(np.mean(signs) - 0.4), 0), 1)
            seen.add(np.sign(probability - before))
            signs = []
        np.testing.assert_allclose(state, (probability, sum(signs), len(signs)), rtol=1e-5, atol=1e-6)
    assert {-1, 1} <= seen


@pytest.mark.parametrize(("logit", "start", "end"), [(1.0, 0.0, 1.0), (-1.0, 1.0, 0.0)])
def test_the_probability_rises_and_falls_between_0_and_1(logit, start, end):
    """By 64 * 4 / 500,000 each 4 steps as by default, so that it takes 500,000 pictures from 0 to 1."""
    logits = jnp.full((64,), logit)
    state = jax.jit(lambda: jax.lax.fori_loop(0, 100, lambda i, s: adapt(s, logits, i), initial(start)))()
    np.testing.assert_allclose(state.probability, start + np.sign(end - start) * 25 * 64 * 4 / 500_000, rtol=1e-4)
    state = jax.jit(lambda: jax.lax.fori_loop(0, 8000, lambda i, s: adapt(s, logits, i), initial(start)))()
    assert state.probability == end


def test_a_mean_sign_below_the_target_is_no_overfitting():
    """3 of 4 logits above 0 have the mean sign 0.5, 5 of 6 have 0.67: by patches as by pictures."""
    for shape, negatives, direction in [((4,), 1, -1), ((6,), 1, 1), ((1, 2, 2), 1, -1), ((2, 3, 1), 1, 1)]:
        logits = np.ones(shape, np.float32)
        logits.flat[:negatives] = -1
        state = adapt(initial(0.5), jnp.asarray(logits), jnp.int32(3), batch_size=10)
        np.testing.assert_allclose(state.probability, 0.5 + direction * 40 / 500_000, rtol=1e-6)


def test_each_replica_has_its_own_probability():
    state = jax.vmap(lambda p: initial(p))(jnp.array([0.2, 0.8]))
    logits = jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    found = jax.jit(jax.vmap(lambda s, x: adapt(s, x, jnp.int32(3), thousands=0.1)))(state, logits)
    assert isinstance(found, AugmentationState)
    np.testing.assert_allclose(found.probability, [0.28, 0.72], rtol=1e-6)
