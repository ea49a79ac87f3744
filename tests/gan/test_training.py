"""Laws of the step: it is the game as played by hand, turn by turn; what is lazy, averaged, packed, looked ahead."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxarch.gan.augmentation import AugmentationState
from jaxarch.gan.objectives import OBJECTIVES
from jaxarch.gan.training import (
    Augment,
    GameConfig,
    OptimConfig,
    averaged,
    check_batch,
    decay_of_average,
    descend,
    direction,
    hypers,
    make_init,
    make_sampler,
    make_step,
    packed,
)
from jaxarch.run import ConfigError, Mean

BATCH = 6
RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(40, BATCH, 2)) + 1
OFFSETS = RNG.normal(size=(BATCH, 2))


class Shift(nn.Module):
    """The same points whatever the latents: so a game can be played again by hand."""

    latent_dim: int = 1

    @nn.compact
    def __call__(self, latents, condition=None, *, train=True):
        dtype = jnp.zeros(()).dtype
        scale = self.param("scale", nn.initializers.ones, (2,), dtype)
        bias = self.param("bias", nn.initializers.zeros, (2,), dtype)
        return scale * OFFSETS.astype(dtype)[: len(latents)] + bias


class Critic(nn.Module):
    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        dtype = jnp.zeros(()).dtype
        hidden = nn.tanh(nn.Dense(8, param_dtype=dtype)(samples))
        return nn.Dense(1, param_dtype=dtype)(hidden)[:, 0]


GENERATOR, CRITIC = Shift(), Critic()
OPTIM = OptimConfig(learning_rate=0.02, ratio=2.0, beta1=0.3, beta2=0.9, final=0.3, average=0.02, ramp=2.0)


def played(game, optim=OPTIM, steps=5, augment=None):
    """States and metrics of our step."""
    step = jax.jit(make_step(GENERATOR, CRITIC, game, optim, lambda batch: (batch, None), steps, augment))
    states, said = [begun(game, optim, augment)], []
    for index in range(steps):
        batch = jnp.asarray(REAL[index * game.critics : (index + 1) * game.critics].reshape(-1, 2))
        state, metrics = step(states[-1], batch, jnp.asarray(index))
        states.append(state)
        said.append(metrics)
    return states, said


def begun(game, optim=OPTIM, augment=None):
    init = make_init(GENERATOR, CRITIC, game, optim, np.zeros((game.pack, 2)), None, augment)
    return init(jax.random.key(0), jax.tree.map(jnp.asarray, hypers(game, optim)))


def cosine(index, steps, final):
    return final + (1 - final) * (1 + np.cos(np.pi * index / steps)) / 2


def by_hand(game, optim, first, steps=5):
    """The same game in the plainest way: optax's own Adam, gradients of losses written out, no conditionals."""
    objective = OBJECTIVES[game.objective]

    def adam(every=1, **options):
        """At a rate of 1: rates are applied below."""
        share = every / (every + 1) if every > 1 else 1.0
        return optax.adam(1.0, b1=optim.beta1**share, b2=optim.beta2**share, eps=optim.eps, **options), share

    def descend(tx, params, opt, grads, rate):
        updates, opt = tx.update(grads, opt)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), opt

    d_tx, d_share = adam(game.penalty_every if game.penalty != "none" else 1)
    (g_tx, _), (ahead_tx, _) = adam(), adam(eps_root=1e-12)
    g, d, average = first.generator, first.discriminator, first.generator
    g_opt, d_opt = g_tx.init(g), d_tx.init(d)

    def critic(d, x):
        return CRITIC.apply({"params": d}, packed(x, game.pack))

    def squared(d, x):
        one = jax.vmap(jax.grad(lambda x: critic(d, x)[0]))(x.reshape(-1, game.pack, 2))
        return jnp.mean(jnp.sum(one**2, axis=(1, 2)))

    def penalty(d, real, fake):
        return sum(squared(d, x) / 2 for x, name in ((real, "r1"), (fake, "r2")) if name in game.penalty)

    def d_loss(d, real, fake, gamma):
        value = objective.discriminator(critic(d, real), critic(d, fake))
        if game.penalty != "none" and game.penalty_every == 1:
            value += gamma * penalty(d, real, fake)
        return value

    def g_loss(g, d, real, rate, gamma):
        fake = GENERATOR.apply({"params": g}, jnp.zeros((BATCH, 1)))
        opponent, opt = d, ahead_tx.init(d)
        for _ in range(game.unroll):
            opponent, opt = descend(ahead_tx, opponent, opt, jax.grad(d_loss)(opponent, real, fake, gamma), rate)
        return objective.generator(critic(opponent, fake), critic(opponent, real))

    d_gradient, g_gradient = (jax.jit(jax.grad(of)) for of in (d_loss, g_loss))
    penalized, penalties = jax.jit(jax.value_and_grad(penalty)), []
    for index in range(steps):
        rate = optim.learning_rate * cosine(index, steps, optim.final)
        gamma = game.gamma * cosine(index, steps, game.gamma_final)
        for n in range(game.critics):
            real = REAL[index * game.critics + n]
            fake = GENERATOR.apply({"params": g}, jnp.zeros((BATCH, 1)))
            grads = d_gradient(d, real, fake, gamma)
            d, d_opt = descend(d_tx, d, d_opt, grads, rate * optim.ratio * d_share)
            if game.clip:
                d = jax.tree.map(lambda p: jnp.clip(p, -game.clip, game.clip), d)
        if game.penalty != "none" and game.penalty_every > 1 and index % game.penalty_every == 0:
            value, grads = penalized(d, real, fake)
            penalties.append(value)
            weight = gamma * game.penalty_every
            grads = jax.tree.map(lambda leaf, w=weight: w * leaf, grads)
            d, d_opt = descend(d_tx, d, d_opt, grads, rate * optim.ratio * d_share)
        grads = g_gradient(g, d, real, rate * optim.ratio, gamma)
        g, g_opt = descend(g_tx, g, g_opt, grads, rate)
        half_life = min(1000 * optim.average, optim.ramp * index * BATCH)
        keep = 0.5 ** (BATCH / half_life) if half_life else 0.0
        average = optax.incremental_update(g, average, 1 - keep)
    return g, d, average, penalties


