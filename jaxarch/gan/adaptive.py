"""The transforms of adaptive discriminator augmentation (Karras et al. 2020, "Training GANs with limited data", B).

Each of them happens to a picture with the same probability, and none tells of the others: a generator that matches the
changed pictures must match the unchanged ones, while the probability is below 1. All geometric transforms are one
affine map, all of colour one matrix, so that a picture is resampled once.

All resampling is products with small matrices and one gather; there is no convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import erf_inv
from jaxtyping import Array, Float, Int, Key

from jaxarch.run.protocol import ConfigError, check_not_negative

HIGHEST = jax.lax.Precision.HIGHEST
# Daubechies' least asymmetric wavelet with six vanishing moments, its lowpass (Daubechies 1992, table 6.3).
SYM6 = np.array([
    0.015404109327044824, 0.003490712084222073, -0.11799011114851961, -0.04831174258569759, 0.49105594192797378,
    0.78764114102865, 0.33792942172816561, -0.07263752278637638, -0.02106029251237072, 0.04472490177078126,
    0.001767711864253972, -0.007800708325032379,
])  # fmt: skip
SYM2 = np.array([1 - 3**0.5, 3 - 3**0.5, 3 + 3**0.5, 1 + 3**0.5]) / 32**0.5
BAND_POWER = np.array([10.0, 1.0, 1.0, 1.0]) / 13  # what natural pictures have in the four bands of `filtering`


@dataclass(frozen=True)
class AdaptiveConfig:
    """Which transforms there are, and how strong (False or 0: off). By default those of position and colour, the set
    that the paper chose.
    """

    x_flip: bool = True
    rotate90: bool = True
    integer_translation: float = 0.125
    """whole pixels, by at most this fraction of the picture"""
    isotropic_scaling: float = 0.2
    """standard deviation of the factor's log2"""
    rotation: float = 1.0
    """the largest angle, in half turns"""
    anisotropic_scaling: float = 0.2
    """standard deviation of the log2 of the factor along x; along y it is the reciprocal"""
    fractional_translation: float = 0.125
    """standard deviation, as a fraction of the picture"""
    brightness: float = 0.2
    """standard deviation of what is added"""
    contrast: float = 0.5
    """standard deviation of the factor's log2"""
    luma_flip: bool = True
    """light becomes dark, the hue stays"""
    hue: float = 1.0
    """the largest angle about the axis of greys, in half turns"""
    saturation: float = 1.0
    """standard deviation of the factor's log2"""
    filtering: float = 0.0
    """standard deviation of the log2 of each frequency band's gain (the paper's: 1)"""
    noise: float = 0.0
    """scale of the half-normal standard deviation of the noise (the paper's: 0.1)"""
    cutout: float = 0.0
    """height and width of the hole, as a fraction of the picture (the paper's: 0.5)"""

    def __post_init__(self) -> None:
        check_not_negative(self, vars(self), "ada.")
        for name in ("integer_translation", "cutout"):
            if getattr(self, name) > 1:
                raise ConfigError(f"--ada.{name.replace('_', '-')} {getattr(self, name):g} is a fraction above 1.")


# By transform, what it does to each picture: `[batch, numbers]`.
Amounts = dict[str, Float[Array, "batch _"]]


class Transform(NamedTuple):
    """field: its strength in the configuration.
    quantile: of a uniform number in (0, 1) and the strength, the amount.
    numbers: how many of them a picture needs.
    neutral: the amount that does nothing.
    """

    field: str
    quantile: Callable[[Array, float], Array]
    numbers: int = 1
    neutral: float = 0.0


def _choice(count: int) -> Callable[[Array, float], Array]:
    return lambda number, strength: jnp.floor(number * count)


def _uniform(number: Array, largest: float) -> Array:
    return (2 * number - 1) * largest


def _normal(number: Array, deviation: float) -> Array:
    return 2**0.5 * erf_inv(2 * number - 1) * deviation


def _half_normal(number: Array, scale: float) -> Array:
    return 2**0.5 * erf_inv(number) * scale


