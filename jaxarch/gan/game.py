"""The rules of a game of two networks: what each player minimises, as pure functions of both players' parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.gan.augmentation import AugmentationState
from jaxarch.gan.layout import examples, used
from jaxarch.gan.objectives import OBJECTIVES, Logits, ObjectiveName, auxiliary_loss
from jaxarch.gan.regularizers import consistency, gradient_at, gradient_penalty, path_length_penalty, path_lengths
from jaxarch.run import ConfigError, Index, check_least, check_not_negative

PenaltyName = Literal["none", "r1", "r2", "r1_r2", "gradient"]
DECAY = 0.01  # of the running mean of path lengths
Samples = PyTree  # pictures, or points: arrays with a leading axis of samples
Condition = PyTree  # what is asked for: labels, a picture, encoded text; None


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
        check_least(self, ("penalty_every", "critics", "pack", "path_length_every"), 1, "game.")
        weights = ("gamma", "gamma_final", "clip", "unroll", "consistency", "mismatch", "auxiliary", "path_length")
        check_not_negative(self, weights, "game.")
        if self.reuse_fakes and self.unroll:
            raise ConfigError("--game.reuse-fakes and --game.unroll exclude each other; leave one of them out.")


class Augment(NamedTuple):
    """What is done to all samples before the discriminator sees them, in both players' steps.

    apply: `(key, samples, probability) -> samples`, differentiable.
    adapt: `(state, logits of real samples, index) -> state`; None: the probability stays at 1.
    """

    apply: Callable[[Key[Array, ""], Samples, Float[Array, ""]], Samples]
    adapt: Callable[[AugmentationState, Logits, Index], AugmentationState] | None = None


class Game(NamedTuple):
    """The networks and the rules.

    extra: `(generated, real, condition) -> loss`, one more term of the generator's.
    """

    generator: nn.Module
    discriminator: nn.Module
    config: GameConfig
    augment: Augment | None = None
    extra: Callable[[Samples, Samples, Condition], Float[Array, ""]] | None = None


class Seen(NamedTuple):
    """What both players are shown: real samples, what they are of, the probability that each is augmented."""

    real: Samples
    condition: Condition
    probability: Float[Array, ""]


class Verdict(NamedTuple):
    """What a discriminator says of a batch: its logits, an auxiliary classifier's, its statistics after."""

    logits: Logits
    class_logits: Float[Array, "batch classes"] | None
    stats: PyTree


def packed(samples: Samples, number: int) -> Samples:
    """Each `number` samples of a batch as one, joined along the last axis (Lin et al. 2018, sec. 3)."""

    def pack(leaf: Array | np.ndarray) -> Array | np.ndarray:
        if number == 1:
            return leaf
        grouped = jnp.moveaxis(leaf.reshape(-1, number, *leaf.shape[1:]), 1, -2)
        return grouped.reshape(*grouped.shape[:-2], -1)

    return jax.tree.map(pack, samples)


def latents_of(generator: nn.Module, key: Key[Array, ""], count: int) -> Float[Array, "batch dim"]:
    """Drawn from N(0, I), as many numbers as the generator takes."""
    return examples(jax.random.normal(key, (count, cast(Any, generator).latent_dim)))


def streams(key: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
    """A key for each kind of randomness that a network may ask for."""
    return dict(zip(("noise", "mixing", "dropout"), jax.random.split(key, 3), strict=True))


def generate(
    generator: nn.Module, params: PyTree, stats: PyTree, latents: Array, condition: Condition, key: Key[Array, ""]
) -> tuple[Samples, PyTree]:
    """Samples as in training, and the generator's other collections after them."""
    variables = {"params": used(params), **stats}
    samples, stats = cast(
        Any, generator.apply(variables, latents, condition, train=True, rngs=streams(key), mutable=list(stats))
    )
    return examples(samples), stats


def judge(
    game: Game, params: PyTree, stats: PyTree, samples: Samples, seen: Seen, key: Key[Array, ""], augmented: bool = True
) -> Verdict:
    """What the discriminator says of samples that were asked for by the condition of `seen`."""
    augment_key, key = jax.random.split(key)
    if game.augment and augmented:
        samples = game.augment.apply(augment_key, samples, seen.probability)
    said, stats = cast(
        Any,
        game.discriminator.apply(
            {"params": used(params), **stats},
            examples(packed(samples, game.config.pack)),
            seen.condition,
            train=True,
            rngs=streams(key),
            mutable=list(stats),
        ),
    )
    logits, class_logits = said if isinstance(said, tuple) else (said, None)
    # Losses and penalties are sums of many small terms: in the precision of the parameters.
    return Verdict(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), class_logits, stats)


