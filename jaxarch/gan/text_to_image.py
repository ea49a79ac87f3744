"""Pictures from texts: a generator and a discriminator that are told what a picture is to show.

What a text means for pictures is learned first, or at the same time, from true pairs alone: a `Matcher` of two
encoders, of which a picture's vector and its text's are to be nearer than those of other pairs (Radford et al. 2021,
fig. 3). The vector of the text, at which the game's gradients stop, is the condition of both players; the
discriminator has to refuse true pictures with the wrong text too (Reed et al. 2016, "Generative adversarial text to
image synthesis", alg. 1; `GameConfig.mismatch`).

The encoder of the texts is passed in: a Linen module, or none where texts come as vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import gammaln
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxarch.data.images import scaled
from jaxarch.gan import training
from jaxarch.gan.convolution import Convolution, TransposedConvolution
from jaxarch.gan.dcgan import SMALLEST, widths
from jaxarch.gan.layout import examples, used
from jaxarch.gan.training import Augment, GameConfig, GANState, Hypers, OptimConfig
from jaxarch.run.protocol import Index, Metrics

CANDIDATES = 100  # texts among which a picture's own is sought (Xu et al. 2018, sec. 4)


class Texts(NamedTuple):
    """Texts as tokens for an encoder, or as what a fixed encoder made of each token; mask: 1, of padding 0."""

    tokens: Int[Array | np.ndarray, "batch length"] | Float[Array | np.ndarray, "batch length dim"]
    mask: Int[Array | np.ndarray, "batch length"]


class Captions(NamedTuple):
    """A batch: pictures and their texts."""

    pixels: UInt8[Array | np.ndarray, "batch height width channels"]
    texts: Texts


# --- what a text means for pictures ---------------------------------------------------------------


class Matcher(nn.Module):
    """A text and a picture as vectors of length 1.

    text: called with `tokens, segments=mask`; what it returns has the tokens' vectors `hidden`. None: the tokens are
        vectors. A text's vector is a dense layer's of their mean.
    features: of the picture's encoder at half the size; twice as many at each further halving.
    """

    text: nn.Module | None
    dim: int
    features: int = 32

    def setup(self) -> None:
        self.of_text = nn.Dense(self.dim)
        self.of_picture = nn.Dense(self.dim)
        self.convolutions = [Convolution(self.features << n, 4, 2, use_bias=True) for n in range(3)]
        self.log_scale = self.param("log_scale", nn.initializers.constant(jnp.log(10.0)), ())

    def __call__(
        self, pictures: Float[Array, "batch size size channels"], texts: Texts
    ) -> tuple[Float[Array, "batch dim"], Float[Array, "batch dim"], Float[Array, ""]]:
        """Vectors of the pictures and of the texts, and what their products are multiplied by to be logits."""
        return self.look(pictures), self.read(texts), jnp.exp(self.log_scale)

    def read(self, texts: Texts) -> Float[Array, "batch dim"]:
        tokens, mask = map(jnp.asarray, texts)
        hidden = tokens if self.text is None else cast(Any, self.text)(tokens, segments=mask).hidden
        weights = mask[..., None].astype(hidden.dtype)
        mean = (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        return unit(self.of_text(mean))

    def look(self, pictures: Float[Array, "batch size size channels"]) -> Float[Array, "batch dim"]:
        x = pictures
        for convolution in self.convolutions:
            x = nn.relu(unit(convolution(x)) * x.shape[-1] ** 0.5)
        return unit(self.of_picture(x.reshape(len(x), -1)))


def unit(vectors: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Of length 1."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, -1, keepdims=True) + 1e-8)


def matching_loss(
    pictures: Float[Array, "batch dim"], texts: Float[Array, "batch dim"], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """The mean cross-entropy of a picture's text among the batch's, and of a text's picture (Radford et al. 2021)."""
    logits = scale * pictures @ texts.T
    own = jnp.diagonal(logits)
    return jnp.mean(jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0) - 2 * own) / 2