TRANSFORMS = {
    "x_flip": Transform("x_flip", _choice(2)),
    "rotate90": Transform("rotate90", _choice(4)),
    "integer_translation": Transform("integer_translation", _uniform, 2),
    "isotropic_scaling": Transform("isotropic_scaling", _normal),
    # One before and one after anisotropic scaling, so that its axes are any.
    "rotation": Transform("rotation", _uniform),
    "anisotropic_scaling": Transform("anisotropic_scaling", _normal),
    "second_rotation": Transform("rotation", _uniform),
    "fractional_translation": Transform("fractional_translation", _normal, 2),
    "brightness": Transform("brightness", _normal),
    "contrast": Transform("contrast", _normal),
    "luma_flip": Transform("luma_flip", _choice(2)),
    "hue": Transform("hue", _uniform),
    "saturation": Transform("saturation", _normal),
    "filtering": Transform("filtering", _normal, 4),
    "noise": Transform("noise", _half_normal),
    "cutout": Transform("cutout", lambda number, size: number, 2, neutral=-9.0),  # the hole's centre; far away
}
GEOMETRY, COLOR = list(TRANSFORMS)[:8], list(TRANSFORMS)[8:13]


def adaptive(config: AdaptiveConfig = AdaptiveConfig()) -> Callable[..., Float[Array, "batch height width channels"]]:
    """The augmentation `(key, pictures, probability) -> pictures`.

    Pictures in [-1, 1] may leave this range, as in the paper. They are grey, RGB, or RGBA, whose alpha no transform of
    colour changes.
    """

    def augment(
        key: Key[Array, ""],
        pictures: Float[Array, "batch height width channels"],
        probability: float | Float[Array, ""],
    ) -> Float[Array, "batch height width channels"]:
        amounts_key, noise_key = jax.random.split(key)
        amounts = drawn(amounts_key, len(pictures), probability, config)
        return transformed(noise_key, pictures, amounts, config)

    return augment


def drawn(key: Key[Array, ""], count: int, probability: float | Float[Array, ""], config: AdaptiveConfig) -> Amounts:
    """For so many pictures, each transform on its own with that probability; else its neutral amount.

    What one of them draws does not depend on which others there are.
    """
    widths = [transform.numbers for transform in TRANSFORMS.values()]
    # Not 0, at which the normal quantile is infinite.
    uniform = jax.random.uniform(key, (2, count, sum(widths)), minval=2.0**-24)
    columns = jnp.split(uniform, np.cumsum(widths)[:-1], axis=-1)
    amounts = quantiles({name: column[0] for name, column in zip(TRANSFORMS, columns, strict=True)}, config)
    for (name, transform), (_, decisions) in zip(TRANSFORMS.items(), columns, strict=True):
        if name in amounts:
            # Two rotations of which the picture has at least one with the given probability.
            chance = 1 - jnp.sqrt(1 - probability) if transform.field == "rotation" else probability
            # On each band of frequency of its own, on the two numbers of a place together.
            happens = (decisions if name == "filtering" else decisions[:, :1]) < chance
            amounts[name] = jnp.where(happens, amounts[name], transform.neutral)
    return amounts


def quantiles(numbers: dict[str, Float[Array, "batch _"]], config: AdaptiveConfig) -> Amounts:
    """The amounts of which a fraction of these numbers, in (0, 1), is smaller; of those transforms that are on."""
    return {
        name: transform.quantile(numbers[name], getattr(config, transform.field))
        for name, transform in TRANSFORMS.items()
        if getattr(config, transform.field)
    }


def transformed(
    key: Key[Array, ""],
    pictures: Float[Array, "batch height width channels"],
    amounts: Amounts,
    config: AdaptiveConfig,
) -> Float[Array, "batch height width channels"]:
    """Each picture changed by its amounts (Karras et al. 2020, fig. 15). The key is that of the noise.

    Raises ValueError for pictures of other than 1, 3 or 4 channels.
    """
    height, width, channels = pictures.shape[1:]
    if channels not in (1, 3, 4):
        raise ValueError(f"pictures of {channels} channels; grey (1), RGB (3) and RGBA (4) can be augmented.")
    if amounts.keys() & set(GEOMETRY):
        pictures = warped(pictures, inverse_map(amounts, (height, width)))
    if amounts.keys() & set(COLOR):
        pictures = recolored(pictures, color_matrix(amounts))
    if "filtering" in amounts:
        pictures = filtered(pictures, band_gains(amounts["filtering"]))
    if "noise" in amounts:
        deviation = amounts["noise"][:, :, None, None].astype(pictures.dtype)
        pictures = pictures + deviation * jax.random.normal(key, pictures.shape, pictures.dtype)
    if "cutout" in amounts:
        rows, columns = (
            jnp.abs((jnp.arange(size) + 0.5) / size - amounts["cutout"][:, axis, None]) < config.cutout / 2
            for size, axis in ((height, 1), (width, 0))
        )
        pictures = jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, pictures)
    return pictures


