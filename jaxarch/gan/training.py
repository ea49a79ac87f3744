"""A game of two networks as a pure step: state, the discriminator's updates, the generator's, what is averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.gan.augmentation import initial
from jaxarch.gan.game import (
    Augment,
    Condition,
    Game,
    GameConfig,
    Samples,
    Seen,
    discriminator_loss,
    generate,
    generator_loss,
    latents_of,
    packed,
    path_length_loss,
    penalty,
    streams,
)
from jaxarch.gan.layout import examples
from jaxarch.run import ConfigError, Index, Mean, Metrics

PRECISIONS = {"f32": jnp.float32, "bf16": jnp.bfloat16}


class Hypers(NamedTuple):
    """The numbers that a sweep may vary.

    learning_rate: of the generator.
    ratio: the discriminator's learning rate over the generator's (two time scales, Heusel et al. 2017).
    gamma: weight of the penalty.
    """

    learning_rate: float | Float[Array, "*replicas"]
    ratio: float | Float[Array, "*replicas"]
    gamma: float | Float[Array, "*replicas"]


@dataclass(frozen=True)
class OptimConfig:
    """Adam (Kingma & Ba 2015, alg. 1) for both players, and the generator's average."""

    learning_rate: float = 2e-4
    """of the generator"""
    ratio: float = 1.0
    """the discriminator's learning rate over the generator's"""
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8
    final: float = 1.0
    """the learning rate at the end as a fraction of that at the start, along a cosine"""
    average: float = 10.0
    """half-life of the averaged generator in thousands of samples (0: no average)"""
    ramp: float = 0.05
    """the half-life is at most this part of the samples seen, so that the start is soon forgotten (0: no bound)"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "ratio", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"--optim.{name.replace('_', '-')} {getattr(self, name):g} is not above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--optim.{name} {getattr(self, name):g} is not in [0, 1).")
        for name in ("final", "average", "ramp"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--optim.{name} {getattr(self, name):g} is not 0 or above.")


@flax.struct.dataclass
class GANState:
    """All that a checkpoint holds. Also holds shapes or a leading axis of replicas, so its types are plain.

    generator, discriminator, average: parameters; the average is None where none is kept.
    g_stats, d_stats: the networks' other collections (batch statistics, spectral vectors, the mean style).
    path_length: running mean of the lengths of paths.
    augmentation: of adaptive augmentation, its probability; None elsewhere.
    """

    generator: PyTree
    discriminator: PyTree
    average: PyTree
    g_stats: PyTree
    d_stats: PyTree
    g_opt: PyTree
    d_opt: PyTree
    path_length: Any
    augmentation: Any
    key: Any
    hypers: Any

    @property
    def sampled(self) -> PyTree:
        """The generator's parameters that pictures are made with."""
        return self.generator if self.average is None else self.average


WEIGHTS = ("generator", "discriminator", "average")  # of an Experiment: what --init-from fills


def hypers(game: GameConfig, optim: OptimConfig) -> Hypers:
    return Hypers(optim.learning_rate, optim.ratio, game.gamma)


def check_batch(batch_size: int, game: GameConfig, conditional: bool = False) -> None:
    """Raises ConfigError where the game cannot be played with such batches."""
    if batch_size % game.pack:
        raise ConfigError(f"--game.pack {game.pack} does not divide --batch-size {batch_size}.")
    if game.mismatch and not conditional:
        raise ConfigError("--game.mismatch is of conditional games; leave it at 0 where there are no conditions.")
    if conditional and game.pack > 1:
        raise ConfigError("--game.pack joins samples of several labels; leave it at 1 where there are conditions.")


def check_parts(generator: nn.Module, game: GameConfig, augment: Augment | None) -> None:
    """Raises ConfigError where a term of the game would be without its object."""
    if game.path_length and not hasattr(generator, "synthesis"):
        raise ConfigError("--game.path-length is of generators with styles, as StyleGAN2's; leave it at 0 for others.")
    if game.consistency and augment is None:
        raise ConfigError("--game.consistency compares samples with augmented ones, of which this run has none.")


