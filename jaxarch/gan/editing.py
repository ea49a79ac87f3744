"""What can be done with the latents and the styles of a trained generator.

Styles are `[batch, layers, dim]`: W where all layers of a picture have the same one, W+ where they need not. What works
on styles asks for a generator with the methods `mapping` and `synthesis` (`jaxarch.gan.stylegan2`); drawing towards the
mean style is `truncated` there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.gan.stylegan2 import Noise
from jaxarch.run.protocol import ConfigError, check_least

Styles = Float[Array, "batch layers dim"]
Pictures = Float[Array, "batch height width channels"]


def has_styles(generator: nn.Module) -> bool:
    return hasattr(generator, "mapping") and hasattr(generator, "synthesis")


def styles_of(
    generator: nn.Module,
    variables: PyTree,
    latents: Float[Array, "batch latents"],
    condition: Int[Array, " batch"] | None = None,
    truncation: float | Float[Array, ""] = 1.0,
) -> Styles:
    options = {"train": False, "truncation": truncation, "method": "mapping"}
    return cast(Array, generator.apply(variables, latents, condition, **options))


def synthesized(generator: nn.Module, variables: PyTree, styles: Styles, noise: Noise | None = None) -> Pictures:
    return cast(Array, generator.apply(variables, styles, train=False, noise=noise, method="synthesis"))


# --- mixing and interpolation -------------------------------------------------------------------


def mixed(base: Styles, other: Styles, layers: Sequence[int]) -> Styles:
    """`base` with the other styles in these layers (Karras et al. 2019, sec. 3.1). Early ones are of coarse things."""
    chosen = jnp.zeros(base.shape[1], bool).at[jnp.asarray(list(layers), int)].set(True)
    return jnp.where(chosen[:, None], other, base)


def mixing_grid(
    rows: Float[Array, "rows layers dim"], columns: Float[Array, "columns layers dim"], layers: Sequence[int]
) -> Float[Array, "rows columns layers dim"]:
    """In each cell its row's styles with its column's in these layers."""
    return jax.vmap(lambda row: mixed(jnp.broadcast_to(row, columns.shape), columns, layers))(rows)


def linear(
    one: Float[Array, "*shape"], other: Float[Array, "*shape"], share: float | Float[Array, ""]
) -> Float[Array, "*shape"]:
    """From `one` at share 0 to the other at 1; for styles."""
    return one + share * (other - one)


def spherical(
    one: Float[Array, "*batch dim"], other: Float[Array, "*batch dim"], share: float | Float[Array, ""]
) -> Float[Array, "*batch dim"]:
    """Along the great circle, the length between the two (Shoemake 1985; White 2016); for latents of N(0, I).

    On the straight line between them lengths are rarer the nearer its middle: the generator knows no such latents.
    """
    lengths = [jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (one, other)]
    a, b = (x / jnp.maximum(length, 1e-12) for x, length in zip((one, other), lengths))
    # By both half chords: the arc cosine of a product near 1 loses half its digits.
    angle = 2 * jnp.arctan2(jnp.linalg.norm(a - b, axis=-1), jnp.linalg.norm(a + b, axis=-1))[..., None]
    near = jnp.sin(angle) < 1e-6
    sine = jnp.where(near, 1.0, jnp.sin(angle))
    turned = (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / sine
    return jnp.where(near, linear(a, b, share), turned) * linear(lengths[0], lengths[1], share)


def through(
    points: Float[Array, "points *shape"], between: Callable[..., Array], frames: int
) -> Float[Array, "frames *shape"]:
    """From each point to the next and from the last to the first, in `frames` steps each: a film without end."""
    following = jnp.roll(points, -1, axis=0)
    shares = jnp.arange(frames) / frames
    film = jax.vmap(lambda one, other: jax.vmap(lambda share: between(one, other, share))(shares))(points, following)
    return film.reshape(-1, *points.shape[1:])


# --- directions ---------------------------------------------------------------------------------


def directions(
    params: PyTree, count: int, layers: Sequence[int] | None = None
) -> tuple[Float[Array, "count dim"], Float[Array, " count"]]:
    """The directions in which the styles that convolutions see move most, at right angles, and how much (SeFa).

    The eigenvectors of A^T A with the largest eigenvalues, where A stacks the affine maps of the layers from a style to
    the scales of a convolution's inputs (Shen & Zhou 2021, eq. 4 to 6).

    params: of a StyleGAN2 generator.
    layers: places among its convolutions, the first one 0; None: all. Those of ToRGB, colours alone, are left out.
    """
    names = [name for name in params if name.startswith("convs_")]
    names.sort(key=lambda name: [int(part) for part in name.split("_")[1:]])
    ordered = [params[name]["affine"]["kernel"] for name in names]
    if layers is not None:
        if not layers or min(layers) < 0 or max(layers) >= len(ordered):
            raise ConfigError(f"--layers must be of the convolutions 0 to {len(ordered) - 1}.")
        ordered = [ordered[layer] for layer in layers]
    stacked = jnp.concatenate(ordered, axis=1)
    count = min(count, len(stacked))
    vectors, values, _ = jnp.linalg.svd(stacked, full_matrices=True)
    sizes = jnp.zeros(len(stacked)).at[: len(values)].set(values)
    return vectors.T[:count], sizes[:count] ** 2


def moved(
    styles: Styles,
    direction: Float[Array, " dim"],
    amount: float | Float[Array, ""],
    layers: Sequence[int] | None = None,
) -> Styles:
    """Styles so far along a direction, in these layers (None: all)."""
    further = styles + amount * direction
    return further if layers is None else mixed(styles, further, layers)


# --- the styles of a given picture --------------------------------------------------------------


@dataclass(frozen=True)
class ProjectionConfig:
    """Karras et al. 2020, app. D."""

    steps: int = 1000
    learning_rate: float = 0.1
    """of Adam; rises over the first 5 % of the steps, falls to 0 over the last 25 %"""
    free: bool = False
    """a style for each layer (W+) instead of one for all (W)"""
    spread: float = 0.05
    """deviation of what is added to styles at the start, as a part of their own deviation; gone after 75 % of steps"""
    regularization: float = 1e5
    """weight of what keeps noise noise"""
    latents: int = 10_000
    """drawn to find the mean style and the deviation"""

    def __post_init__(self) -> None:
        check_least(self, ("steps", "latents"), 1)
        for name in ("learning_rate", "spread", "regularization"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name):g} is not 0 or above.")


class Projection(NamedTuple):
    """The styles after each step, the noise at the end, and the distance of each picture that a step began with."""

    styles: Float[Array, "steps batch layers dim"]
    noise: dict[str, Array]
    distances: Float[Array, "steps batch"]

    @property
    def found(self) -> Styles:
        return self.styles[-1]


Features = Callable[[Pictures], Float[Array, "batch features"]]


def pixels(pictures: Pictures) -> Float[Array, "batch features"]:
    """The pictures themselves as features: squared distances are mean squared errors."""
    flat = pictures.reshape(len(pictures), -1)
    return flat / flat.shape[1] ** 0.5


def projected(
    generator: nn.Module,
    variables: PyTree,
    targets: Pictures,
    key: Key[Array, ""],
    config: ProjectionConfig = ProjectionConfig(),
    condition: Int[Array, " batch"] | None = None,
    features: Features = pixels,
) -> Projection:
    """Styles and noise whose pictures look like the targets, each on its own (Karras et al. 2020, sec. 5, app. D).

    features: squared distances between them are what is made small; a network's are nearer to what people see.
    """
    start_key, noise_key, key = jax.random.split(key, 3)
    mean, deviation = style_statistics(generator, variables, start_key, config.latents, len(targets), condition)
    shapes = cast(Any, generator).noise_shapes()
    layers = cast(Any, generator).layers
    styles = jnp.tile(mean[:, None], (1, layers if config.free else 1, 1))
    keys = jax.random.split(noise_key, len(shapes))
    noise = {
        name: jax.random.normal(own, (len(targets), *shape[1:]))
        for own, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    wanted = features(targets)
    adam = optax.scale_by_adam()

    def loss(found: tuple[Array, dict[str, Array]], key: Key[Array, ""], size: Array) -> tuple[Array, Array]:
        styles, noise = found
        shaken = styles + size * deviation[:, None, None] * jax.random.normal(key, styles.shape)
        whole = jnp.broadcast_to(shaken, (len(styles), layers, styles.shape[-1]))
        distance = jnp.sum((features(synthesized(generator, variables, whole, noise)) - wanted) ** 2, axis=1)
        regular = sum((correlation(one) for one in noise.values()), jnp.zeros(len(styles)))
        # Sums, so that no picture's search knows of another's.
        return jnp.sum(distance + config.regularization * regular), distance

    def step(carry: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], tuple[Array, Array]]:
        found, opt = carry
        time = index / config.steps
        size = config.spread * jnp.maximum(1 - time / 0.75, 0) ** 2
        rate = jnp.minimum(1, (time + 1 / config.steps) / 0.05) * ramp_down(time)
        (_, distance), grads = jax.value_and_grad(loss, has_aux=True)(found, jax.random.fold_in(key, index), size)
        updates, opt = adam.update(grads, opt)
        found = jax.tree.map(lambda x, u: x - config.learning_rate * rate * u, found, updates)
        styles, noise = found
        found = styles, jax.tree.map(standardized, noise)
        return (found, opt), (styles, distance)

    start = (styles, noise)
    ((styles, noise), _), (history, distances) = jax.lax.scan(step, (start, adam.init(start)), jnp.arange(config.steps))
    return Projection(
        jnp.broadcast_to(history, (config.steps, len(targets), layers, styles.shape[-1])), noise, distances
    )


def ramp_down(time: Float[Array, "*steps"]) -> Float[Array, "*steps"]:
    """1, and over the last quarter along half a cosine to 0."""
    return 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1, (1 - time) / 0.25))


def style_statistics(
    generator: nn.Module,
    variables: PyTree,
    key: Key[Array, ""],
    latents: int,
    count: int,
    condition: Int[Array, " count"] | None = None,
) -> tuple[Float[Array, "count dim"], Float[Array, " count"]]:
    """The mean style, and the root of the mean squared distance from it; with labels, of each picture's own."""
    z = jax.random.normal(key, (latents, cast(Any, generator).latent_dim))

    def of_one(label: Array | None) -> tuple[Array, Array]:
        labels = None if label is None else jnp.broadcast_to(label, (latents,))
        styles = styles_of(generator, variables, z, labels)[:, 0]
        mean = styles.mean(0)
        return mean, jnp.sqrt(jnp.mean(jnp.sum((styles - mean) ** 2, axis=1)))

    if condition is None:
        mean, deviation = of_one(None)
        return jnp.tile(mean, (count, 1)), jnp.tile(deviation, count)
    return jax.lax.map(of_one, condition)


def correlation(noise: Float[Array, "batch height width 1"]) -> Float[Array, " batch"]:
    """How much pixels say of their neighbours, on this scale and coarser ones (Karras et al. 2020, app. D).

    The squared means of products with the next pixel along each axis, around the edge; then the same of means of 2 x 2
    pixels, twice as large as they are so that their variance is 1, down to 8 x 8 pixels.
    """
    total = jnp.zeros(len(noise))
    while True:
        for axis in (1, 2):
            total = total + jnp.mean(noise * jnp.roll(noise, 1, axis), axis=(1, 2, 3)) ** 2
        if noise.shape[1] <= 8:
            return total
        batch, height, width, _ = noise.shape
        noise = 2 * noise.reshape(batch, height // 2, 2, width // 2, 2, 1).mean((2, 4))


def standardized(noise: Float[Array, "batch height width 1"]) -> Float[Array, "batch height width 1"]:
    """Each picture's with mean 0 and variance 1."""
    centred = noise - noise.mean((1, 2, 3), keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=(1, 2, 3), keepdims=True) + 1e-12)
