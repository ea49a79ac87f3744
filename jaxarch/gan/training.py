"""A game of two networks as a pure step: state, the discriminator's updates, the generator's, what is averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.gan.augmentation import AugmentationState, initial
from jaxarch.gan.objectives import OBJECTIVES, Logits, ObjectiveName, auxiliary_loss
from jaxarch.gan.regularizers import consistency, gradient_at, gradient_penalty, path_length_penalty, path_lengths
from jaxarch.run import ConfigError, Index, Mean, Metrics

PenaltyName = Literal["none", "r1", "r2", "r1_r2", "gradient"]
PRECISIONS = {"f32": jnp.float32, "bf16": jnp.bfloat16}
DECAY = 0.01  # of the running mean of path lengths
Samples = PyTree  # pictures, or points: arrays with a leading axis of samples
Condition = PyTree  # what is asked for: labels, a picture, encoded text; None


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
class GameConfig:
    objective: ObjectiveName = "relativistic"
    penalty: PenaltyName = "r1_r2"
    """on the discriminator's gradient, at real samples (r1), generated ones (r2) or between them (gradient)"""
    gamma: float = 1.0
    """weight of the penalty; half of it for r1 and r2"""
    gamma_final: float = 1.0
    """gamma at the end as a fraction of that at the start, along a cosine"""
    penalty_every: int = 1
    """steps between penalties; above 1 each is a step of its own, as much stronger"""
    critics: int = 1
    """updates of the discriminator for each of the generator"""
    clip: float = 0.0
    """bound of the discriminator's weights, for wasserstein without a penalty (0: off)"""
    pack: int = 1
    """samples that the discriminator judges together"""
    unroll: int = 0
    """updates of the discriminator that the generator looks ahead"""
    consistency: float = 0.0
    """weight of equal logits for augmented samples (0: off)"""
    mismatch: float = 0.0
    """weight of the discriminator's loss on real samples with the condition of another, as if generated (0: off)"""
    auxiliary: float = 1.0
    """weight of the classifier's loss, where the discriminator has one"""
    path_length: float = 0.0
    """weight of the path length penalty (0: off; StyleGAN2: 2)"""
    path_length_every: int = 4
    """steps between path length penalties"""
    reuse_fakes: bool = False
    """one forward pass of the generator serves both players"""

    def __post_init__(self) -> None:
        for name in ("penalty_every", "critics", "pack", "path_length_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--game.{name.replace('_', '-')} {getattr(self, name)} is below 1.")
        for name in ("gamma", "gamma_final", "clip", "unroll", "consistency", "mismatch", "auxiliary", "path_length"):
            if not getattr(self, name) >= 0:  # as a number that is none is not
                flag = f"--game.{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {getattr(self, name):g} is not 0 or above; 0 is off.")
        if self.reuse_fakes and self.unroll:
            raise ConfigError("--game.reuse-fakes and --game.unroll exclude each other; leave one of them out.")


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


class Augment(NamedTuple):
    """What is done to all samples before the discriminator sees them, in both players' steps.

    apply: `(key, samples, probability) -> samples`, differentiable.
    adapt: `(state, logits of real samples, index) -> state`; None: the probability stays at 1.
    """

    apply: Callable[[Key[Array, ""], Samples, Float[Array, ""]], Samples]
    adapt: Callable[[AugmentationState, Logits, Index], AugmentationState] | None = None


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


def packed(samples: Samples, number: int) -> Samples:
    """Each `number` samples of a batch as one, joined along the last axis (Lin et al. 2018, sec. 3)."""

    def pack(leaf: Array | np.ndarray) -> Array | np.ndarray:
        if number == 1:
            return leaf
        grouped = jnp.moveaxis(leaf.reshape(-1, number, *leaf.shape[1:]), 1, -2)
        return grouped.reshape(*grouped.shape[:-2], -1)

    return jax.tree.map(pack, samples)


