"""StyleGAN2 (Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN"), for any size 4, 8, 16 ...

A mapping turns latents into styles, one for each convolution of the synthesis, and the synthesis turns styles into
pictures. Both are methods of the generator, so that styles can be mixed, truncated, searched and penalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxarch.gan.minibatch import minibatch_deviation
from jaxarch.gan.resampling import convolved, convolved_down, convolved_up, downsampled, upsampled
from jaxarch.run.protocol import ConfigError, check_least, check_not_negative

Labels = Int[Array | np.ndarray, " batch"]
Noise = Mapping[str, Array]  # of each layer by its name, [1 or batch, height, width, 1]
AVERAGE = 0.995  # the share of the mean style that a step keeps
ROOT2 = 2**0.5


@dataclass(frozen=True)
class StyleGAN2Config:
    """Both networks, in the words of the command line; the paper's are 512, 512, 8, 32768, 512.

    Raises ConfigError where the numbers do not fit.
    """

    latent_dim: int = 64
    style_dim: int = 64
    mapping_layers: int = 4
    channel_base: int = 512
    """a layer on n x n pixels has this / n channels"""
    channel_max: int = 64
    """and not more than this"""
    generator: Literal["skip", "resnet", "orig"] = "skip"
    """pictures are a sum over resolutions, or made of features that are, or neither"""
    discriminator: Literal["resnet", "skip", "orig"] = "resnet"
    """likewise of what it reads"""
    mapping_rate: float = 0.01
    """of the learning rate, for the mapping"""
    mixing: float = 0.9
    """the part of the pictures in training made with two styles"""
    group: int = 4
    """pictures whose deviation from each other the discriminator is shown (1: none)"""
    clamp: float = 0.0
    """largest activation (0: no bound); 256 is usual in bf16"""

    def __post_init__(self) -> None:
        check_least(
            self, ("latent_dim", "style_dim", "mapping_layers", "channel_base", "channel_max", "group"), 1, "model."
        )
        if not 0 < self.mapping_rate < float("inf"):
            raise ConfigError(f"--model.mapping-rate {self.mapping_rate:g} is not above 0; 0.01 is usual.")
        if not 0 <= self.mixing <= 1:
            raise ConfigError(f"--model.mixing {self.mixing:g} is not in [0, 1]; 0.9 is usual.")
        check_not_negative(self, ("clamp",), "model.")

    def channels(self, resolution: int) -> int:
        return min(max(self.channel_base // resolution, 1), self.channel_max)


def resolutions(image: tuple[int, int, int]) -> list[int]:
    """4, 8, ... up to the picture's height. Raises ConfigError where it is not square or no power of two."""
    height, width, _ = image
    if height != width or height < 4 or height & (height - 1):
        raise ConfigError(
            f"pictures of {height} x {width} pixels are not square, of 4, 8, 16 ... pixels; --size 32 is."
        )
    return [2**power for power in range(2, height.bit_length())]


# --- the mathematics ----------------------------------------------------------------------------