# --- position -----------------------------------------------------------------------------------


def inverse_map(amounts: Amounts, size: tuple[int, int]) -> Float[Array, "batch 3 3"]:
    """Of a place in the changed picture, (x, y, 1) in pixels from the centre, y downwards, the place in the original.

    size: height and width. The changes follow one another as in `TRANSFORMS`, so the product of their inverses has
    them from left to right.
    """
    extent = jnp.array([size[1], size[0]], jnp.float32)
    inverses = []
    for name in GEOMETRY:
        if name not in amounts:
            continue
        amount = amounts[name]
        if name == "x_flip":
            inverses.append(_scaling(1 - 2 * amount[:, 0], 1.0))
        elif name == "rotate90":
            inverses.append(_rotation(jnp.pi / 2 * amount[:, 0]))
        elif name == "integer_translation":
            inverses.append(_translation(-jnp.round(amount * extent)))
        elif name == "isotropic_scaling":
            inverses.append(_scaling(jnp.exp2(-amount[:, 0]), jnp.exp2(-amount[:, 0])))
        elif name == "anisotropic_scaling":
            inverses.append(_scaling(jnp.exp2(-amount[:, 0]), jnp.exp2(amount[:, 0])))
        elif name == "fractional_translation":
            inverses.append(_translation(-amount * extent))
        else:
            inverses.append(_rotation(jnp.pi * amount[:, 0]))
    return _product(inverses)


def warped(
    pictures: Float[Array, "batch height width channels"], inverse: Float[Array, "batch 3 3"]
) -> Float[Array, "batch height width channels"]:
    """Each picture under the affine map whose inverse is given as by `inverse_map`, without aliasing.

    The picture, reflected at its edges without end, is upsampled twofold by the wavelet's filter, read bilinearly, and
    downsampled by the adjoint: the wavelet is orthogonal, so the map that changes nothing returns the picture.
    """
    height, width = pictures.shape[1:3]
    dtype = jnp.promote_types(pictures.dtype, jnp.float32)
    # Rows first where pictures grow and last where they shrink, so that transposed copies are of small arrays.
    fine = _down_columns(_along_rows(pictures.astype(dtype), _upsampling(width)), _upsampling(height))

    # Of the fine pixels that are downsampled, in pixels from the centre.
    y, x = ((jnp.arange(-REACH, 2 * size + REACH) - (size - 1)) / 2 for size in (height, width))
    entry = inverse[:, :2, :, None, None]
    source_x, source_y = (entry[:, i, 0] * x + entry[:, i, 1] * y[:, None] + entry[:, i, 2] for i in (0, 1))
    read = _bilinear(fine, 2 * source_y + (height - 1), 2 * source_x + (width - 1))
    return _along_rows(_down_columns(read, _downsampling(height)), _downsampling(width)).astype(pictures.dtype)


REACH = len(SYM6) // 2 - 1  # fine pixels before those of a pixel that its filter reads