def decay_of_average(samples_seen: Array, batch_size: int, optim: OptimConfig) -> Array:
    """The share of the average that a step keeps: 0.5^(batch / half-life) (Karras et al. 2018, sec. 5; the ramp:
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


def latents_of(generator: nn.Module, key: Key[Array, ""], count: int) -> Float[Array, "batch dim"]:
    """Drawn from N(0, I), as many numbers as the generator takes."""
    return jax.random.normal(key, (count, cast(Any, generator).latent_dim))


def streams(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
    """A key for each kind of randomness that a network may ask for."""
    return dict(zip(("noise", "mixing", "dropout"), jax.random.split(key, 3), strict=True))


def generate(
    generator: nn.Module, params: PyTree, stats: PyTree, latents: Array, condition: Condition, key: Key[Array, ""]
) -> tuple[Samples, PyTree]:
    """Samples as in training, and the generator's other collections after them."""
    variables = {"params": params, **stats}
    return cast(Any, generator.apply(variables, latents, condition, train=True, rngs=streams(key), mutable=list(stats)))


def make_sampler(
    generator: nn.Module,
) -> Callable[..., Samples]:
    """`(state, latents, condition=None, **options) -> samples` of the averaged generator, without randomness.

    options: of the generator's call, as StyleGAN's `truncation`.
    """

    def sample(state: GANState, latents: Array, condition: Condition = None, **options: Any) -> Samples:
        variables = {"params": state.sampled, **state.g_stats}
        return generator.apply(variables, latents, condition, train=False, **options)

    return sample


