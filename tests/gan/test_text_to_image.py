"""Pictures from texts: the matcher's loss and measure by definition, what each player is told, and the third pair."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.gan import text_to_image, training
from jaxarch.gan.objectives import OBJECTIVES
from jaxarch.gan.text_to_image import (
    Captions,
    Discriminator,
    Generator,
    Matcher,
    Texts,
    make_drawing,
    make_init,
    make_step,
    matching_loss,
    r_precision,
    told,
)
from jaxarch.gan.training import GameConfig, OptimConfig, hypers
from jaxarch.run.protocol import ConfigError

RNG = np.random.default_rng(0)


def vectors(count: int, dim: int = 3, rng: np.random.Generator = RNG) -> jax.Array:
    drawn = rng.normal(size=(count, dim))
    return jnp.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), jnp.float32)


def pictures_of(pixels: np.ndarray) -> jax.Array:
    return jnp.asarray(pixels / 127.5 - 1, jnp.float32)


# --- the matcher --------------------------------------------------------------------------------


def test_the_matching_loss_is_its_definition():
    pictures, texts = vectors(5), vectors(5)
    logits = 7.0 * np.asarray(pictures, np.float64) @ np.asarray(texts, np.float64).T
    picture_to_text = [-np.log(np.exp(logits[i, i]) / np.exp(logits[i]).sum()) for i in range(5)]
    text_to_picture = [-np.log(np.exp(logits[i, i]) / np.exp(logits[:, i]).sum()) for i in range(5)]
    expected = (np.mean(picture_to_text) + np.mean(text_to_picture)) / 2
    np.testing.assert_allclose(matching_loss(pictures, texts, jnp.float32(7)), expected, rtol=1e-5)


@pytest.mark.parametrize("candidates", [2, 4, 6])
def test_r_precision_is_the_mean_over_all_draws(candidates):
    """Every set of other texts in turn."""
    rng = np.random.default_rng(0)  # of its own: others leave some hits, but not all, in any order of the tests
    pictures, texts = vectors(6, rng=rng), vectors(6, rng=rng)
    similar = np.asarray(pictures) @ np.asarray(texts).T
    hits = [
        all(similar[i, j] < similar[i, i] for j in others)
        for i in range(6)
        for others in itertools.combinations([j for j in range(6) if j != i], candidates - 1)
    ]
    assert 0 < np.mean(hits) < 1
    np.testing.assert_allclose(r_precision(pictures, texts, candidates), np.mean(hits), rtol=1e-4)


def test_r_precision_at_its_ends():
    texts = vectors(200, 16)
    np.testing.assert_allclose(r_precision(texts, texts), 1, rtol=1e-3)
    assert r_precision(-texts, texts) == 0
    same = jnp.repeat(texts[:1], 200, 0)
    assert r_precision(same, same) == 0  # nothing is told apart: no text is the nearest
    np.testing.assert_allclose(r_precision(vectors(2000, 64), vectors(2000, 64)), 0.01, atol=0.005)
    with pytest.raises(ValueError, match="300 candidates cannot be drawn of 200 texts"):
        r_precision(texts, texts, 300)


class Encoded(NamedTuple):
    hidden: Any


class Words(nn.Module):
    """An encoder of texts that looks each token up, and knows the mask as `segments`."""

    @nn.compact
    def __call__(self, tokens, segments):
        assert segments.shape == tokens.shape
        return Encoded(nn.Embed(9, 4, name="embedding")(tokens))


def test_a_text_is_read_without_its_padding():
    matcher = Matcher(Words(), 5, 2)
    texts = Texts(jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([[1, 1, 1], [1, 1, 0]]))
    params = matcher.init(jax.random.key(0), texts, method="read")["params"]
    said = matcher.apply({"params": params}, texts, method="read")
    table = np.asarray(params["text"]["embedding"]["embedding"])
    means = np.stack([table[[1, 2, 3]].mean(0), table[[4, 5]].mean(0)])
    dense = jax.tree.map(np.asarray, params["of_text"])
    expected = means @ dense["kernel"] + dense["bias"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(said, expected, atol=1e-5)
    np.testing.assert_allclose(told(matcher, params, texts), expected * 5**0.5, atol=1e-5)
    # Vectors in the place of tokens need no encoder.
    fixed, given = Matcher(None, 5, 2), Texts(jnp.asarray(table)[texts.tokens], texts.mask)
    rest = {name: leaves for name, leaves in params.items() if name != "text"}
    np.testing.assert_allclose(fixed.apply({"params": rest}, given, method="read"), expected, atol=1e-5)


# --- the players and their game -----------------------------------------------------------------


GENERATOR, DISCRIMINATOR, MATCHER = Generator(8, 3, 4, 2), Discriminator(2), Matcher(Words(), 5, 2)
GAME, OPTIM = GameConfig(mismatch=0.7, penalty="none"), OptimConfig(learning_rate=1e-2)
BATCH = Captions(
    RNG.integers(0, 256, (6, 8, 8, 3), np.uint8),
    Texts(jnp.asarray(RNG.integers(0, 9, (6, 3))), jnp.ones((6, 3), jnp.int32)),
)
STEP = jax.jit(make_step(GENERATOR, DISCRIMINATOR, MATCHER, GAME, OPTIM, 1e-2, 2, 10))


@pytest.fixture(scope="module")
def begun():
    return jax.jit(make_init(GENERATOR, DISCRIMINATOR, MATCHER, GAME, OPTIM, BATCH))(
        jax.random.key(0), hypers(GAME, OPTIM)
    )


def moved(one, other) -> bool:
    return any(
        bool((np.asarray(a) != np.asarray(b)).any())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_both_players_are_told_the_text(begun):
    latents = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    one, other = (jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32) for _ in range(2))
    draw = jax.jit(lambda said: GENERATOR.apply({"params": begun.generator}, latents, said))
    judge = jax.jit(lambda said: DISCRIMINATOR.apply({"params": begun.discriminator}, draw(one), said))
    assert draw(one).shape == (6, 8, 8, 3) and abs(draw(one)).max() <= 1 and judge(one).shape == (6,)
    assert abs(draw(one) - draw(other)).max() > 1e-4 and abs(judge(one) - judge(other)).max() > 1e-4
    # Of each picture its own text's.
    mixed = one.at[2].set(other[2])
    difference = np.abs(draw(mixed) - draw(one)).max((1, 2, 3))
    assert (difference > 1e-6).tolist() == [i == 2 for i in range(6)]


def test_the_matcher_learns_for_its_steps_alone_and_from_real_pairs(begun):
    states, said = [begun], []
    for index in range(3):
        state, metrics = STEP(states[-1], BATCH, index)
        states.append(state)
        said.append(metrics)
    assert [moved(a.matcher, b.matcher) for a, b in itertools.pairwise(states)] == [True, True, False]
    assert all(moved(a.generator, b.generator) for a, b in itertools.pairwise(states))
    assert [float(metrics["train/matching_loss"].weight) for metrics in said] == [1, 1, 0]
    pictures = pictures_of(BATCH.pixels)

    @jax.jit
    def loss(params):
        return matching_loss(*MATCHER.apply({"params": params}, pictures, BATCH.texts))

    np.testing.assert_allclose(said[0]["train/matching_loss"].total, loss(begun.matcher), rtol=1e-5)
    # Adam's first step is the rate, against the gradient's sign.
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(begun.matcher))
    pairs = zip(jax.tree.leaves(begun.matcher), jax.tree.leaves(states[1].matcher), grads, strict=True)
    for before, after, grad in pairs:
        sure = abs(grad) > 1e-5
        np.testing.assert_allclose((after - before)[sure], -1e-2 * np.sign(grad)[sure], rtol=2e-2)


def test_the_third_pair_is_a_real_picture_with_another_text(begun):
    """The discriminator's loss with and without it, from the logits; weights large enough that these differ."""
    begun = begun.replace(discriminator=jax.tree.map(lambda leaf: 6 * leaf, begun.discriminator))
    plain = jax.jit(make_step(GENERATOR, DISCRIMINATOR, MATCHER, replace(GAME, mismatch=0.0), OPTIM, 1e-2, 2, 10))
    # After the matcher's last step, so that it is the same before and after the game's.
    losses = [step(begun, BATCH, 5)[1]["train/d_loss"] for step in (STEP, plain)]
    said = told(MATCHER, begun.matcher, BATCH.texts)
    pictures = pictures_of(BATCH.pixels)

    @jax.jit
    def judge(texts):
        return DISCRIMINATOR.apply({"params": begun.discriminator}, pictures, texts)

    right, wrong = judge(said), judge(jnp.stack([said[i - 1] for i in range(6)]))
    assert abs(right - wrong).max() > 0.5
    expected = 0.7 * float(OBJECTIVES["relativistic"].discriminator(right, wrong))
    np.testing.assert_allclose(losses[0] - losses[1], expected, rtol=1e-3)


def test_pictures_are_of_the_averaged_generator(begun):
    state = begun.replace(average=jax.tree.map(lambda leaf: leaf + 0.1, begun.generator))
    latents = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    said = told(MATCHER, state.matcher, BATCH.texts)
    expected = GENERATOR.apply({"params": state.average}, latents, said, train=False)
    np.testing.assert_allclose(make_drawing(GENERATOR, MATCHER)(state, latents, BATCH.texts), expected, atol=1e-6)
    assert set(text_to_image.WEIGHTS) == {*training.WEIGHTS, "matcher"} <= set(vars(state))


def test_mismatch_is_of_conditional_games():
    with pytest.raises(ConfigError, match="--game.mismatch is of conditional games"):
        training.check_batch(4, GAME)
    training.check_batch(4, GAME, conditional=True)
    with pytest.raises(ConfigError, match="--game.mismatch -1 is not 0 or above"):
        GameConfig(mismatch=-1.0)