def decay_of_average(samples_seen: Array, batch_size: int, optim: OptimConfig) -> Array:
    """The share of the average that a step keeps: 0.5^(batch / half-life) (Karras et al. 2018, app. A.1; the ramp:
    Karras et al. 2020, "Training GANs with limited data").
    """
    half_life = jnp.asarray(1000 * optim.average)
    if optim.ramp:
        half_life = jnp.minimum(half_life, samples_seen * optim.ramp)
    return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


def direction(optim: OptimConfig, every: int = 1, eps_root: float = 0.0) -> tuple[optax.GradientTransformation, float]:
    """Adam without its learning rate, and the factor of that rate.

    every: with a penalty of its own step at each `every`-th, there are 1 + 1 / every steps where there was one: rate
        and decays are shrunk by c = every / (every + 1) (Karras et al. 2020, app. B).
    """
    share = every / (every + 1) if every > 1 else 1.0
    return optax.scale_by_adam(optim.beta1**share, optim.beta2**share, optim.eps, eps_root), share


def directions(game: GameConfig, optim: OptimConfig) -> tuple[tuple[optax.GradientTransformation, float], ...]:
    """Of the generator and of the discriminator."""
    g_every = game.path_length_every if game.path_length else 1
    d_every = game.penalty_every if game.penalty != "none" else 1
    return direction(optim, g_every), direction(optim, d_every)


def make_init(
    generator: nn.Module,
    discriminator: nn.Module,
    game: GameConfig,
    optim: OptimConfig,
    samples: Samples,
    condition: Condition = None,
    augment: Augment | None = None,
) -> Callable[[Key[Array, ""], Hypers], GANState]:
    """`(key, hypers) -> state` with parameters drawn from the key.

    samples, condition: any batch of real samples (its size that `game.pack` divides) and what goes with it.
    """
    (g_direction, _), (d_direction, _) = directions(game, optim)

    def init(key: Key[Array, ""], hypers: Hypers) -> GANState:
        g_key, d_key, noise_key, key = jax.random.split(key, 4)
        batch = len(jax.tree.leaves(samples)[0])
        latents = latents_of(generator, noise_key, batch)
        g = dict(generator.init({"params": g_key, **streams(noise_key)}, latents, condition))
        d = dict(
            discriminator.init(
                {"params": d_key, **streams(noise_key)},
                packed(jax.tree.map(jnp.asarray, samples), game.pack),
                condition,
            )
        )
        g_params, d_params = g.pop("params"), d.pop("params")
        return GANState(
            generator=g_params,
            discriminator=d_params,
            average=g_params if optim.average else None,
            g_stats=g,
            d_stats=d,
            g_opt=g_direction.init(g_params),
            d_opt=d_direction.init(d_params),
            path_length=jnp.zeros(()),
            augmentation=initial() if augment and augment.adapt else None,
            key=key,
            hypers=hypers,
        )

    return init


