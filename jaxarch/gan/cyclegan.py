"""Two kinds of pictures translated into one another, learned without pairs (Zhu et al. 2017).

Two generators and two discriminators: what goes from A to B and back must be what it was. The step is one of its own,
of the same objectives and optimisers as `jaxarch.gan.training`: the discriminators learn from a history of what was
generated, which the state holds and the generators do not see, and the generators from cycles, of which the
discriminators judge only the first half.
"""

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

from jaxarch.convolution import convolve
from jaxarch.gan.convolution import DEFAULT_INIT, Convolution, TransposedConvolution
from jaxarch.gan.objectives import OBJECTIVES, ObjectiveName
from jaxarch.gan.pix2pix import NormName, PatchDiscriminator, normalized
from jaxarch.gan.training import OptimConfig, averaged, descend, direction
from jaxarch.run import ConfigError, Index, Metrics, check_least, check_not_negative

Batch = Float[Array | np.ndarray, "batch height width channels"]


# --- the generator ------------------------------------------------------------------------------


class ReflectedConvolution(nn.Module):
    """A convolution of stride 1 of the picture reflected at its edges, where zeros would be seen as a frame."""

    features: int
    size: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch height width features"]:
        kernel = self.param("kernel", DEFAULT_INIT, (self.size, self.size, x.shape[-1], self.features))
        around = (self.size // 2, self.size // 2)
        x = convolve(jnp.pad(x, [(0, 0), around, around, (0, 0)], mode="reflect"), kernel.astype(x.dtype))
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x


class ResNetGenerator(nn.Module):
    """Halves the picture a few times, changes it in residual blocks, doubles it again (Johnson et al. 2016; Zhu et al.
    2017, app. 7.2).

    It has no latents, and is a generator for paired pictures as well.

    blocks: 6 there for pictures of 128 x 128, 9 for larger ones.
    """

    channels: int
    features: int = 64
    halvings: int = 2
    blocks: int = 9
    norm: NormName = "instance"
    latent_dim: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: Any, condition: Any, *, train: bool = True) -> Float[Array, "batch h w channels"]:
        sides, step = condition.shape[1:3], 2**self.halvings
        if any(side % step or side < max(2 * step, 4) for side in sides):
            raise ConfigError(
                f"--model.halvings {self.halvings} needs pictures whose sides are multiples of {step} and at least "
                f"{max(2 * step, 4)}, not of {sides[0]} x {sides[1]}; a lower one or a larger --size would do."
            )
        plain = self.norm == "none"

        def layer(x: Array, kind: Any, name: str, **options: Any) -> Array:
            x = kind(use_bias=plain, name=name, **options)(x)
            return nn.relu(normalized(self.norm, x, train, f"{name}_norm"))

        x = layer(jnp.asarray(condition, self.dtype), ReflectedConvolution, "first", features=self.features, size=7)
        for i in range(1, self.halvings + 1):
            x = layer(x, Convolution, f"down_{i}", features=self.features * 2**i, size=3, stride=2)
        width = self.features * step
        for i in range(self.blocks):
            y = layer(x, ReflectedConvolution, f"block_{i}_0", features=width, size=3)
            y = ReflectedConvolution(width, 3, use_bias=plain, name=f"block_{i}_1")(y)
            x = x + normalized(self.norm, y, train, f"block_{i}_1_norm")
        for i in reversed(range(self.halvings)):
            x = layer(x, TransposedConvolution, f"up_{i}", features=self.features * 2**i, size=3)
        x = ReflectedConvolution(self.channels, 7, use_bias=True, name="last")(x)
        return jnp.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


@dataclass(frozen=True)
class CycleGANConfig:
    features: int = 64
    """of the generators' outermost layers"""
    halvings: int = 2
    """how often a generator halves the picture"""
    blocks: int = 9
    """residual blocks of a generator"""
    d_features: int = 64
    """of the discriminators' first layer, which later ones have up to 8 times"""
    strided: int = 3
    """layers by which a discriminator halves the picture: a logit sees 16 pixels with 1, 34 with 2, 70 with 3"""
    norm: Literal["instance", "none"] = "instance"

    def __post_init__(self) -> None:
        check_least(self, ("features", "d_features"), 1, "model.")
        check_least(self, ("halvings", "blocks", "strided"), 0, "model.")


# --- the history --------------------------------------------------------------------------------


class History(NamedTuple):
    """Generated pictures of earlier steps, of which the first `filled` are there."""

    pictures: Float[Array, "slots height width channels"]
    filled: Array