def penalty(
    game: Game, params: PyTree, stats: PyTree, fake: Samples, seen: Seen, key: Key[Array, ""]
) -> Float[Array, ""]:
    """On the gradient of the discriminator's logits, without the weight gamma."""
    keys = jax.random.split(key, 3)

    def critic(samples: Samples, key: Array) -> Array:
        return judge(game, params, stats, samples, seen, key).logits

    total = jnp.zeros(())
    if game.config.penalty in ("r1", "r1_r2"):
        total += gradient_at(lambda x: critic(x, keys[0]), seen.real) / 2
    if game.config.penalty in ("r2", "r1_r2"):
        total += gradient_at(lambda x: critic(x, keys[1]), fake) / 2
    if game.config.penalty == "gradient":
        total += gradient_penalty(lambda x: critic(x, keys[1]), seen.real, fake, keys[2])
    return total


def discriminator_loss(
    game: Game,
    params: PyTree,
    stats: PyTree,
    fake: Samples,
    seen: Seen,
    key: Key[Array, ""],
    gamma: float | Float[Array, ""],
) -> tuple[Float[Array, ""], tuple[Verdict, Verdict, Float[Array, ""]]]:
    """The loss; beside it the verdicts on real and generated samples, and the penalty where each step has it."""
    rules, objective, keys = game.config, OBJECTIVES[game.config.objective], jax.random.split(key, 4)
    of_real = judge(game, params, stats, seen.real, seen, keys[0])
    of_fake = judge(game, params, of_real.stats, fake, seen, keys[1])
    loss = objective.discriminator(of_real.logits, of_fake.logits)
    if rules.mismatch:
        # Reed et al. 2016, "Generative adversarial text to image synthesis", alg. 1: a third kind of pair.
        others = seen._replace(condition=jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), seen.condition))
        wrong = judge(game, params, stats, seen.real, others, jax.random.fold_in(key, 4)).logits
        loss += rules.mismatch * objective.discriminator(of_real.logits, wrong)
    if of_real.class_logits is not None:
        # Of real samples alone; Odena et al. have generated ones too, which teach it the generator's errors.
        loss += rules.auxiliary * auxiliary_loss(of_real.class_logits, seen.condition)
    if rules.consistency:
        plain = judge(game, params, stats, seen.real, seen, keys[3], augmented=False)
        loss += rules.consistency * consistency(plain.logits, of_real.logits)
    penalized = jnp.zeros(())
    if rules.penalty != "none" and rules.penalty_every == 1:
        penalized = penalty(game, params, stats, fake, seen, keys[2])
        loss += gamma * penalized
    return loss, (of_real, of_fake, penalized)


def generator_loss(
    game: Game, params: PyTree, stats: PyTree, fake: Samples, seen: Seen, keys: Key[Array, "2"]
) -> Float[Array, ""]:
    """params, stats: the discriminator's."""
    objective = OBJECTIVES[game.config.objective]
    of_fake = judge(game, params, stats, fake, seen, keys[0])
    of_real = judge(game, params, stats, seen.real, seen, keys[1]) if objective.pairs else of_fake
    loss = objective.generator(of_fake.logits, of_real.logits)
    if of_fake.class_logits is not None:
        loss += game.config.auxiliary * auxiliary_loss(of_fake.class_logits, seen.condition)
    if game.extra is not None:
        loss += game.extra(fake, seen.real, seen.condition)
    return loss


def path_length_loss(
    game: Game,
    params: PyTree,
    stats: PyTree,
    condition: Condition,
    count: int,
    mean: Float[Array, ""],
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The penalty of a generator with the methods `mapping` and `synthesis`; its new mean, and the batch's.

    count: of latents that are drawn; condition: of at least as many.
    """
    generator, variables, draw = game.generator, {"params": params, **stats}, jax.random.fold_in
    latents = latents_of(generator, draw(key, 0), count)
    some = jax.tree.map(lambda leaf: leaf[:count], condition)
    noises = streams(draw(key, 1))
    # `mutable`: what training would move (the mean style) is moved by the players' own passes alone.
    styles, _ = cast(
        Any,
        generator.apply(variables, latents, some, train=True, rngs=noises, mutable=list(stats), method="mapping"),
    )

    def synthesize(styles: Array) -> Array:
        return cast(Array, generator.apply(variables, styles, train=True, rngs=noises, method="synthesis"))

    lengths = path_lengths(synthesize, styles, draw(key, 2))
    value, mean = path_length_penalty(lengths, mean, DECAY)
    return value, (mean, jnp.mean(lengths))