PLAIN = GameConfig(penalty="none")
GAMES = {
    "hinge": replace(PLAIN, objective="hinge"),
    "relativistic": PLAIN,
    "clip": replace(PLAIN, objective="wasserstein", clip=0.2, critics=3),
    "r1": GameConfig(penalty="r1", gamma=2.0, gamma_final=0.1),
    "r2": GameConfig(penalty="r2", gamma=2.0, objective="non_saturating"),
    "lazy": GameConfig(gamma=0.5, gamma_final=0.1, penalty_every=3),
    "critics": GameConfig(gamma=0.5, critics=2),
    "reused": GameConfig(reuse_fakes=True, critics=2),
    "packed": GameConfig(pack=2, objective="non_saturating"),
    "unrolled": GameConfig(penalty="none", objective="non_saturating", unroll=2),
}


@pytest.mark.parametrize("name", GAMES)
def test_the_step_is_the_game_by_hand(name):
    with jax.enable_x64(True):
        states, said = played(GAMES[name])
        g, d, average, penalties = by_hand(GAMES[name], OPTIM, states[0])
        actual = states[-1].generator, states[-1].discriminator, states[-1].average
        # Float32's share is the schedules' and what starts in it.
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves((g, d, average)), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    if name == "lazy":  # counted in its own steps alone
        assert all(isinstance(metrics["train/penalty"], Mean) for metrics in said)
        assert [float(metrics["train/penalty"].weight) for metrics in said] == [1, 0, 0, 1, 0]
        np.testing.assert_allclose([said[0]["train/penalty"].total, said[3]["train/penalty"].total], penalties, 2e-5)