def r_precision(
    pictures: Float[Array, "batch dim"], texts: Float[Array, "batch dim"], candidates: int = CANDIDATES
) -> Float[Array, ""]:
    """The probability that of `candidates` texts, its own and others drawn at random, a picture is nearest to its own
    (R-precision of Xu et al. 2018, sec. 4). Chance is 1 / candidates.

    Exact, without drawing: of n - 1 other texts w are as near or nearer; that none of these is among c - 1 drawn ones
    has the probability C(n - 1 - w, c - 1) / C(n - 1, c - 1).
    """
    count = len(texts)
    if not 1 < candidates <= count:
        raise ValueError(f"{candidates} candidates cannot be drawn of {count} texts.")
    similar = pictures @ texts.T
    nearer = jnp.sum(similar >= jnp.diagonal(similar)[:, None], 1) - 1
    left, drawn = count - 1 - nearer, candidates - 1
    log_ways = gammaln(left + 1) - gammaln(jnp.maximum(left - drawn, 0) + 1) - gammaln(count) + gammaln(count - drawn)
    return jnp.mean(jnp.where(left >= drawn, jnp.exp(log_ways), 0.0))


# --- the players ----------------------------------------------------------------------------------


class Generator(nn.Module):
    """Latents and a text's vector to pictures in (-1, 1), through transposed convolutions.

    Before each the features of a pixel are brought to the same length (Karras et al. 2018, sec. 4.2), scaled and
    shifted by what both inputs say (Tao et al. 2022, sec. 3.3).
    """

    size: int
    channels: int
    latent_dim: int = 64
    features: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch latent_dim"],
        condition: Float[Array, "batch dim"] | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, "batch size size channels"]:
        said = jnp.concatenate([latents, cast(Array, condition)], -1).astype(self.dtype)
        *rest, first = widths(self.size, self.features)
        x = nn.Dense(SMALLEST * SMALLEST * first, dtype=self.dtype, name="dense")(said)
        x = x.reshape(-1, SMALLEST, SMALLEST, first)

        def styled(x: Array, number: int) -> Array:
            style = nn.Dense(2 * x.shape[-1], dtype=self.dtype, name=f"style_{number}")(said)[:, None, None]
            scale, shift = jnp.split(style, 2, -1)
            return nn.relu(unit(x) * x.shape[-1] ** 0.5 * (1 + scale) + shift)

        for number, width in enumerate([*rest[::-1], max(self.features // 2, 1)]):
            x = TransposedConvolution(width, name=f"up_{number}")(styled(x, number))
        # Not transposed: what overlaps in one would be seen as a chequered pattern.
        return jnp.tanh(Convolution(self.channels, 3, use_bias=True, name="picture")(styled(x, len(rest) + 1)))


class Discriminator(nn.Module):
    """Pictures and texts' vectors to logits: how real it is, and the product of what is seen with what is said
    (projection, Miyato & Koyama 2018, eq. 4).
    """

    features: int = 32
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        samples: Float[Array, "batch size size channels"],
        condition: Float[Array, "batch dim"] | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, " batch"]:
        x = samples.astype(self.dtype)
        said = cast(Array, condition).astype(self.dtype)
        for number, width in enumerate(widths(x.shape[1], self.features)):
            x = nn.leaky_relu(Convolution(width, 4, 2, use_bias=True, name=f"down_{number}")(x), 0.2)
        x = x.reshape(len(x), -1)
        seen = nn.Dense(said.shape[-1], dtype=self.dtype, name="seen")(x)
        wanted = nn.Dense(said.shape[-1], dtype=self.dtype, name="wanted")(said)
        logits = nn.Dense(1, dtype=self.dtype, name="logit")(x)[:, 0]
        return logits + jnp.sum(seen * wanted, -1) / said.shape[-1] ** 0.5


# --- the game -------------------------------------------------------------------------------------


@flax.struct.dataclass
class State(GANState):
    """That of a GAN; the matcher's parameters and its optimiser's state."""

    matcher: PyTree
    matcher_opt: PyTree


WEIGHTS = (*training.WEIGHTS, "matcher")  # of an Experiment: what --init-from fills


def make_init(
    generator: nn.Module,
    discriminator: nn.Module,
    matcher: Matcher,
    game: GameConfig,
    optim: OptimConfig,
    batch: Captions,
    augment: Augment | None = None,
) -> Callable[[Key[Array, ""], Hypers], State]:
    """`(key, hypers) -> state`.

    batch: any, of the shapes that a step is given.
    """
    pictures = jnp.zeros(batch.pixels.shape)
    told = jnp.zeros((len(pictures), matcher.dim))
    begin = training.make_init(generator, discriminator, game, optim, pictures, told, augment)

    def init(key: Key[Array, ""], hypers: Hypers) -> State:
        key, matcher_key = jax.random.split(key)
        state = begin(key, hypers)
        params = matcher.init(matcher_key, pictures, batch.texts)["params"]
        return State(**vars(state), matcher=params, matcher_opt=optax.scale_by_adam().init(params))

    return init


def make_step(
    generator: nn.Module,
    discriminator: nn.Module,
    matcher: Matcher,
    game: GameConfig,
    optim: OptimConfig,
    matching_rate: float,
    matching_steps: int,
    steps: int,
    augment: Augment | None = None,
) -> Callable[[State, Captions, Index], tuple[State, Metrics]]:
    """A step of the matcher, in the first `matching_steps`, and one of the game (`training.make_step`).

    matching_rate: the matcher's learning rate at first; it falls to 0 along a cosine.
    """
    play = training.make_step(generator, discriminator, game, optim, lambda batch: batch, steps, augment)
    rate = optax.cosine_decay_schedule(matching_rate, max(matching_steps, 1))
    adam = optax.scale_by_adam()

    def step(state: State, batch: Captions, index: Index) -> tuple[State, Metrics]:
        pictures = examples(scaled(batch.pixels))

        def loss(params: PyTree) -> Array:
            seen, said, scale = cast(Any, matcher.apply({"params": used(params)}, pictures, batch.texts))
            return matching_loss(seen, said, scale)

        def match(params: PyTree, opt: PyTree) -> tuple[PyTree, PyTree, Array]:
            value, grads = jax.value_and_grad(loss)(params)
            return *training.descend(adam, params, opt, grads, jnp.asarray(rate(index))), value

        due = index < matching_steps
        params, opt, value = jax.lax.cond(
            due, match, lambda params, opt: (params, opt, jnp.zeros(())), state.matcher, state.matcher_opt
        )
        state = state.replace(matcher=params, matcher_opt=opt)  # type: ignore[reportAttributeAccessIssue]
        state, metrics = cast(Any, play(state, (pictures, told(matcher, params, batch.texts)), index))
        weight = due.astype(value.dtype)
        return state, {**metrics, "train/matching_loss": training.Mean(value * weight, weight)}

    return step


def told(matcher: Matcher, params: PyTree, texts: Texts) -> Float[Array, "batch dim"]:
    """What the players are told: the texts' vectors, of numbers of size 1."""
    return cast(Array, matcher.apply({"params": used(params)}, texts, method="read")) * matcher.dim**0.5


def make_drawing(generator: nn.Module, matcher: Matcher) -> Callable[[State, Array, Texts], Array]:
    """`(state, latents, texts) -> pictures` of the averaged generator."""
    sample = training.make_sampler(generator)
    return lambda state, latents, texts: sample(state, latents, told(matcher, state.matcher, texts))


def obedience(
    matcher: Matcher, params: PyTree, pictures: Float[Array, "batch size size channels"], texts: Texts
) -> Float[Array, ""]:
    """`r_precision` of pictures for the texts that they were to show, by the matcher's eyes."""
    seen, said, _ = cast(Any, matcher.apply({"params": used(params)}, pictures, texts))
    return r_precision(seen, said, min(CANDIDATES, len(said)))
