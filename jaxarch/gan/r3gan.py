"""The backbone of R3GAN (Huang et al. 2024, "The GAN is dead; long live the GAN!"): residual blocks and nothing else.

No normalisation, no noise, no styles: 1 x 1, grouped 3 x 3 and 1 x 1 convolutions with leaky ReLUs between them, and
bilinear interpolation from size to size. Kernels are drawn so that depth does not let activations grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxarch.convolution import LAYOUT, convolve
from jaxarch.gan.resampling import downsampled, upsampled
from jaxarch.gan.stylegan2 import Labels, at_least_float32, resolutions
from jaxarch.run import backend
from jaxarch.run.protocol import ConfigError, check_least


@dataclass(frozen=True)
class R3GANConfig:
    """Both networks, in the words of the command line; the paper's have up to 768 channels and latents of 64.

    Raises ConfigError where the numbers do not fit.
    """

    latent_dim: int = 64
    channel_base: int = 1024
    """blocks on n x n pixels have this / n channels"""
    channel_max: int = 64
    """and not more than this"""
    blocks: int = 1
    """residual blocks on each size (the paper: 2)"""
    expansion: int = 2
    """the width within a block over that between blocks"""
    group_width: int = 16
    """channels that the 3 x 3 convolution mixes"""
    label_dim: int = 32
    """width of what labels are embedded in"""

    def __post_init__(self) -> None:
        check_least(
            self,
            ("latent_dim", "channel_base", "channel_max", "blocks", "expansion", "group_width", "label_dim"),
            1,
            "r3gan.",
        )

    def channels(self, resolution: int) -> int:
        return min(max(self.channel_base // resolution, 1), self.channel_max)


def scaled_normal(gain: float = 1.0) -> Initializer:
    """Normal, of variance gain^2 / what an output sums up."""
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


def activated(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Leaky ReLU of slope 0.2, scaled so that N(0, 1) keeps its mean square (He et al. 2015, eq. 15)."""
    return jax.nn.leaky_relu(x, 0.2) * (2 / (1 + 0.2**2)) ** 0.5


def grouped_convolution(
    x: Float[Array, "batch height width inputs"], kernel: Float[Array, "rows columns of_group outputs"]
) -> Float[Array, "batch height width outputs"]:
    """Of each `of_group` channels on their own, to as many parts of the outputs; zeros beyond the edge.

    XLA:CPU takes a hundred times as long for its gradients if the groups are not convolutions of their own.
    """
    rows, columns, of_group, _ = kernel.shape
    groups = x.shape[-1] // of_group
    padding = (rows // 2, rows // 2), (columns // 2, columns // 2)
    if backend.platform() != "cpu":
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=LAYOUT, feature_group_count=groups
        )
    parts = zip(jnp.split(x, groups, axis=3), jnp.split(kernel, groups, axis=3), strict=True)
    return jnp.concatenate([convolve(one, own, padding=padding) for one, own in parts], axis=3)


class Pointwise(nn.Module):
    """A 1 x 1 convolution."""

    features: int
    kernel_init: Initializer = scaled_normal()
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch height width features"]:
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features))
        y = convolve(x, kernel.astype(x.dtype))
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype) if self.use_bias else y


class ResidualBlock(nn.Module):
    """x + W3 a(W2 a(W1 x)), wider within than without (Huang et al. 2024, fig. 3).

    depth: residual blocks of the network. W1 and W2 begin depth^(-1/4) times as large as alone, W3 at 0
    (Zhang et al. 2019, "Fixup initialization", sec. 3).
    """

    expansion: int
    group_width: int
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        hidden = self.expansion * x.shape[-1]
        width = min(self.group_width, hidden)
        if hidden % width:
            raise ConfigError(f"--r3gan.group-width {width} does not divide the {hidden} channels within a block.")
        init = scaled_normal(self.depth**-0.25)
        y = activated(Pointwise(hidden, init, use_bias=True, name="expand")(x))
        kernel = self.param("kernel", init, (3, 3, width, hidden)).astype(x.dtype)
        y = grouped_convolution(y, kernel) + self.param("bias", nn.initializers.zeros, (hidden,)).astype(x.dtype)
        return x + Pointwise(x.shape[-1], nn.initializers.zeros, name="project")(activated(y))


def embedded(module: nn.Module, labels: Labels | None, classes: int, dim: int, gain: float) -> Array:
    if labels is None:
        raise ValueError("a conditional network was given no labels.")
    table = module.param("embedding", nn.initializers.normal(gain), (classes, dim))
    return table[labels]


class R3GANGenerator(nn.Module):
    """Latents to pictures; a label's embedding lies beside the latents.

    image: height, width and channels of a picture.
    classes: what labels tell apart (0: there are none).
    """

    config: R3GANConfig
    image: tuple[int, int, int]
    classes: int = 0
    dtype: DTypeLike = jnp.float32

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "batch latents"],
        condition: Labels | None = None,
        *,
        train: bool = True,
    ) -> Float[Array, "batch height width channels"]:
        config, sizes = self.config, resolutions(self.image)
        if self.classes:
            asked = embedded(self, condition, self.classes, config.label_dim, 1.0)
            latents = jnp.concatenate([latents, asked], axis=-1)
        basis = self.param("basis", nn.initializers.normal(1.0), (4, 4, config.channels(4)))
        kernel = self.param("kernel", scaled_normal(), (latents.shape[-1], config.channels(4)))
        x = (basis * (latents @ kernel)[:, None, None]).astype(self.dtype)
        for size in sizes:
            channels = config.channels(size)
            if size > 4:
                x = x if x.shape[-1] == channels else Pointwise(channels, name=f"up_{size}")(x)
                x = upsampled(x)
            for number in range(config.blocks):
                block = ResidualBlock(
                    config.expansion, config.group_width, config.blocks * len(sizes), name=f"block_{size}_{number}"
                )
                x = block(x)
        return at_least_float32(Pointwise(self.image[2], name="to_rgb")(x))


class R3GANDiscriminator(nn.Module):
    """Pictures to logits; with labels the product of features with the label's embedding (Miyato & Koyama 2018)."""

    config: R3GANConfig
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
        config, sizes = self.config, resolutions(self.image)
        x = Pointwise(config.channels(sizes[-1]), name="from_rgb")(samples.astype(self.dtype))
        for size in reversed(sizes):
            for number in range(config.blocks):
                block = ResidualBlock(
                    config.expansion, config.group_width, config.blocks * len(sizes), name=f"block_{size}_{number}"
                )
                x = block(x)
            if size > 4:
                x, below = downsampled(x), config.channels(size // 2)
                x = x if x.shape[-1] == below else Pointwise(below, name=f"down_{size}")(x)
        # All of a channel's 4 x 4 pixels into one number.
        weights = self.param("basis", nn.initializers.normal(0.25), (4, 4, x.shape[-1]))
        x = jnp.sum(at_least_float32(x) * weights, axis=(1, 2))
        outputs = config.label_dim if self.classes else 1
        x = x @ self.param("kernel", scaled_normal(), (x.shape[-1], outputs))
        if not self.classes:
            return x[:, 0]
        return jnp.sum(x * embedded(self, condition, self.classes, outputs, outputs**-0.5), axis=-1)


def r3gan(
    config: R3GANConfig, image: tuple[int, int, int], classes: int = 0, dtype: DTypeLike = jnp.float32
) -> tuple[R3GANGenerator, R3GANDiscriminator]:
    """Both networks. Raises ConfigError where pictures are not square or their side is no power of two."""
    resolutions(image)
    return R3GANGenerator(config, image, classes, dtype), R3GANDiscriminator(config, image, classes, dtype)