def shown(key: Key[Array, ""], history: History | None, fakes: Batch) -> tuple[Batch, History | None]:
    """What the discriminator is shown in place of these pictures, and the history after it (Shrivastava et al. 2017,
    sec. 2.3; Zhu et al. 2017, sec. 4).

    One after the other, each is stored and shown while there is room; after that, with a chance of a half, it takes
    the place of a stored one, which is shown instead. Without a history each is shown.
    """
    if history is None:
        return fakes, None
    slots = len(history.pictures)

    def one(history: History, given: tuple[Array, Array]) -> tuple[History, Array]:
        fake, key = given
        coin_key, slot_key = jax.random.split(key)
        full = history.filled == slots
        place = jnp.where(full, jax.random.randint(slot_key, (), 0, slots), history.filled)
        swap = full & jax.random.bernoulli(coin_key)
        old = history.pictures[place]
        pictures = history.pictures.at[place].set(jnp.where(swap | ~full, fake, old))
        return History(pictures, jnp.minimum(history.filled + 1, slots)), jnp.where(swap, old, fake)

    history, pictures = jax.lax.scan(one, history, (jnp.asarray(fakes), jax.random.split(key, len(fakes))))
    return pictures, history


# --- the game -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CycleConfig:
    objective: ObjectiveName = "least_squares"
    cycle: float = 10.0
    """weight of the way there and back (the paper's 10 is 5 here: its least squares are not halved)"""
    identity: float = 0.5
    """weight of leaving pictures of the kind asked for as they are, as a fraction of the cycle's"""
    history: int = 50
    """generated pictures of each kind that are kept for the discriminators (0: the new ones alone)"""

    def __post_init__(self) -> None:
        check_not_negative(self, ("cycle", "identity", "history"), "game.")


class CycleHypers(NamedTuple):
    """The numbers that a sweep may vary: the learning rate and the weights of the losses."""

    learning_rate: float | Float[Array, "*replicas"]
    ratio: float | Float[Array, "*replicas"]
    cycle: float | Float[Array, "*replicas"]
    identity: float | Float[Array, "*replicas"]


class Both(NamedTuple):
    """One of each kind: pictures; or of the networks whose samples are of that kind, so that the generator `b` makes
    pictures of kind B out of those of kind A.
    """

    a: Any
    b: Any


def cyclegan(config: CycleGANConfig, channels: Both, dtype: Any = jnp.float32) -> tuple[Both, Both]:
    """The generators of pictures of so many channels of each kind, and the discriminators."""

    def generator(channels: int) -> ResNetGenerator:
        return ResNetGenerator(channels, config.features, config.halvings, config.blocks, config.norm, dtype=dtype)

    judge = PatchDiscriminator(config.d_features, config.strided, config.norm, dtype)
    return Both(generator(channels.a), generator(channels.b)), Both(judge, judge)


@flax.struct.dataclass
class CycleState:
    """All that a checkpoint holds. Also holds shapes or a leading axis of replicas, so its types are plain.

    generators, discriminators, averages, history: `Both`; there may be no averages (None).
    """

    generators: Any
    discriminators: Any
    averages: Any
    g_opt: PyTree
    d_opt: PyTree
    history: Any
    key: Any
    hypers: Any

    @property
    def sampled(self) -> Both:
        """The generators' parameters that pictures are made with."""
        return self.generators if self.averages is None else self.averages


WEIGHTS = ("generators", "discriminators", "averages")  # of an Experiment: what --init-from fills


def hypers(game: CycleConfig, optim: OptimConfig) -> CycleHypers:
    return CycleHypers(optim.learning_rate, optim.ratio, game.cycle, game.identity)


def make_init(
    generators: Both, discriminators: Both, game: CycleConfig, optim: OptimConfig, examples: Both
) -> Callable[[Key[Array, ""], CycleHypers], CycleState]:
    """`(key, hypers) -> state` with parameters drawn from the key.

    generators, discriminators: modules, without collections other than parameters.
    examples: any pictures of both kinds.
    """
    transform, _ = direction(optim)

    def init(key: Key[Array, ""], hypers: CycleHypers) -> CycleState:
        keys = jax.random.split(key, 5)
        made = Both(
            generators.a.init(keys[0], None, examples.b)["params"],
            generators.b.init(keys[1], None, examples.a)["params"],
        )
        judges = Both(
            discriminators.a.init(keys[2], examples.a)["params"],
            discriminators.b.init(keys[3], examples.b)["params"],
        )

        def empty(pictures: Any) -> History | None:
            if not game.history:
                return None
            return History(jnp.zeros((game.history, *pictures.shape[1:])), jnp.zeros((), jnp.int32))

        return CycleState(
            generators=made,
            discriminators=judges,
            averages=made if optim.average else None,
            g_opt=transform.init(made),
            d_opt=transform.init(judges),
            history=Both(empty(examples.a), empty(examples.b)),
            key=keys[4],
            hypers=hypers,
        )

    return init


class Losses(NamedTuple):
    """Of the generators, each the sum of both directions'; and what they made."""

    adversarial: Float[Array, ""]
    cycle: Float[Array, ""]
    identity: Float[Array, ""]
    fakes: Both


Translate = Callable[[Any], Any]