class Verdict(NamedTuple):
    """What a discriminator says of a batch: its logits, an auxiliary classifier's, its statistics after."""

    logits: Logits
    class_logits: Float[Array, "batch classes"] | None
    stats: PyTree


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
    """
    objective = OBJECTIVES[game.objective]
    (g_direction, g_share), (d_direction, d_share) = directions(game, optim)
    lookahead = direction(optim, 1, eps_root=1e-12)[0]  # Adam's root has no derivative at 0
    fraction = optax.cosine_decay_schedule(1.0, max(steps, 1), optim.final)
    penalty_fraction = optax.cosine_decay_schedule(1.0, max(steps, 1), game.gamma_final)

    def judge(
        params: PyTree,
        stats: PyTree,
        samples: Samples,
        condition: Condition,
        key: Key[Array, ""],
        probability: Array,
        augmented: bool = True,
    ) -> Verdict:
        augment_key, key = jax.random.split(key)
        if augment and augmented:
            samples = augment.apply(augment_key, samples, probability)
        said, stats = cast(
            Any,
            discriminator.apply(
                {"params": params, **stats},
                packed(samples, game.pack),
                condition,
                train=True,
                rngs=streams(key),
                mutable=list(stats),
            ),
        )
        logits, class_logits = said if isinstance(said, tuple) else (said, None)
        # Losses and penalties are sums of many small terms: in the precision of the parameters.
        return Verdict(jax.tree.map(_at_least_float32, logits), class_logits, stats)

    def step(state: GANState, batch: Any, index: Index) -> tuple[GANState, Metrics]:
        key = jax.random.fold_in(state.key, index)
        real, condition = prepare(batch)
        parts = [
            jax.tree.map(lambda leaf, n=n: leaf.reshape(game.critics, -1, *leaf.shape[1:])[n], (real, condition))
            for n in range(game.critics)
        ]
        batch_size = len(jax.tree.leaves(parts[0])[0])
        probability = state.augmentation.probability if state.augmentation else jnp.ones(())
        g_rate = jnp.asarray(state.hypers.learning_rate * (fraction(index) if optim.final != 1 else 1.0))
        d_rate = g_rate * state.hypers.ratio
        gamma = state.hypers.gamma * (penalty_fraction(index) if game.gamma_final != 1 else 1.0)

        # --- the discriminator ---

        def penalty(params: PyTree, stats: PyTree, real: Samples, fake: Samples, asked: Condition, key: Array) -> Array:
            keys = jax.random.split(key, 3)

            def critic(samples: Samples, key: Array) -> Array:
                return judge(params, stats, samples, asked, key, probability).logits

            total = jnp.zeros(())
            if game.penalty in ("r1", "r1_r2"):
                total += gradient_at(lambda x: critic(x, keys[0]), real) / 2
            if game.penalty in ("r2", "r1_r2"):
                total += gradient_at(lambda x: critic(x, keys[1]), fake) / 2
            if game.penalty == "gradient":
                total += gradient_penalty(lambda x: critic(x, keys[1]), real, fake, keys[2])
            return total

        def d_loss(
            params: PyTree, stats: PyTree, real: Samples, fake: Samples, asked: Condition, key: Array, full: bool = True
        ) -> tuple[Array, tuple[Verdict, Verdict, Array]]:
            """full: with all that is not the game itself."""
            keys = jax.random.split(key, 4)
            of_real = judge(params, stats, real, asked, keys[0], probability)
            of_fake = judge(params, of_real.stats, fake, asked, keys[1], probability)
            loss = objective.discriminator(of_real.logits, of_fake.logits)
            penalized = jnp.zeros(())
            if full:
                if game.mismatch:
                    # Reed et al. 2016, "Generative adversarial text to image synthesis", alg. 1: a third kind of pair.
                    others = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), asked)
                    wrong = judge(params, stats, real, others, jax.random.fold_in(key, 4), probability).logits
                    loss += game.mismatch * objective.discriminator(of_real.logits, wrong)
                if of_real.class_logits is not None:
                    loss += game.auxiliary * auxiliary_loss(of_real.class_logits, asked)
                if game.consistency:
                    plain = judge(params, stats, real, asked, keys[3], probability, augmented=False)
                    loss += game.consistency * consistency(plain.logits, of_real.logits)
                if game.penalty != "none" and game.penalty_every == 1:
                    penalized = penalty(params, stats, real, fake, asked, keys[2])
                    loss += gamma * penalized
            return loss, (of_real, of_fake, penalized)

        def descend(transform: Any, params: PyTree, opt: PyTree, grads: PyTree, rate: Array) -> tuple[PyTree, PyTree]:
            updates, opt = transform.update(grads, opt, params)
            return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates), opt

        d, d_opt, d_stats, g_stats = state.discriminator, state.d_opt, state.d_stats, state.g_stats
        fake, pull, drawn = None, None, jax.random.split(key, 2 * game.critics + 2)
        for n, (x, asked) in enumerate(parts):
            latents = latents_of(generator, jax.random.fold_in(drawn[2 * n], 0), batch_size)
            noise_key = jax.random.fold_in(drawn[2 * n], 1)

            def made(params: PyTree, stats: PyTree = g_stats, z: Array = latents, c: Any = asked, k: Array = noise_key):
                return generate(generator, params, stats, z, c, k)

            if game.reuse_fakes and n == game.critics - 1:
                fake, pull, g_stats = jax.vjp(made, state.generator, has_aux=True)
            else:
                fake, g_stats = made(state.generator)
            fixed = jax.lax.stop_gradient(fake)
            (d_value, (of_real, of_fake, penalized)), d_grads = jax.value_and_grad(d_loss, has_aux=True)(
                d, d_stats, x, fixed, asked, drawn[2 * n + 1]
            )
            d, d_opt = descend(d_direction, d, d_opt, d_grads, d_rate * d_share)
            d_stats = of_fake.stats
            if game.clip:
                d = jax.tree.map(lambda p: jnp.clip(p, -game.clip, game.clip), d)

        x, asked = parts[-1]
        due = jnp.ones(())
        if game.penalty != "none" and game.penalty_every > 1:
            is_due = index % game.penalty_every == 0
            due = is_due.astype(due.dtype)

            def penalize(d: PyTree, d_opt: PyTree) -> tuple[PyTree, PyTree, Array]:
                value, grads = jax.value_and_grad(penalty)(d, d_stats, x, fixed, asked, drawn[-2])
                grads = jax.tree.map(lambda g: gamma * game.penalty_every * g, grads)
                return *descend(d_direction, d, d_opt, grads, d_rate * d_share), value

            # A predicate of the index alone: over replicas it stays a conditional.
            d, d_opt, penalized = jax.lax.cond(is_due, penalize, lambda d, d_opt: (d, d_opt, jnp.zeros(())), d, d_opt)

        # --- the generator ---

        g_keys = jax.random.split(drawn[-1], 6)

        def ahead(fake: Samples) -> PyTree:
            """The discriminator after it has answered these samples (Metz et al. 2017, eq. 8)."""
            params, opt = d, lookahead.init(d)
            for n in range(game.unroll):
                answer = jax.random.fold_in(g_keys[5], n)
                grads = jax.grad(d_loss, has_aux=True)(params, d_stats, x, fake, asked, answer)[0]
                params, opt = descend(lookahead, params, opt, grads, d_rate)
            return params

        def g_loss(fake: Samples) -> Array:
            opponent = ahead(fake) if game.unroll else d
            of_fake = judge(opponent, d_stats, fake, asked, g_keys[0], probability)
            of_real = judge(opponent, d_stats, x, asked, g_keys[1], probability) if objective.pairs else of_fake
            loss = objective.generator(of_fake.logits, of_real.logits)
            if of_fake.class_logits is not None:
                loss += game.auxiliary * auxiliary_loss(of_fake.class_logits, asked)
            if extra is not None:
                loss += extra(fake, x, asked)
            return loss

        g, g_opt = state.generator, state.g_opt
        if pull is not None:
            g_value, fake_grads = jax.value_and_grad(g_loss)(fake)
            (g_grads,) = pull(fake_grads)
        else:
            latents = latents_of(generator, g_keys[2], batch_size)

            def through(params: PyTree) -> tuple[Array, PyTree]:
                fake, stats = generate(generator, params, g_stats, latents, asked, g_keys[3])
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

            def lengths_of(params: PyTree) -> tuple[Array, tuple[Array, Array]]:
                variables = {"params": params, **g_stats}
                latents = latents_of(generator, jax.random.fold_in(g_keys[4], 0), few)
                some = jax.tree.map(lambda leaf: leaf[:few], asked)
                noises = streams(jax.random.fold_in(g_keys[4], 1))
                # `mutable`: what training would move (the mean style) is moved by the players' own passes alone.
                styles, _ = cast(
                    Any,
                    generator.apply(
                        variables, latents, some, train=True, rngs=noises, mutable=list(g_stats), method="mapping"
                    ),
                )

                def synthesize(styles: Array) -> Array:
                    return cast(Array, generator.apply(variables, styles, train=True, rngs=noises, method="synthesis"))

                lengths = path_lengths(synthesize, styles, jax.random.fold_in(g_keys[4], 2))
                value, mean = path_length_penalty(lengths, path_length, DECAY)
                return value, (mean, jnp.mean(lengths))

            def lengthen(g: PyTree, g_opt: PyTree) -> tuple[PyTree, PyTree, Array, Array]:
                (_, (mean, length)), grads = jax.value_and_grad(lengths_of, has_aux=True)(g)
                grads = jax.tree.map(lambda leaf: game.path_length * game.path_length_every * leaf, grads)
                return *descend(g_direction, g, g_opt, grads, g_rate * g_share), mean, length

            g, g_opt, path_length, length = jax.lax.cond(
                is_due, lengthen, lambda g, g_opt: (g, g_opt, path_length, jnp.zeros(())), g, g_opt
            )
            metrics["train/path_length"] = Mean(length * is_due, is_due.astype(length.dtype))

        average = state.average
        if average is not None:
            keep = decay_of_average(index * batch_size, batch_size, optim)
            average = jax.tree.map(lambda a, p: (keep * a + (1 - keep) * p).astype(a.dtype), average, g)
        augmentation = state.augmentation
        if augment and augment.adapt and augmentation is not None:
            augmentation = augment.adapt(augmentation, of_real.logits, index)
            metrics["train/augment_probability"] = augmentation.probability
        return replace(
            state,
            generator=g,
            discriminator=d,
            average=average,
            g_stats=g_stats,
            d_stats=d_stats,
            g_opt=g_opt,
            d_opt=d_opt,
            path_length=path_length,
            augmentation=augmentation,
        ), metrics

    return step


def _at_least_float32(leaf: Array) -> Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def layer_norms(name: str, grads: PyTree) -> Metrics:
    """The norm of the gradient, and of that of each of the network's topmost parts by its name."""
    parts = {f"{name}/{part}": optax.tree.norm(leaves) for part, leaves in grads.items()}
    return {name: optax.tree.norm(grads), **(parts if len(parts) > 1 else {})}