def _upsampling(size: int) -> Float[np.ndarray, "fine size"]:
    """Of an axis reflected without end (without its last pixel doubled): one period of the fine pixels and one more."""
    period = max(2 * (size - 1), 1)
    matrix = np.zeros((2 * period + 1, size))
    for fine in range(2 * period + 1):
        for pixel in range((fine - REACH - 1) // 2, (fine + REACH) // 2 + 1):
            tap = fine - 2 * pixel + REACH
            if 0 <= tap < len(SYM6):
                matrix[fine, _reflected(pixel, size)] += 2**0.5 * SYM6[tap]
    return matrix


def _downsampling(size: int) -> Float[np.ndarray, "size fine"]:
    """From the fine pixels that the filter reads, of which the first lie before the picture."""
    matrix = np.zeros((size, 2 * size + 2 * REACH))
    for pixel in range(size):
        matrix[pixel, 2 * pixel : 2 * pixel + len(SYM6)] = SYM6 / 2**0.5
    return matrix


def _reflected(pixel: int, size: int) -> int:
    period = max(2 * (size - 1), 1)
    return min(pixel % period, -pixel % period)


def _down_columns(
    pictures: Float[Array, "batch height width channels"], matrix: np.ndarray
) -> Float[Array, "batch rows width channels"]:
    """The matrix times each column. As a product for each picture, whose result nothing has to transpose."""
    batch, height, width, channels = pictures.shape
    matrices = jnp.broadcast_to(matrix.astype(pictures.dtype), (batch, *matrix.shape))
    result = jnp.matmul(matrices, pictures.reshape(batch, height, width * channels), precision=HIGHEST)
    return result.reshape(batch, len(matrix), width, channels)


def _along_rows(
    pictures: Float[Array, "batch height width channels"], matrix: np.ndarray
) -> Float[Array, "batch height columns channels"]:
    return jnp.einsum("jw,bhwc->bhjc", matrix.astype(pictures.dtype), pictures, precision=HIGHEST)


def _bilinear(
    fine: Float[Array, "batch height width channels"],
    rows: Float[Array, "batch r c"],
    columns: Float[Array, "batch r c"],
) -> Float[Array, "batch r c channels"]:
    """Read at any places, in periods of one pixel less than its height and width."""
    batch, height, width, channels = fine.shape
    row, column = jnp.floor(rows), jnp.floor(columns)
    below, right = ((x - y).reshape(-1, 1).astype(fine.dtype) for x, y in ((rows, row), (columns, column)))
    row, column = row.astype(jnp.int32) % (height - 1), column.astype(jnp.int32) % (width - 1)
    corner = (jnp.arange(batch)[:, None, None] * height + row) * width + column
    read: Array = _mixed(fine.reshape(-1, channels), corner.reshape(-1), below, right, width)
    return read.reshape(*rows.shape, channels)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mixed(
    pixels: Float[Array, "pixels channels"],
    corner: Int[Array, "places"],
    below: Float[Array, "places 1"],
    right: Float[Array, "places 1"],
    width: int,
) -> Float[Array, "places channels"]:
    """Of each corner and its neighbours on the right, below, and both, weighted by how near the place is.

    With a gradient of its own: the automatic one makes four arrays of all pixels and adds them up, which takes twice as
    long. None flows to the places.
    """
    read = jnp.zeros((), pixels.dtype)
    for place, weight in _neighbours(corner, below, right, width):
        read = read + weight * pixels.at[place].get(mode="promise_in_bounds")
    return read


def _neighbours(corner: Array, below: Array, right: Array, width: int) -> list[tuple[Array, Array]]:
    return [
        (corner, (1 - below) * (1 - right)),
        (corner + 1, (1 - below) * right),
        (corner + width, below * (1 - right)),
        (corner + width + 1, below * right),
    ]


def _mixed_forward(pixels: Array, corner: Array, below: Array, right: Array, width: int) -> tuple[Array, tuple]:
    return _mixed(pixels, corner, below, right, width), (len(pixels), corner, below, right)


def _mixed_backward(width: int, residuals: tuple, cotangent: Array) -> tuple[Array, None, None, None]:
    count, corner, below, right = residuals
    pixels = jnp.zeros((count, cotangent.shape[1]), cotangent.dtype)
    for place, weight in _neighbours(corner, below, right, width):
        pixels = pixels.at[place].add(weight * cotangent, mode="promise_in_bounds")
    return pixels, None, None, None


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _matrices(rows: list[list[Array | float]]) -> Float[Array, "batch _ _"]:
    """From their entries, numbers or one for each picture."""
    batch = jnp.broadcast_shapes(*(jnp.shape(entry) for row in rows for entry in row))
    return jnp.stack([jnp.stack([jnp.broadcast_to(entry, batch) for entry in row], -1) for row in rows], -2)


def _translation(by: Float[Array, "batch 2"]) -> Float[Array, "batch 3 3"]:
    return _matrices([[1.0, 0.0, by[:, 0]], [0.0, 1.0, by[:, 1]], [0.0, 0.0, 1.0]])


def _scaling(x: Array | float, y: Array | float) -> Float[Array, "batch 3 3"]:
    return _matrices([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]])