def generators_losses(
    translate: Both, judge: Both, pictures: Both, objective: ObjectiveName, identity: bool = True
) -> Losses:
    """Zhu et al. 2017: of eq. 1 the generators' part, eq. 2, and the identity loss of sec. 5.2.

    translate: `b` makes pictures of kind B out of those of kind A, `a` the reverse.
    judge: pictures to logits.
    identity: whether that loss is asked for; else 0.
    """
    loss, pairs = OBJECTIVES[objective].generator, OBJECTIVES[objective].pairs
    fakes = Both(translate.a(pictures.b), translate.b(pictures.a))
    adversarial, cycle, same = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    for kind, other in (("a", "b"), ("b", "a")):
        of, to = getattr(pictures, kind), getattr(translate, kind)
        judged = getattr(judge, kind)(getattr(fakes, kind))
        adversarial += loss(judged, getattr(judge, kind)(of) if pairs else judged)
        cycle += distance(to(getattr(fakes, other)), of)
        if identity:
            same += distance(to(of), of)
    return Losses(adversarial, cycle, same, fakes)


def distance(one: Array, other: Array) -> Float[Array, ""]:
    """The mean of the absolute differences."""
    return jnp.mean(jnp.abs(one - other))


def translators(generators: Both, params: Both, train: bool) -> Both:
    """The generators with these parameters, as functions of pictures."""

    def translator(generator: nn.Module, params: PyTree) -> Translate:
        return lambda pictures: cast(Array, generator.apply({"params": params}, None, pictures, train=train))

    return Both(translator(generators.a, params.a), translator(generators.b, params.b))


def make_step(
    generators: Both,
    discriminators: Both,
    game: CycleConfig,
    optim: OptimConfig,
    prepare: Callable[[Any], Both],
    steps: int = 0,
) -> Callable[[CycleState, Any, Index], tuple[CycleState, Metrics]]:
    """One update of the generators and one of the discriminators on the same pictures: `(state, batch, index) -> ...`.

    prepare: of a batch the pictures of both kinds, as many of each.
    steps: length of the schedule, where `optim.final` is not 1.
    """
    objective = OBJECTIVES[game.objective]
    transform, _ = direction(optim)
    fraction = optax.cosine_decay_schedule(1.0, max(steps, 1), optim.final)

    def judges(params: Both) -> Both:
        def judge(discriminator: nn.Module, params: PyTree) -> Translate:
            return lambda pictures: cast(Array, discriminator.apply({"params": params}, pictures, train=True))

        return Both(judge(discriminators.a, params.a), judge(discriminators.b, params.b))

    def step(state: CycleState, batch: Any, index: Index) -> tuple[CycleState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(state.key, index), 2)
        real = prepare(batch)
        weights = state.hypers
        rate = weights.learning_rate * fraction(index)

        def g_loss(params: Both) -> tuple[Array, Losses]:
            losses = generators_losses(
                translators(generators, params, True),
                judges(state.discriminators),
                real,
                game.objective,
                game.identity > 0,
            )
            around = losses.cycle + weights.identity * losses.identity
            return losses.adversarial + weights.cycle * around, losses

        (g_value, losses), g_grads = jax.value_and_grad(g_loss, has_aux=True)(state.generators)
        generated, g_opt = descend(transform, state.generators, state.g_opt, g_grads, rate)

        fakes_a, history_a = shown(keys[0], state.history.a, losses.fakes.a)
        fakes_b, history_b = shown(keys[1], state.history.b, losses.fakes.b)

        def d_loss(params: Both) -> tuple[Array, Array]:
            judge = judges(params)
            of_real = judge.a(real.a), judge.b(real.b)
            of_fake = judge.a(fakes_a), judge.b(fakes_b)
            values = [objective.discriminator(r, f) for r, f in zip(of_real, of_fake, strict=True)]
            right = [jnp.mean(r > f, dtype=jnp.float32) for r, f in zip(of_real, of_fake, strict=True)]
            return values[0] + values[1], (right[0] + right[1]) / 2

        (d_value, accuracy), d_grads = jax.value_and_grad(d_loss, has_aux=True)(state.discriminators)
        judging, d_opt = descend(transform, state.discriminators, state.d_opt, d_grads, rate * weights.ratio)

        metrics: Metrics = {
            "train/g_loss": g_value,
            "train/d_loss": d_value,
            "train/adversarial": losses.adversarial,
            "train/cycle": losses.cycle,
            "train/d_accuracy": accuracy,
            "train/g_grad_norm": optax.tree.norm(g_grads),
            "train/d_grad_norm": optax.tree.norm(d_grads),
        }
        if game.identity > 0:
            metrics["train/identity"] = losses.identity
        return replace(
            state,
            generators=generated,
            discriminators=judging,
            averages=averaged(state.averages, generated, index, len(real.a), optim),
            g_opt=g_opt,
            d_opt=d_opt,
            history=Both(history_a, history_b),
        ), metrics

    return step