def test_a_lazy_penalty_stays_a_conditional_over_replicas():
    game = GameConfig(penalty_every=4)
    step = make_step(GENERATOR, CRITIC, game, OPTIM, lambda batch: (batch, None))
    init = make_init(GENERATOR, CRITIC, game, OPTIM, np.zeros((1, 2)))
    states = jax.vmap(init, (0, None))(jax.random.split(jax.random.key(0), 2), hypers(game, OPTIM))
    jaxpr = str(jax.make_jaxpr(jax.vmap(step, (0, None, None)))(states, jnp.asarray(REAL[0], "f4"), jnp.asarray(0)))
    assert " cond[" in jaxpr


def test_the_average_halves_in_its_half_life():
    """After as many samples as the half-life a change is half forgotten; at first nothing but the last is known."""
    optim = OptimConfig(average=0.6, ramp=0.0)
    kept = float(decay_of_average(jnp.asarray(0), 6, optim)) ** 100
    np.testing.assert_allclose(kept, 0.5, rtol=1e-4)
    ramped = OptimConfig(average=0.6, ramp=0.05)
    assert decay_of_average(jnp.asarray(0), 6, ramped) == 0
    np.testing.assert_allclose(decay_of_average(jnp.asarray(1000), 6, ramped), 0.5 ** (6 / 50), rtol=1e-5)
    np.testing.assert_allclose(decay_of_average(jnp.asarray(10**6), 6, ramped), 0.5 ** (6 / 600), rtol=1e-5)


def test_packed_samples_lie_side_by_side():
    pictures = jnp.arange(4 * 2 * 2 * 3).reshape(4, 2, 2, 3)
    both = packed(pictures, 2)
    assert both.shape == (2, 2, 2, 6)
    np.testing.assert_array_equal(both[1, ..., :3], pictures[2])
    np.testing.assert_array_equal(both[1, ..., 3:], pictures[3])