def make_sampler(
    generator: nn.Module,
) -> Callable[..., Samples]:
    """`(state, latents, condition=None, key=None, **options) -> samples` of the averaged generator.

    key: of what is random beside the latents, as StyleGAN's noise; None: nothing is.
    options: of the generator's call, as StyleGAN's `truncation`.
    """

    def sample(
        state: GANState,
        latents: Array,
        condition: Condition = None,
        key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> Samples:
        variables = {"params": state.sampled, **state.g_stats}
        rngs = None if key is None else streams(key)
        return generator.apply(variables, latents, condition, train=False, rngs=rngs, **options)

    return sample


def make_step(
    generator: nn.Module,
    discriminator: nn.Module,
    game: GameConfig,
    optim: OptimConfig,
    prepare: Callable[[Any], tuple[Samples, Condition]],
    steps: int = 0,
    augment: Augment | None = None,
    extra: Callable[[Samples, Samples, Condition], Float[Array, ""]] | None = None,
) -> Callable[[GANState, Any, Index], tuple[GANState, Metrics]]:
    """One update of the generator and `game.critics` before it of the discriminator: `(state, batch, index) -> ...`.

    prepare: of a batch, `game.critics` times as many examples as a player sees, its samples and conditions. The
        generator is asked for the conditions of the real samples, so that both kinds have them equally often.
    steps: length of the schedules, where `optim.final` or `game.gamma_final` is not 1.
    extra: `(generated, real, condition) -> loss`, one more term of the generator's.
    Raises ConfigError where the game asks for what the networks or the augmentation do not have.
    """
    check_parts(generator, game, augment)
    rules = Game(generator, discriminator, game, augment, extra)
    (g_direction, g_share), (d_direction, d_share) = directions(game, optim)
    lookahead = direction(optim, 1, eps_root=1e-12)[0]  # Adam's root has no derivative at 0
    rate_fraction = optax.cosine_decay_schedule(1.0, max(steps, 1), optim.final)
    gamma_fraction = optax.cosine_decay_schedule(1.0, max(steps, 1), game.gamma_final)

    def step(state: GANState, batch: Any, index: Index) -> tuple[GANState, Metrics]:
        key = jax.random.fold_in(state.key, index)
        probability = state.augmentation.probability if state.augmentation else jnp.ones(())
        turns = [Seen(real, asked, probability) for real, asked in split(prepare(batch), game.critics)]
        batch_size = len(jax.tree.leaves(turns[0].real)[0])
        g_rate = state.hypers.learning_rate * rate_fraction(index)
        d_rate = g_rate * state.hypers.ratio
        gamma = state.hypers.gamma * gamma_fraction(index)

        # --- the discriminator ---

        d, d_opt, d_stats, g_stats = state.discriminator, state.d_opt, state.d_stats, state.g_stats
        pull, drawn = None, jax.random.split(key, 2 * game.critics + 2)
        for n, seen in enumerate(turns):
            latents = latents_of(generator, jax.random.fold_in(drawn[2 * n], 0), batch_size)
            asked, noise_key = seen.condition, jax.random.fold_in(drawn[2 * n], 1)

            def made(params: PyTree, stats: PyTree = g_stats, z: Array = latents, c: Any = asked, k: Array = noise_key):
                return generate(generator, params, stats, z, c, k)

            if game.reuse_fakes and n == game.critics - 1:
                fake, pull, g_stats = jax.vjp(made, state.generator, has_aux=True)
            else:
                fake, g_stats = made(state.generator)
            fixed = jax.lax.stop_gradient(fake)

            def d_loss(
                params: PyTree, stats: PyTree = d_stats, x: Any = fixed, s: Seen = seen, k: Array = drawn[2 * n + 1]
            ):
                return discriminator_loss(rules, params, stats, x, s, k, gamma)

            (d_value, (of_real, of_fake, penalized)), d_grads = jax.value_and_grad(d_loss, has_aux=True)(d)
            d, d_opt = descend(d_direction, d, d_opt, d_grads, d_rate * d_share)
            d_stats = of_fake.stats
            if game.clip:
                d = jax.tree.map(lambda p: jnp.clip(p, -game.clip, game.clip), d)

        seen, due = turns[-1], jnp.ones(())
        if game.penalty != "none" and game.penalty_every > 1:
            is_due = index % game.penalty_every == 0
            due = is_due.astype(due.dtype)

            def penalize(d: PyTree, d_opt: PyTree) -> tuple[PyTree, PyTree, Array]:
                value, grads = jax.value_and_grad(
                    lambda params: penalty(rules, params, d_stats, fixed, seen, drawn[-2])
                )(d)
                grads = jax.tree.map(lambda leaf: gamma * game.penalty_every * leaf, grads)
                return *descend(d_direction, d, d_opt, grads, d_rate * d_share), value

            # A predicate of the index alone: over replicas it stays a conditional.
            d, d_opt, penalized = jax.lax.cond(is_due, penalize, lambda d, d_opt: (d, d_opt, jnp.zeros(())), d, d_opt)

        # --- the generator ---

        g_keys = jax.random.split(drawn[-1], 6)

        def ahead(fake: Samples) -> PyTree:
            """The discriminator after it has answered these samples (Metz et al. 2017, eq. 7)."""
            params, opt = d, lookahead.init(d)
            for n in range(game.unroll):
                answer = jax.random.fold_in(g_keys[5], n)
                grads, _ = jax.grad(
                    lambda params, k=answer: discriminator_loss(rules, params, d_stats, fake, seen, k, gamma),
                    has_aux=True,
                )(params)
                params, opt = descend(lookahead, params, opt, grads, d_rate)
            return params

        def g_loss(fake: Samples) -> Array:
            opponent = ahead(fake) if game.unroll else d
            return generator_loss(rules, opponent, d_stats, fake, seen, g_keys[:2])

        g, g_opt = state.generator, state.g_opt
        if pull is not None:
            g_value, fake_grads = jax.value_and_grad(g_loss)(fake)
            (g_grads,) = pull(fake_grads)
        else:
            latents = latents_of(generator, g_keys[2], batch_size)

            def through(params: PyTree) -> tuple[Array, PyTree]:
                fake, stats = generate(generator, params, g_stats, latents, seen.condition, g_keys[3])
                return g_loss(fake), stats

            (g_value, g_stats), g_grads = jax.value_and_grad(through, has_aux=True)(g)
        g, g_opt = descend(g_direction, g, g_opt, g_grads, g_rate * g_share)

        metrics: Metrics = {
            "train/d_loss": d_value,
            "train/g_loss": g_value,
            "train/d_accuracy": jnp.mean(of_real.logits > of_fake.logits, dtype=jnp.float32),
            "train/d_real": jnp.mean(of_real.logits),
            "train/d_fake": jnp.mean(of_fake.logits),
            **layer_norms("train/g_grad_norm", g_grads),
            **layer_norms("train/d_grad_norm", d_grads),
        }
        if game.penalty != "none":
            metrics["train/penalty"] = Mean(penalized * due, due)

        path_length = state.path_length
        if game.path_length:
            is_due = index % game.path_length_every == 0
            few = max(batch_size // 2, 1)  # half a batch is enough

            def lengthen(g: PyTree, g_opt: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
                (_, (mean, length)), grads = jax.value_and_grad(
                    lambda params: path_length_loss(
                        rules, params, g_stats, seen.condition, few, state.path_length, g_keys[4]
                    ),
                    has_aux=True,
                )(g)
                grads = jax.tree.map(lambda leaf: game.path_length * game.path_length_every * leaf, grads)
                return *descend(g_direction, g, g_opt, grads, g_rate * g_share), mean, length

            g, g_opt, path_length, length = jax.lax.cond(
                is_due, lengthen, lambda g, g_opt: (g, g_opt, state.path_length, jnp.zeros(())), g, g_opt
            )
            metrics["train/path_length"] = Mean(length * is_due, is_due.astype(length.dtype))

        # --- what follows the players ---

        augmentation = state.augmentation
        if augment and augment.adapt and augmentation is not None:
            augmentation = augment.adapt(augmentation, of_real.logits, index)
            metrics["train/augment_probability"] = augmentation.probability
        return replace(
            state,
            generator=g,
            discriminator=d,
            average=averaged(state.average, g, index, batch_size, optim),
            g_stats=g_stats,
            d_stats=d_stats,
            g_opt=g_opt,
            d_opt=d_opt,
            path_length=path_length,
            augmentation=augmentation,
        ), metrics

    return step


def split(batch: PyTree, parts: int) -> list[PyTree]:
    """A batch in equal parts."""
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)
    return [examples(jax.tree.map(lambda leaf, n=n: leaf[n], cut)) for n in range(parts)]


def descend(
    transform: optax.GradientTransformation, params: PyTree, opt: PyTree, grads: PyTree, rate: Float[Array, ""]
) -> tuple[PyTree, PyTree]:
    """One step against the direction that `transform` makes of the gradient."""
    updates, opt = transform.update(grads, opt, params)
    return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates), opt


def averaged(average: PyTree, params: PyTree, index: Index, batch_size: int, optim: OptimConfig) -> PyTree:
    """The generator's average after step `index`, which has led to these parameters; None where none is kept."""
    if average is None:
        return None
    keep = decay_of_average(index * batch_size, batch_size, optim)
    return jax.tree.map(lambda a, p: (keep * a + (1 - keep) * p).astype(a.dtype), average, params)


def layer_norms(name: str, grads: PyTree) -> Metrics:
    """The norm of the gradient, and of that of each of the network's topmost parts by its name."""
    parts = {f"{name}/{part}": optax.tree.norm(leaves) for part, leaves in grads.items()}
    return {name: optax.tree.norm(grads), **(parts if len(parts) > 1 else {})}