def _rotation(angle: Float[Array, "batch"]) -> Float[Array, "batch 3 3"]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _matrices([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _product(matrices: list[Float[Array, "batch n n"]]) -> Float[Array, "batch n n"]:
    return reduce(partial(jnp.matmul, precision=HIGHEST), matrices)


# --- colour -------------------------------------------------------------------------------------


def color_matrix(amounts: Amounts) -> Float[Array, "batch 4 4"]:
    """Of red, green, blue and 1 the new ones; the changes follow one another as in `TRANSFORMS`."""
    grey = np.array([1.0, 1.0, 1.0, 0.0], np.float32) / 3**0.5
    luma, same = np.outer(grey, grey), np.eye(4, dtype=np.float32)
    turn = np.zeros((4, 4), np.float32)  # the cross product with the axis of greys
    turn[:3, :3] = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    matrices = []
    for name in COLOR:
        if name not in amounts:
            continue
        amount = amounts[name][:, :, None]
        if name == "brightness":
            matrices.append(same + amount * np.outer([1, 1, 1, 0], [0, 0, 0, 1]).astype(np.float32))
        elif name == "contrast":
            matrices.append(same + (jnp.exp2(amount) - 1) * np.diag(np.array([1, 1, 1, 0], np.float32)))
        elif name == "luma_flip":
            matrices.append(same - 2 * luma * amount)  # Householder's reflection
        elif name == "hue":
            angle = jnp.pi * amount  # Rodrigues' formula; turn @ turn is luma - 1 on colours
            matrices.append(same + jnp.sin(angle) * turn + (1 - jnp.cos(angle)) * (turn @ turn))
        else:
            alone = same - luma
            alone[3, 3] = 0
            matrices.append(same + (jnp.exp2(amount) - 1) * alone)
    return _product(matrices[::-1])


def recolored(
    pictures: Float[Array, "batch height width channels"], matrix: Float[Array, "batch 4 4"]
) -> Float[Array, "batch height width channels"]:
    """Grey is a colour of three equal parts, of which the mean is kept: hue and saturation leave it as it is."""
    channels, matrix = pictures.shape[-1], matrix.astype(pictures.dtype)
    if channels == 1:
        by, plus = matrix[:, :3, :3].sum(2).mean(1), matrix[:, :3, 3].mean(1)
        return pictures * by[:, None, None, None] + plus[:, None, None, None]
    colors = jnp.einsum("bij,bhwj->bhwi", matrix[:, :3, :3], pictures[..., :3], precision=HIGHEST)
    colors = colors + matrix[:, None, None, :3, 3]
    return jnp.concatenate([colors, pictures[..., 3:]], -1)


# --- frequency ----------------------------------------------------------------------------------


def band_gains(octaves: Float[Array, "batch 4"]) -> Float[Array, "batch 4"]:
    """Each band in turn amplified by 2^octaves, and all of them scaled so that a natural picture's power stays."""
    gains = jnp.ones_like(octaves)
    for band in range(4):
        one = jnp.ones_like(octaves).at[:, band].set(jnp.exp2(octaves[:, band]))
        gains = gains * one / jnp.sqrt(jnp.sum(BAND_POWER.astype(np.float32) * one**2, 1, keepdims=True))
    return gains


def filtered(
    pictures: Float[Array, "batch height width channels"], gains: Float[Array, "batch 4"]
) -> Float[Array, "batch height width channels"]:
    """Rows, then columns, with these gains in the bands up to 1/8, 1/4, 1/2 and all of the highest frequency."""
    height, width = pictures.shape[1:3]
    rows, columns = (
        jnp.einsum("bk,kij->bij", gains, _bands(size), precision=HIGHEST).astype(pictures.dtype)
        for size in (height, width)
    )
    pictures = jnp.einsum("bij,bjwc->biwc", rows, pictures, precision=HIGHEST)
    return jnp.einsum("bij,bhjc->bhic", columns, pictures, precision=HIGHEST)


def _bands(size: int) -> Float[np.ndarray, "4 size size"]:
    """The part of an axis, reflected at its ends, in each of the bands; together they are all of it."""
    matrices = np.zeros((4, size, size), np.float32)
    for band, taps in enumerate(_band_filters()):
        for row in range(size):
            for offset, tap in enumerate(taps, -(len(taps) // 2)):
                matrices[band, row, _reflected(row + offset, size)] += tap
    return matrices


def _band_filters() -> list[Float[np.ndarray, " taps"]]:
    """Four filters, symmetric and of odd length, that add up to 1: of the wavelet sym2, used forwards and backwards.

    With L(z) = H(z) H(1/z) / 2 and its complement 1 - L(z) = L(-z), one level splits off the upper half of the
    frequencies, and the next splits what is left.
    """
    low = np.convolve(SYM2, SYM2[::-1]) / 2
    high = low * (-1.0) ** np.arange(-3, 4)
    rest, bands = np.ones(1), []
    for level in range(3):
        apart = 2**level
        wide_low, wide_high = (np.zeros(6 * apart + 1) for _ in range(2))
        wide_low[::apart], wide_high[::apart] = low, high
        bands.append(np.convolve(rest, wide_high))
        rest = np.convolve(rest, wide_low)
    return [rest, *bands[::-1]]