def unit(x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """Each row divided by the root of its mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-8)


def activated(x: Float[Array, "*shape"], gain: float = 1.0, clamp: float = 0.0) -> Float[Array, "*shape"]:
    """Leaky ReLU of slope 0.2, scaled to keep the mean square of what is drawn from N(0, 1), within +-clamp."""
    x = jax.nn.leaky_relu(x, 0.2) * (ROOT2 * gain)
    return bounded(x, clamp * gain)


def bounded(x: Float[Array, "*shape"], clamp: float) -> Float[Array, "*shape"]:
    return jnp.clip(x, -clamp, clamp) if clamp else x


def modulated_convolution(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "rows columns inputs outputs"],
    styles: Float[Array, "batch inputs"],
    demodulate: bool = True,
    up: bool = False,
) -> Float[Array, "batch new_height new_width outputs"]:
    """A convolution whose kernel is, for each picture, scaled by its style (Karras et al. 2020, eq. 1).

    demodulate: divided so that what comes in with unit variance goes out with it (eq. 3).
    up: to twice the size.
    What scales a kernel's inputs and outputs scales the picture's just as well: one kernel then serves the batch, which
    is several times as fast as one kernel a picture.
    """
    x = x * styles[:, None, None].astype(x.dtype)
    x = (convolved_up if up else convolved)(x, kernel.astype(x.dtype))
    if demodulate:
        scale = jax.lax.rsqrt(styles**2 @ jnp.sum(kernel**2, axis=(0, 1)) + 1e-8)
        x = x * scale[:, None, None].astype(x.dtype)
    return x


def at_least_float32(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def truncated(
    styles: Float[Array, "batch layers dim"], average: Float[Array, " dim"], truncation: float | Float[Array, ""]
) -> Float[Array, "batch layers dim"]:
    """Styles drawn towards the mean one, which 0 gives and 1 leaves out (Karras et al. 2019, app. B)."""
    return average + truncation * (styles - average)


# --- layers with an equalised learning rate -----------------------------------------------------
# Parameters are drawn from N(0, 1) and scaled where they are used, so that Adam's steps, all of one size, move each
# layer by the same part (Karras et al. 2018, sec. 4.1).


class Dense(nn.Module):
    """x kernel + bias.

    bias: its value at the start.
    rate: of the learning rate.
    active: followed by the leaky ReLU.
    """

    features: int
    bias: float = 0.0
    rate: float = 1.0
    active: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        kernel = self.param("kernel", nn.initializers.normal(1 / self.rate), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.constant(self.bias), (self.features,))
        x = x @ (kernel * (self.rate * x.shape[-1] ** -0.5)) + bias * self.rate
        return activated(x) if self.active else x


class Conv(nn.Module):
    """A convolution, to twice or half the size where `resample` says so; linear or with the leaky ReLU."""

    features: int
    size: int = 3
    resample: Literal["up", "down", "none"] = "none"
    active: bool = True
    gain: float = 1.0
    clamp: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width features"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        kernel = (kernel * (self.size**2 * x.shape[-1]) ** -0.5).astype(x.dtype)
        x = {"up": convolved_up, "down": convolved_down, "none": convolved}[self.resample](x, kernel)
        if not self.active:
            return x * self.gain
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return activated(x + bias, self.gain, self.clamp)


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU (Karras et al. 2020, fig. 2d)."""

    features: int
    up: bool = False
    gain: float = 1.0
    clamp: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width inputs"],
        style: Float[Array, "batch dim"],
        noise: Float[Array, "#batch new_height new_width 1"] | None,
    ) -> Float[Array, "batch new_height new_width features"]:
        """noise: None: drawn from the stream "noise"."""
        kernel = self.param("kernel", nn.initializers.normal(1.0), (3, 3, x.shape[-1], self.features))
        strength = self.param("noise_strength", nn.initializers.zeros, ())
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        x = modulated_convolution(x, kernel, Dense(x.shape[-1], bias=1.0, name="affine")(style), up=self.up)
        batch, height, width, _ = x.shape
        if noise is None:
            # A key for each picture, so that its noise does not depend on how many are made with it.
            keys = jax.vmap(partial(jax.random.fold_in, self.make_rng("noise")))(jnp.arange(batch))
            noise = jax.vmap(lambda key: jax.random.normal(key, (height, width, 1)))(keys)
        return activated(x + (noise * strength).astype(x.dtype) + bias, self.gain, self.clamp)