def test_the_probability_of_augmentation_is_given_and_adapted():
    """From the logits of real samples."""

    def apply(key, samples, probability):
        return samples + probability

    def adapt(state, logits, index):
        return AugmentationState(state.probability + 0.25, logits.sum(), state.count + logits.size)

    states, said = played(GameConfig(), augment=Augment(apply, adapt), steps=2)
    assert [float(state.augmentation.probability) for state in states] == [0, 0.25, 0.5]
    assert [float(state.augmentation.count) for state in states] == [0, BATCH, 2 * BATCH]
    assert float(said[-1]["train/augment_probability"]) == 0.5
    plain, otherwise = played(GameConfig(), steps=2)
    for metrics, state in zip(said, states[1:]):
        np.testing.assert_allclose(state.augmentation.sign_sum, BATCH * metrics["train/d_real"], rtol=1e-5)
    # At probability 0 it is the game without.
    for name in ("train/d_loss", "train/g_loss", "train/d_real"):
        assert said[0][name] == otherwise[0][name] and said[1][name] != otherwise[1][name]
    for one, other in zip(jax.tree.leaves(plain[1].generator), jax.tree.leaves(states[1].generator), strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_players_see_what_is_augmented():
    """A discriminator that is shown nothing but noughts gives the generator no gradient."""
    states, _ = played(GameConfig(), augment=Augment(lambda key, samples, p: 0 * samples), steps=1)
    assert states[1].augmentation is None
    for one, other in zip(jax.tree.leaves(states[0].generator), jax.tree.leaves(states[1].generator), strict=True):
        np.testing.assert_array_equal(one, other)


def test_samples_are_of_the_average():
    state = begun(GameConfig())
    state = state.replace(average=jax.tree.map(lambda leaf: leaf + 3, state.average))
    actual = make_sampler(GENERATOR)(state, jnp.zeros((BATCH, 1)))
    np.testing.assert_allclose(actual, 4 * OFFSETS + 3, rtol=1e-5)
    without = make_sampler(GENERATOR)(state.replace(average=None), jnp.zeros((BATCH, 1)))
    np.testing.assert_allclose(without, OFFSETS, rtol=1e-5)


def note(module, what, condition):
    """Writes down what a network is given in training, in a collection of its own."""
    page = module.variable("diary", "page", lambda: jnp.zeros((), int))
    pages = module.variable("diary", "pages", lambda: jnp.zeros((20, BATCH, 3)))
    if module.is_mutable_collection("diary") and not module.is_initializing():
        pages.value = pages.value.at[page.value].set(jnp.concatenate([what, condition[:, None]], axis=1))
        page.value += 1


class Teller(nn.Module):
    latent_dim: int = 2

    @nn.compact
    def __call__(self, latents, condition=None, *, train=True):
        if train:
            note(self, latents, condition)
        return latents * self.param("scale", nn.initializers.ones, (2,)) + train * self.param(
            "shift", nn.initializers.zeros, (2,)
        )


class Listener(nn.Module):
    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        note(self, samples, condition)
        return nn.Dense(1, use_bias=False)(samples)[:, 0]


@pytest.mark.parametrize("reuse", [False, True])
def test_what_the_players_are_given(reuse):
    """Two turns of a discriminator that does not move, at a loss that is linear: all is known from what was given.

    Real samples of each turn and then generated ones, each kind shifted by a number drawn for it; new latents each
    time; the conditions of the turn. The generator's own pass tells the discriminator's collections nothing.
    """
    game = GameConfig(objective="wasserstein", penalty="none", critics=2, reuse_fakes=reuse)
    optim = OptimConfig(learning_rate=0.1, ratio=1e-30)
    augment = Augment(lambda key, samples, probability: samples + jax.random.uniform(key))
    networks = Teller(), Listener()
    real, asked = jnp.asarray(REAL[:2].reshape(-1, 2), "f4"), 100.0 + jnp.arange(2 * BATCH)
    init = make_init(*networks, game, optim, real[:BATCH], asked[:BATCH], augment)
    step = jax.jit(make_step(*networks, game, optim, lambda batch: batch, 2, augment))
    state, metrics = step(init(jax.random.key(0), hypers(game, optim)), (real, asked), jnp.asarray(0))
    told, heard = state.g_stats["diary"], state.d_stats["diary"]
    assert (told["page"], heard["page"]) == (2 if reuse else 3, 4)
    latents, own = told["pages"][: told["page"], :, :2], told["pages"][: told["page"], :, 2]
    turns, real = asked.reshape(2, BATCH), real.reshape(2, BATCH, 2)
    np.testing.assert_array_equal(own, jnp.stack([turns[0], turns[1], turns[1]][: len(own)]))
    np.testing.assert_array_equal(heard["pages"][:4, :, 2], jnp.repeat(turns, 2, axis=0))
    expected = jnp.stack([real[0], latents[0], real[1], latents[1]])
    shifts = heard["pages"][:4, :, :2] - expected
    np.testing.assert_allclose(shifts, jnp.broadcast_to(shifts[:, :1, :1], shifts.shape), atol=1e-5)
    w = state.discriminator["Dense_0"]["kernel"][:, 0]
    of_real, of_fake = (heard["pages"][page, :, :2] @ w for page in (2, 3))
    np.testing.assert_allclose(metrics["train/d_real"], of_real.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/d_fake"], of_fake.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/d_loss"], of_fake.mean() - of_real.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/d_accuracy"], (of_real > of_fake).mean(), rtol=1e-5)
    difference = (heard["pages"][3] - heard["pages"][2])[:, :2].mean(axis=0)
    np.testing.assert_allclose(metrics["train/d_grad_norm"], jnp.linalg.norm(difference), rtol=1e-4)
    # The generator's loss is -w . (z + a shift of its own), its gradient -w z of the scale and -w of the shift.
    last = (-metrics["train/g_loss"] - latents[-1].mean(axis=0) @ w) / w.sum()
    drawn = [*shifts[:, 0, 0], last]
    assert min(drawn) > 0 and max(drawn) < 1 and min(abs(np.diff(np.sort(drawn)))) > 1e-4
    of_scale = jnp.linalg.norm(w * latents[-1].mean(axis=0))
    np.testing.assert_allclose(metrics["train/g_grad_norm/scale"], of_scale, rtol=1e-4)
    np.testing.assert_allclose(metrics["train/g_grad_norm/shift"], jnp.linalg.norm(w), rtol=1e-4)
    np.testing.assert_allclose(metrics["train/g_grad_norm"], jnp.hypot(of_scale, jnp.linalg.norm(w)), rtol=1e-4)
    state, _ = step(state, (real.reshape(-1, 2), asked), jnp.asarray(1))
    told, heard = state.g_stats["diary"], state.d_stats["diary"]
    assert (told["page"], heard["page"]) == (4 if reuse else 6, 8)
    latents = told["pages"][: told["page"], :, :2]
    assert len(np.unique(latents)) == latents.size
    # Samples are made outside of training.
    made = make_sampler(networks[0])(state, jnp.ones((BATCH, 2)), turns[0])
    np.testing.assert_allclose(made, jnp.broadcast_to(state.average["scale"], (BATCH, 2)), rtol=1e-6)


class Line(nn.Module):
    """A picture of one pixel: b times its style, which is the latent."""

    latent_dim: int = 1

    def setup(self):
        self.b = self.param("b", nn.initializers.constant(3.0), ())

    def mapping(self, latents, condition=None, *, train=True):
        return latents[:, None, :]

    def synthesis(self, styles, *, train=True):
        return self.b * styles[:, :, None]

    def __call__(self, latents, condition=None, *, train=True):
        return self.synthesis(self.mapping(latents))


class Pixel(nn.Module):
    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return nn.Dense(1)(samples.reshape(len(samples), -1))[:, 0]


def test_path_lengths_are_a_lazy_step_of_half_a_batch():
    """A path is |b y| long; of one alone the penalty is (l - l / 100)^2, its derivative 2 * 0.99^2 l^2 / b.

    Without a first moment Adam keeps the last gradient: the penalty's, twice as strong at every second step.
    """
    game = GameConfig(penalty="none", path_length=2.0, path_length_every=2)
    optim = OptimConfig(learning_rate=0.03, beta1=0.0)
    networks, pixels = (Line(), Pixel()), jnp.ones((2, 1, 1, 1))
    begun = make_init(*networks, game, optim, pixels)(jax.random.key(0), hypers(game, optim))
    step = jax.jit(make_step(*networks, game, optim, lambda batch: (batch, None)))
    without, metrics = step(begun, pixels, jnp.asarray(1))
    assert without.path_length == 0 and metrics["train/path_length"].weight == 0
    # Adam's first step is as long as its rate, of which the generator's own steps have two thirds.
    np.testing.assert_allclose(abs(without.generator["b"] - 3), 0.03 * 2 / 3, rtol=1e-4)
    state, metrics = step(begun, pixels, jnp.asarray(0))
    length = metrics["train/path_length"].total
    assert metrics["train/path_length"].weight == 1 and length > 0
    np.testing.assert_allclose(state.path_length, length / 100, rtol=1e-5)
    expected = 2 * 2 * 2 * 0.99**2 * length**2 / np.array([3 - 0.02, 3 + 0.02])  # b, whichever way it went before
    assert min(abs(state.g_opt.mu["b"] / expected - 1)) < 1e-4


def test_parameters_keep_their_precision():
    optim = OptimConfig()
    transform, _ = direction(optim)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    moved, _ = descend(transform, params, transform.init(params), params, jnp.float32(0.5))
    assert moved["w"].dtype == jnp.bfloat16
    assert averaged(params, {"w": jnp.ones(3)}, jnp.asarray(1), 6, optim)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: GameConfig(gamma=-1.0), "--game.gamma -1 is not 0 or above"),
        (lambda: GameConfig(gamma=float("nan")), "--game.gamma nan is not 0 or above"),
        (lambda: GameConfig(critics=0), "--game.critics 0 is below 1"),
        (lambda: GameConfig(reuse_fakes=True, unroll=1), "exclude each other"),
        (lambda: OptimConfig(learning_rate=0.0), "--optim.learning-rate 0 is not above 0"),
        (lambda: OptimConfig(beta2=1.0), "--optim.beta2 1 is not in"),
        (lambda: check_batch(10, GameConfig(pack=3)), "--game.pack 3 does not divide --batch-size 10"),
        (lambda: check_batch(10, GameConfig(pack=2), conditional=True), "leave it at 1"),
    ],
)
def test_impossible_games_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
