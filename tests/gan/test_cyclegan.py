"""The generator against its layers in numpy, the history against a list, the game against its formulas by hand."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxarch.gan.cyclegan import (
    Both,
    CycleConfig,
    History,
    ResNetGenerator,
    generators_losses,
    hypers,
    make_init,
    make_step,
    shown,
)
from jaxarch.gan.objectives import OBJECTIVES
from jaxarch.gan.training import OptimConfig
from jaxarch.run import ConfigError
from tests.gan.test_pix2pix import conv, norm, parameters_of, wide

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def pictures_of(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.uniform(-1, 1, shape), jnp.float32)


# --- the generator ------------------------------------------------------------------------------


def reflected(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    side = len(kernel) // 2
    return conv(np.pad(x, [(0, 0), (side, side), (side, side), (0, 0)], mode="reflect"), kernel, 1, 0)


def doubled(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each pixel adds its multiple of the 3 x 3 kernel, `[3, 3, out, in]`, two pixels apart; what reaches beyond the
    last row and column is lost.
    """
    batch, height, width, _ = x.shape
    out = np.zeros((batch, 2 * height + 1, 2 * width + 1, kernel.shape[2]))
    for i in range(height):
        for j in range(width):
            out[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += np.einsum("bf,ijcf->bijc", x[:, i, j], kernel)
    return out[:, :-1, :-1]


def test_the_generator_by_hand():
    model = ResNetGenerator(channels=2, features=3, halvings=1, blocks=2)
    x = RNG.uniform(-1, 1, (2, 8, 6, 1)).astype(np.float32)
    variables = parameters_of(model, None, x)
    found = jax.jit(lambda v, x: model.apply(v, None, x))(variables, x)
    p = wide(variables["params"])

    def unit(x: np.ndarray) -> np.ndarray:
        return np.maximum(norm(x, (1, 2)), 0)

    y = unit(reflected(x.astype(np.float64), p["first"]["kernel"]))
    y = np.pad(y, [(0, 0), (0, 1), (0, 1), (0, 0)])  # the published network has the zeros before the picture
    y = unit(conv(y, p["down_1"]["kernel"], 2, 0))
    for i in range(2):
        z = unit(reflected(y, p[f"block_{i}_0"]["kernel"]))
        y = y + norm(reflected(z, p[f"block_{i}_1"]["kernel"]), (1, 2))
    y = unit(doubled(y, p["up_0"]["kernel"]))
    expected = np.tanh(reflected(y, p["last"]["kernel"]) + p["last"]["bias"])
    assert y.shape == (2, 8, 6, 3)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_generator_of_the_paper():
    """c7s1-64, d128, d256, nine R256, u128, u64, c7s1-3: 11.4 million weights."""
    params = jax.eval_shape(lambda: ResNetGenerator(3).init(KEY, None, jnp.zeros((1, 256, 256, 3))))
    kernels = 2 * 49 * 3 * 64 + 2 * 9 * (64 * 128 + 128 * 256) + 18 * 9 * 256 * 256
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == kernels + 3
    with pytest.raises(ConfigError, match="--model.halvings 2 needs .* multiples of 4 and at least 8, not of 8 x 6"):
        ResNetGenerator(3).init(KEY, None, jnp.zeros((1, 8, 6, 3)))


# --- the history --------------------------------------------------------------------------------


def test_the_history_keeps_what_it_does_not_show():
    """Pictures are numbers. The first three are stored and shown; later ones are shown, or stored for an older one."""
    apply, history = jax.jit(shown), History(jnp.zeros((3, 1, 1, 1)), jnp.int32(0))
    stored, swapped, replaced = [], 0, []
    for step in range(200):
        fakes = 4.0 * step + np.arange(4.0)
        found, history = apply(jax.random.key(step), history, jnp.asarray(fakes, jnp.float32)[:, None, None, None])
        for fake, given in zip(fakes, np.asarray(found)[:, 0, 0, 0]):
            if len(stored) < 3:
                assert given == fake
                stored.append(fake)
            elif given != fake:
                replaced.append(stored.index(given))
                stored[replaced[-1]] = fake
                swapped += 1
        assert sorted(np.asarray(history.pictures)[:, 0, 0, 0][: len(stored)]) == sorted(stored)
    assert abs(swapped / 797 - 0.5) < 0.09  # five standard deviations
    assert (np.bincount(replaced, minlength=3) > 90).all()
    fakes = pictures_of(2, 2, 2, 1)
    found, _ = shown(KEY, None, fakes)
    np.testing.assert_array_equal(found, fakes)


# --- the game -----------------------------------------------------------------------------------


class Blend(nn.Module):
    """A generator of three numbers: a linear map of the pixels' channels, and a shift."""

    latent_dim: int = 0

    @nn.compact
    def __call__(self, latents, condition, *, train=True):
        matrix = self.param("kernel", nn.initializers.normal(1.0), (2, 2))
        return condition @ matrix + self.param("bias", nn.initializers.normal(1.0), (2,))


class Judge(nn.Module):
    @nn.compact
    def __call__(self, samples, condition=None, *, train=True):
        return nn.tanh(samples @ self.param("kernel", nn.initializers.normal(1.0), (2, 1)))[..., 0]


def test_identity_generators_have_no_cycle_loss():
    """Nor an identity loss; others that are each other's inverse have no cycle loss but an identity loss."""
    pictures = Both(pictures_of(3, 4, 4, 2), pictures_of(3, 4, 4, 2))
    judge = Both(lambda x: x.mean((1, 2, 3)), lambda x: x.sum((1, 2, 3)))
    losses = generators_losses(Both(lambda x: x, lambda x: x), judge, pictures, "least_squares")
    assert losses.cycle == 0 and losses.identity == 0 and losses.adversarial > 0
    losses = generators_losses(Both(lambda x: x / 2, lambda x: x * 2), judge, pictures, "least_squares")
    assert losses.cycle == 0
    expected = np.abs(pictures.a / 2).mean() + np.abs(pictures.b).mean()
    np.testing.assert_allclose(losses.identity, expected, rtol=1e-6)
    losses = generators_losses(Both(lambda x: x, lambda x: x + 0.5), judge, pictures, "least_squares", identity=False)
    np.testing.assert_allclose([losses.cycle, losses.identity], [1, 0], atol=1e-6)


@pytest.mark.parametrize("objective", ["least_squares", "relativistic"])
def test_the_step_is_the_game_by_hand(objective):
    """Four steps in float64 against the losses written out, optax's Adam, and the history's own pictures."""
    game = CycleConfig(objective, cycle=3.0, identity=0.4, history=5)
    optim = OptimConfig(learning_rate=0.05, ratio=0.5, beta1=0.4, average=0.01, ramp=0.0)
    losses = OBJECTIVES[objective]
    g, d = Blend(), Judge()
    with jax.enable_x64():
        batches = [Both(*(jnp.asarray(RNG.normal(size=(2, 2, 3, 2))) for _ in "ab")) for _ in range(4)]
        init = make_init(Both(g, g), Both(d, d), game, optim, batches[0])
        state = init(KEY, jax.tree.map(jnp.asarray, hypers(game, optim)))
        state = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)
        step = jax.jit(make_step(Both(g, g), Both(d, d), game, optim, lambda batch: batch))
        tx = optax.adam(0.05, 0.4, 0.99, 1e-8), optax.adam(0.025, 0.4, 0.99, 1e-8)
        gp, dp, average = state.generators, state.discriminators, state.generators
        g_opt, d_opt = tx[0].init(gp), tx[1].init(dp)
        histories = [state.history.a, state.history.b]

        def make(p, x):
            return x @ p["kernel"] + p["bias"]

        def say(p, x):
            return jnp.tanh(x @ p["kernel"])[..., 0]

        def l1(x, y):
            return jnp.abs(x - y).mean()

        def g_loss(gp, dp, a, b):
            to_b, to_a = make(gp.b, a), make(gp.a, b)
            game_loss = losses.generator(say(dp.b, to_b), say(dp.b, b)) + losses.generator(
                say(dp.a, to_a), say(dp.a, a)
            )
            cycle = l1(make(gp.a, to_b), a) + l1(make(gp.b, to_a), b)
            return game_loss + 3 * cycle + 3 * 0.4 * (l1(make(gp.a, a), a) + l1(make(gp.b, b), b))

        def d_loss(dp, a, b, old_a, old_b):
            return losses.discriminator(say(dp.a, a), say(dp.a, old_a)) + losses.discriminator(
                say(dp.b, b), say(dp.b, old_b)
            )

        for index, (a, b) in enumerate(batches):
            keys = jax.random.split(jax.random.fold_in(state.key, index), 2)
            old = [shown(keys[0], histories[0], make(gp.a, b)), shown(keys[1], histories[1], make(gp.b, a))]
            histories = [one[1] for one in old]
            g_grads = jax.grad(g_loss)(gp, dp, a, b)
            d_grads = jax.grad(d_loss)(dp, a, b, old[0][0], old[1][0])
            updates, g_opt = tx[0].update(g_grads, g_opt)
            gp = optax.apply_updates(gp, updates)
            updates, d_opt = tx[1].update(d_grads, d_opt)
            dp = optax.apply_updates(dp, updates)
            average = jax.tree.map(lambda x, y: 0.5 ** (2 / 10) * x + (1 - 0.5 ** (2 / 10)) * y, average, gp)
            state, metrics = step(state, Both(a, b), jnp.int32(index))
        for found, expected in (
            (state.generators, gp),
            (state.discriminators, dp),
            (state.averages, average),
            (state.history, Both(*histories)),
        ):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-9), found, expected)
        assert state.history.a.filled == 5 and {"train/cycle", "train/identity", "train/d_accuracy"} <= metrics.keys()


def test_replicas_are_each_as_alone():
    game, optim = CycleConfig(identity=0.0, history=0), OptimConfig(learning_rate=0.01, average=0.0)
    networks = Both(Blend(), Blend()), Both(Judge(), Judge())
    batch = Both(pictures_of(2, 3, 3, 2), pictures_of(2, 3, 3, 2))
    init, step = make_init(*networks, game, optim, batch), make_step(*networks, game, optim, lambda batch: batch)
    keys = jax.random.split(KEY, 2)
    numbers = hypers(game, optim)
    states = jax.vmap(init, (0, None))(keys, numbers)
    assert states.averages is None and states.history == Both(None, None) and states.sampled is states.generators
    together = jax.jit(jax.vmap(step, (0, None, None)))
    alone = jax.jit(step)
    single = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(2)]
    for index in range(3):
        states, _ = together(states, batch, jnp.int32(index))
        single = [alone(one, batch, jnp.int32(index))[0] for one in single]
    for i in range(2):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=1e-5),
            replace(states, key=None),
            replace(single[i], key=None),
        )


def test_what_is_refused():
    with pytest.raises(ConfigError, match="--game.cycle -1 is not 0 or above; 0 is off."):
        CycleConfig(cycle=-1.0)