class ToRGB(nn.Module):
    """Features as pictures: a modulated 1 x 1 convolution, not demodulated, in float32."""

    channels: int
    clamp: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width inputs"], style: Float[Array, "batch dim"]
    ) -> Float[Array, "batch height width channels"]:
        kernel = self.param("kernel", nn.initializers.normal(1.0), (1, 1, x.shape[-1], self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        styles = Dense(x.shape[-1], bias=1.0, name="affine")(style) * x.shape[-1] ** -0.5
        x = modulated_convolution(x, kernel, styles, demodulate=False)
        return bounded(at_least_float32(x) + bias, self.clamp)


class MappingNetwork(nn.Module):
    """Latents, labels or both, each normalised, through dense layers (Karras et al. 2019, fig. 1b)."""

    features: int
    layers: int
    classes: int = 0
    rate: float = 0.01

    @nn.compact
    def __call__(
        self, latents: Float[Array, "batch latents"] | None, labels: Labels | None
    ) -> Float[Array, "batch features"]:
        parts = [] if latents is None else [unit(at_least_float32(latents))]
        if self.classes:
            if labels is None:
                raise ValueError("a conditional network was given no labels.")
            embedded = Dense(self.features, name="embedding")(jax.nn.one_hot(labels, self.classes))
            parts.append(unit(embedded))
        x = jnp.concatenate(parts, axis=-1)
        for number in range(self.layers):
            x = Dense(self.features, rate=self.rate, active=True, name=f"dense_{number}")(x)
        return x


# --- the networks -------------------------------------------------------------------------------


class StyleGAN2Generator(nn.Module):
    """Latents to styles to pictures.

    image: height, width and channels of a picture.
    classes: what labels tell apart (0: there are none).
    """

    config: StyleGAN2Config
    image: tuple[int, int, int]
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    @property
    def layers(self) -> int:
        """Styles that a picture is made of: one for each convolution, and one for the last ToRGB."""
        return 2 * len(resolutions(self.image))

    def setup(self) -> None:
        config = self.config
        sizes = resolutions(self.image)
        self.mapping_network = MappingNetwork(
            config.style_dim, config.mapping_layers, self.classes, config.mapping_rate
        )
        self.average = self.variable("averages", "style", jnp.zeros, (config.style_dim,))
        self.constant = self.param("constant", nn.initializers.normal(1.0), (4, 4, config.channels(4)))
        residual = config.generator == "resnet"
        convs, to_rgb, skips = {}, {}, {}
        for size in sizes:
            channels = config.channels(size)
            if size > 4:
                convs[f"{size}_0"] = StyledConv(channels, up=True, clamp=config.clamp)
                if residual:
                    skips[f"{size}"] = Conv(channels, 1, "up", active=False, gain=0.5**0.5)
            gain = 0.5**0.5 if residual and size > 4 else 1.0
            convs[f"{size}_1"] = StyledConv(channels, gain=gain, clamp=config.clamp)
            if config.generator == "skip" or size == sizes[-1]:
                to_rgb[f"{size}"] = ToRGB(self.image[2], config.clamp)
        self.convs, self.to_rgb, self.skips = convs, to_rgb, skips

    def __call__(
        self,
        latents: Float[Array, "batch latents"],
        condition: Labels | None = None,
        *,
        train: bool = True,
        truncation: float | Float[Array, ""] = 1.0,
        noise: Noise | None = None,
    ) -> Float[Array, "batch height width channels"]:
        styles = self.mapping(latents, condition, train=train, truncation=truncation)
        return self.synthesis(styles, train=train, noise=noise)

    def mapping(
        self,
        latents: Float[Array, "batch latents"],
        condition: Labels | None = None,
        *,
        train: bool = True,
        truncation: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "batch layers dim"]:
        """A style for each layer: in training the mean style moves, and some pictures have two (`mixing`)."""
        styles = self.mapping_network(latents, condition)
        if train and not self.is_initializing():
            if self.is_mutable_collection("averages"):
                mean = jax.lax.stop_gradient(styles).mean(0)
                self.average.value = self.average.value + (1 - AVERAGE) * (mean - self.average.value)
            styles = self._mixed(styles, latents, condition)
        else:
            styles = jnp.broadcast_to(styles[:, None], (len(styles), self.layers, styles.shape[-1]))
        return styles if isinstance(truncation, float) and truncation == 1 else self.truncate(styles, truncation)

    def truncate(
        self, styles: Float[Array, "batch layers dim"], truncation: float | Float[Array, ""]
    ) -> Float[Array, "batch layers dim"]:
        return truncated(styles, self.average.value, truncation)

    def _mixed(self, styles: Array, latents: Array, condition: Labels | None) -> Array:
        """From a random layer on, the style of other latents (Karras et al. 2019, sec. 3.1)."""
        shape = (len(styles), self.layers, styles.shape[-1])
        repeated = jnp.broadcast_to(styles[:, None], shape)
        if not self.config.mixing:
            return repeated
        latents_key, layer_key, coin_key = jax.random.split(self.make_rng("mixing"), 3)
        others = self.mapping_network(jax.random.normal(latents_key, latents.shape, latents.dtype), condition)
        first = jax.random.randint(layer_key, (len(styles),), 1, self.layers)
        mixed = jax.random.bernoulli(coin_key, self.config.mixing, (len(styles),))
        first = jnp.where(mixed, first, self.layers)
        late = jnp.arange(self.layers) >= first[:, None]
        return jnp.where(late[:, :, None], others[:, None], repeated)

    def synthesis(
        self, styles: Float[Array, "batch layers dim"], *, train: bool = True, noise: Noise | None = None
    ) -> Float[Array, "batch height width channels"]:
        """noise: of each layer (`noise_shapes`); None: drawn from the stream "noise", or without one always the same.

        ToRGB has the style of the convolution after it.
        """
        given = dict(noise or {})
        if not self.has_rng("noise"):
            for number, (name, shape) in enumerate(self.noise_shapes().items()):
                given.setdefault(name, jax.random.normal(jax.random.key(number), shape))
        x = jnp.broadcast_to(self.constant.astype(self.dtype), (len(styles), *self.constant.shape))
        pictures, layer = None, 0
        for size in resolutions(self.image):
            skip = self.skips[f"{size}"](x) if f"{size}" in self.skips else None
            for name in (f"{size}_0", f"{size}_1"):
                if name in self.convs:
                    x = self.convs[name](x, styles[:, layer], given.get(name))
                    layer += 1
            x = x if skip is None else x + skip
            if f"{size}" in self.to_rgb:
                own = self.to_rgb[f"{size}"](x, styles[:, layer])
                pictures = own if pictures is None else upsampled(pictures) + own
        assert pictures is not None  # the last resolution has a ToRGB
        return pictures

    def noise_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Of one picture's noise by the layers' names, the first one first."""
        names = [(f"{size}_{number}", size) for size in resolutions(self.image) for number in (0, 1)]
        return {name: (1, size, size, 1) for name, size in names if name != "4_0"}


class StyleGAN2Discriminator(nn.Module):
    """Pictures to logits; with labels the product of features with what the label maps to (Miyato & Koyama 2018)."""

    config: StyleGAN2Config
    image: tuple[int, int, int]
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        samples: Float[Array, "batch height width channels"],
        condition: Labels | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, " batch"]:
        config = self.config
        kind, clamp = config.discriminator, config.clamp
        pictures, x = samples.astype(self.dtype), None

        def read(pictures: Array, size: int) -> Array:
            bound = clamp if size > 4 else 0.0  # as in the authors' code
            return Conv(config.channels(size), 1, clamp=bound, name=f"from_rgb_{size}")(pictures)

        for size in resolutions(self.image)[:0:-1]:
            if x is None:
                x = read(pictures, size)
            elif kind == "skip":
                x = x + read(pictures, size)
            below = config.channels(size // 2)
            gain = 0.5**0.5 if kind == "resnet" else 1.0
            skip = Conv(below, 1, "down", active=False, gain=gain, name=f"skip_{size}")(x) if kind == "resnet" else None
            x = Conv(config.channels(size), clamp=clamp, name=f"conv_{size}_0")(x)
            x = Conv(below, resample="down", gain=gain, clamp=clamp, name=f"conv_{size}_1")(x)
            x = x if skip is None else x + skip
            pictures = downsampled(pictures) if kind == "skip" else pictures
        if x is None or kind == "skip":
            own = read(pictures, 4)
            x = own if x is None else x + own
        # Deviations and logits are small differences: in float32.
        x = at_least_float32(x)
        x = minibatch_deviation(x, config.group) if config.group > 1 else x
        x = Conv(config.channels(4), clamp=clamp, name="conv_4")(x)
        x = Dense(config.channels(4), active=True, name="dense")(x.reshape(len(x), -1))
        if not self.classes:
            return Dense(1, name="head")(x)[:, 0]
        x = Dense(config.channels(4), name="head")(x)
        mapping = MappingNetwork(
            x.shape[-1], config.mapping_layers, self.classes, config.mapping_rate, name="mapping_network"
        )
        return jnp.sum(x * mapping(None, condition), axis=-1) * x.shape[-1] ** -0.5


def stylegan2(
    config: StyleGAN2Config, image: tuple[int, int, int], classes: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[StyleGAN2Generator, StyleGAN2Discriminator]:
    """Both networks. Raises ConfigError where pictures are not square or their side is no power of two."""
    resolutions(image)
    return StyleGAN2Generator(config, image, classes, dtype), StyleGAN2Discriminator(config, image, classes, dtype)
