"""Each transform against its definition in plain numpy or scipy, against the published code's recorded values; chances.

record_adaptive.py makes the recorded values.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import ndimage, special, stats
from scipy.spatial.transform import Rotation

from experiments import dcgan
from jaxarch.gan.adaptive import (
    COLOR,
    GEOMETRY,
    SYM2,
    SYM6,
    TRANSFORMS,
    AdaptiveConfig,
    adaptive,
    band_gains,
    color_matrix,
    drawn,
    filtered,
    inverse_map,
    quantiles,
    recolored,
    transformed,
    warped,
)
from jaxarch.gan.augmentation import initial
from jaxarch.run import ConfigError
from tests.gan.record_adaptive import CASES, FILE, PICTURES

KEY = jax.random.key(0)
ALL = AdaptiveConfig(filtering=1.0, noise=0.1, cutout=0.5)
OFF = AdaptiveConfig(**{name: type(value)(0) for name, value in vars(ALL).items()})
RNG = np.random.default_rng(0)
GRID = {"mode": "grid-constant", "grid_mode": True}


def only(*names: str) -> AdaptiveConfig:
    fields = {TRANSFORMS[name].field for name in names}
    return AdaptiveConfig(**{name: value if name in fields else type(value)(0) for name, value in vars(ALL).items()})


def pictures_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


# --- the published code -------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, "color, grey", "all, grey"])
def test_as_published(case):
    """To the rounding of float32. There the second rotation is fixed at none, and a normal number's percentile q is
    taken at erfinv(2 q - 1), which lacks a factor sqrt(2).
    """
    names, percentile = CASES[case.removesuffix(", grey")]
    pictures = PICTURES[..., :1] if case.endswith("grey") else PICTURES
    normal = {"isotropic_scaling", "anisotropic_scaling", "fractional_translation", "brightness", "contrast"}
    normal |= {"saturation", "filtering"}
    numbers = {
        name: jnp.full(
            (1, transform.numbers),
            0.5
            if name == "second_rotation"
            else special.ndtr(special.erfinv(2 * percentile - 1))
            if name in normal
            else percentile,
        )
        for name, transform in TRANSFORMS.items()
    }
    config = only(*names)
    found = jax.jit(lambda x: transformed(KEY, x, quantiles(numbers, config), config))(pictures)
    assert np.abs(found - pictures).max() > 0.1 or case == "hue, grey"
    np.testing.assert_allclose(found, load_file(FILE)[case], atol=2e-5)


# --- what is drawn ------------------------------------------------------------------------------

MANY = 20_000


def test_each_transform_has_its_chance_and_its_distribution():
    """Kolmogorov's test of what happened against scipy's distributions; the chance within five standard deviations."""
    probability = 0.3
    amounts = {
        name: np.asarray(x) for name, x in jax.jit(partial(drawn, count=MANY, config=ALL))(KEY, probability=0.3).items()
    }
    assert amounts.keys() == TRANSFORMS.keys()
    uniform, normal = (lambda a: stats.uniform(-a, 2 * a)), (lambda s: stats.norm(0, s))
    expected = {
        "integer_translation": uniform(0.125),
        "isotropic_scaling": normal(0.2),
        "rotation": uniform(1),
        "anisotropic_scaling": normal(0.2),
        "second_rotation": uniform(1),
        "fractional_translation": normal(0.125),
        "brightness": normal(0.2),
        "contrast": normal(0.5),
        "hue": uniform(1),
        "saturation": normal(1),
        "filtering": normal(1),
        "noise": stats.halfnorm(0, 0.1),
        "cutout": stats.uniform(0, 1),
    }
    for name, amount in amounts.items():
        happened = amount != TRANSFORMS[name].neutral
        for column in range(amount.shape[1]):
            share = happened[:, column].mean()
            if name in ("x_flip", "luma_flip"):
                chance = probability / 2  # half of those that may be flipped
            elif name == "rotate90":
                chance = probability * 3 / 4
                assert set(np.unique(amount)) == {0, 1, 2, 3}
            elif "rotation" in name:
                chance = 1 - (1 - probability) ** 0.5
            else:
                chance = probability
            assert abs(share - chance) < 5 * (chance * (1 - chance) / MANY) ** 0.5, name
            if name in expected:
                done = amount[happened[:, column], column]
                assert stats.kstest(done, expected[name].cdf).pvalue > 1e-4, name
        if amount.shape[1] == 2:  # x and y together
            assert (happened[:, 0] == happened[:, 1]).all()
    rotated = (amounts["rotation"] != 0) | (amounts["second_rotation"] != 0)
    assert abs(rotated.mean() - probability) < 0.017
    # Each on its own: of the amounts, and of what happens, only the two numbers of a place go together.
    names = [name for name, amount in amounts.items() for _ in range(amount.shape[1])]
    table = np.concatenate(list(amounts.values()), 1)
    happened = table != [TRANSFORMS[name].neutral for name in names]
    for columns, together in (
        (table, {"cutout"}),  # as both are far away where there is no hole
        (happened, {"integer_translation", "fractional_translation", "cutout"}),
    ):
        correlations = np.triu(np.abs(np.corrcoef(columns.T)), 1)
        pairs = [(names[i], names[j]) for i, j in np.argwhere(correlations > 0.04)]
        assert sorted(pairs) == sorted((name, name) for name in together)


def test_another_transform_changes_no_draw():
    some, every = jax.jit(lambda: [drawn(KEY, 5, 0.5, config) for config in (only("hue", "rotation"), ALL)])()
    assert some.keys() == {"hue", "rotation", "second_rotation"}
    for name, amount in some.items():
        np.testing.assert_array_equal(amount, every[name])
    assert drawn(KEY, 5, 0.5, OFF) == {}


# --- position -----------------------------------------------------------------------------------


def test_the_wavelet_by_spectral_factorisation():
    """Of all filters with six zeros at -1 whose squared response is the halfband polynomial's, that of most linear
    phase (Daubechies 1992, sec. 8.1.1).
    """
    halfband = [float(special.comb(5 + k, k)) for k in range(6)]
    pairs = [np.roots([1, 4 * y - 2, 1]) for y in np.roots(halfband[::-1])]
    frequencies = np.linspace(0.01, 2.2, 100)
    best = (np.inf, np.zeros(12))
    for choice in np.ndindex(*[2] * 5):
        polynomial = np.poly([*(pair[one] for pair, one in zip(pairs, choice)), *[-1] * 6])
        if np.abs(polynomial.imag).max() > 1e-8:
            continue
        taps = polynomial.real * 2**0.5 / polynomial.real.sum()
        phase = np.unwrap(np.angle(np.exp(-1j * np.outer(frequencies, np.arange(12))) @ taps))
        slope = phase @ frequencies / (frequencies @ frequencies)
        best = min(best, (np.abs(phase - slope * frequencies).max(), taps), key=lambda pair: pair[0])
    taps = best[1] if best[1][0] > 0 else best[1][::-1]
    np.testing.assert_allclose(SYM6, taps, atol=1e-11)
    np.testing.assert_allclose([SYM2 @ SYM2, SYM2[:2] @ SYM2[2:], SYM2.sum()], [1, 0, 2**0.5], atol=1e-12)
    np.testing.assert_allclose(SYM2 @ ((-1.0) ** np.arange(4) * np.arange(4)), 0, atol=1e-12)


def reference_warp(picture: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """One channel, float64: reflected far out, zeros put between its pixels, filtered, read by scipy, filtered, halved.

    inverse: 3 x 3, of x, y, 1 in pixels from the centre.
    """
    height, width = picture.shape
    far = 4 * max(height, width)
    wide = np.pad(picture, far, mode="reflect")
    fine = np.zeros((2 * wide.shape[0], 2 * wide.shape[1]))
    fine[::2, ::2] = wide
    taps = SYM6 * 2**0.5
    for axis in (0, 1):  # the tap 5 is in the middle
        fine = np.apply_along_axis(lambda line: np.convolve(line, taps)[5 : 5 + len(line)], axis, fine)
    rows, columns = np.meshgrid(np.arange(-8, 2 * height + 8), np.arange(-8, 2 * width + 8), indexing="ij")
    x, y = columns / 2 - (width - 1) / 2, rows / 2 - (height - 1) / 2
    x, y, _ = np.einsum("ij,jrc->irc", inverse, np.stack([x, y, np.ones_like(x)]))
    places = [2 * (y + (height - 1) / 2 + far), 2 * (x + (width - 1) / 2 + far)]
    read = ndimage.map_coordinates(fine, places, order=1)
    for axis in (0, 1):
        read = np.apply_along_axis(lambda line: np.convolve(line, SYM6[::-1] / 2**0.5)[6 : 6 + len(line)], axis, read)
    return read[8 : 8 + 2 * height : 2, 8 : 8 + 2 * width : 2]


def test_warping_is_the_definition():
    """Any affine maps, some that look far beyond the edges; a picture higher than wide, and one of a single row."""
    for shape in ((3, 9, 6, 2), (1, 1, 5, 1)):
        pictures = pictures_of(*shape)
        inverses = np.tile(np.eye(3), (shape[0], 1, 1))
        inverses[:, :2] += RNG.normal(size=(shape[0], 2, 3)) * [0.4, 0.4, 4]
        found = jax.jit(warped)(pictures, inverses.astype(np.float32))
        expected = np.stack(
            [
                np.stack([reference_warp(channel, inverse) for channel in np.moveaxis(picture, -1, 0)], -1)
                for picture, inverse in zip(pictures.astype(np.float64), inverses)
            ]
        )
        np.testing.assert_allclose(found, expected, atol=3e-5)


def forward_map(amounts: dict[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The paper's figure 15, line by line: where a place goes, in float64."""

    def scaling(x: float, y: float) -> np.ndarray:
        return np.diag([x, y, 1.0])

    def rotation(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])

    def translation(x: float, y: float) -> np.ndarray:
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    one = {name: amount[0].astype(np.float64) for name, amount in amounts.items()}
    height, width = size
    G = np.eye(3)
    G = scaling(1 - 2 * one["x_flip"][0], 1) @ G
    G = rotation(-np.pi / 2 * one["rotate90"][0]) @ G
    G = translation(*np.round(one["integer_translation"] * [width, height])) @ G
    G = scaling(2 ** one["isotropic_scaling"][0], 2 ** one["isotropic_scaling"][0]) @ G
    G = rotation(-np.pi * one["rotation"][0]) @ G
    G = scaling(2 ** one["anisotropic_scaling"][0], 2 ** -one["anisotropic_scaling"][0]) @ G
    G = rotation(-np.pi * one["second_rotation"][0]) @ G
    return translation(*one["fractional_translation"] * [width, height]) @ G


def test_the_transforms_of_position_in_their_order():
    size = (24, 40)
    numbers = {name: jnp.asarray(RNG.uniform(size=(1, t.numbers)), jnp.float32) for name, t in TRANSFORMS.items()}
    amounts = {name: amount for name, amount in quantiles(numbers, ALL).items() if name in GEOMETRY}
    expected = np.linalg.inv(forward_map({name: np.asarray(x) for name, x in amounts.items()}, size))
    np.testing.assert_allclose(jax.jit(partial(inverse_map, size=size))(amounts)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "amount", "change"),
    [
        ("x_flip", [1.0], lambda x: x[:, :, ::-1]),
        ("rotate90", [1.0], lambda x: np.rot90(x, 1, (1, 2))),
        ("rotate90", [2.0], lambda x: np.rot90(x, 2, (1, 2))),
        ("rotate90", [3.0], lambda x: np.rot90(x, 3, (1, 2))),
        ("rotation", [0.5], lambda x: np.rot90(x, 1, (1, 2))),
        ("integer_translation", [0.125, -0.0625], lambda x: np.roll(x, (-2, 4), (1, 2))),
        ("fractional_translation", [0.0625, 0.0], lambda x: np.roll(x, 2, 2)),
        ("isotropic_scaling", [1.0], lambda x: ndimage.zoom(x, (1, 2, 2, 1), **GRID)[:, 16:48, 16:48]),
    ],
)  # fmt: skip
def test_a_transform_of_position_by_its_name(name, amount, change):
    """A smooth picture, away from its edges. The wavelet's filter is nearly symmetric, to a twentieth of a pixel."""
    place = np.arange(32) - 15.5
    y, x = np.meshgrid(place, place, indexing="ij")
    spot = np.exp(-((x - 3) ** 2 + (y + 4) ** 2) / 40) + 0.5 * np.exp(-((x + 4) ** 2 + (y - 2) ** 2) / 30)
    picture = spot[None, :, :, None].astype(np.float32)
    found = warped(jnp.asarray(picture), inverse_map({name: jnp.array([amount], jnp.float32)}, (32, 32)))
    inside = np.s_[:, 6:-6, 6:-6]
    np.testing.assert_allclose(found[inside], change(picture)[inside], atol=0.02)


# --- colour, frequency, noise, holes ------------------------------------------------------------


def test_the_transforms_of_colour_in_their_order():
    """Each as the vector operation that it is, with scipy's rotation about the axis of greys."""
    numbers = {name: jnp.asarray(RNG.uniform(size=(3, t.numbers)), jnp.float32) for name, t in TRANSFORMS.items()}
    numbers["luma_flip"] = jnp.array([[0.1], [0.9], [0.6]])
    amounts = {name: amount for name, amount in quantiles(numbers, ALL).items() if name in COLOR}
    pictures = pictures_of(3, 4, 5, 4)
    expected = pictures.astype(np.float64)
    axis = np.ones(3) / 3**0.5
    for i, picture in enumerate(expected):
        by = {name: float(amount[i, 0]) for name, amount in amounts.items()}
        color = (picture[..., :3] + by["brightness"]) * 2 ** by["contrast"]
        color = color - 2 * by["luma_flip"] * (color @ axis)[..., None] * axis
        color = Rotation.from_rotvec(np.pi * by["hue"] * axis).apply(color.reshape(-1, 3)).reshape(color.shape)
        luma = (color @ axis)[..., None] * axis
        picture[..., :3] = luma + (color - luma) * 2 ** by["saturation"]
    change = jax.jit(lambda x, amounts: recolored(x, color_matrix(amounts)))
    found = change(pictures, amounts)
    np.testing.assert_allclose(found, expected, atol=3e-5)
    np.testing.assert_array_equal(found[..., 3], pictures[..., 3])  # opacity
    # Grey: as three equal colours; their mean is moved by no turn of hue and no saturation.
    grey = change(pictures[..., :1], amounts)
    alike = change(pictures[..., :1].repeat(3, -1), amounts)
    np.testing.assert_allclose(grey[..., 0], np.mean(alike, -1), atol=2e-6)
    signs = 1 - 2 * np.asarray(amounts["luma_flip"])
    plain = (pictures[..., 0] + amounts["brightness"][:, :, None]) * (signs * 2 ** amounts["contrast"])[:, :, None]
    np.testing.assert_allclose(grey[..., 0], plain, atol=3e-6)


def test_bands_of_frequency_by_their_response():
    """A reflected picture is one period of a periodic one, in which a symmetric filter multiplies each frequency by its
    response: of one level |H(w)|^2 / 2 and its complement, at doubled frequencies for the next.
    """
    height, width = 9, 12
    pictures, gains = pictures_of(2, height, width, 3), np.array([[0.3, 1.5, 0.8, 2.0], [1.0, 0.2, 3.0, 0.5]])

    def response(size: int, gains: np.ndarray) -> np.ndarray:
        w = 2 * np.pi * np.arange(size) / size

        def low(w: np.ndarray) -> np.ndarray:
            return np.abs(np.exp(-1j * np.outer(w, np.arange(4))) @ SYM2) ** 2 / 2

        bands = [low(w) * low(2 * w) * low(4 * w), low(w) * low(2 * w) * (1 - low(4 * w))]
        bands += [low(w) * (1 - low(2 * w)), 1 - low(w)]
        return np.tensordot(gains, bands, 1)

    periodic = np.pad(pictures, [(0, 0), (0, height - 2), (0, width - 2), (0, 0)], mode="reflect").astype(np.float64)
    spectrum = np.fft.fft2(periodic, axes=(1, 2))
    for i in range(2):
        spectrum[i] *= response(2 * height - 2, gains[i])[:, None, None] * response(2 * width - 2, gains[i])[:, None]
    expected = np.fft.ifft2(spectrum, axes=(1, 2)).real[:, :height, :width]
    found = jax.jit(filtered)(pictures, gains.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_the_power_of_a_natural_picture_is_kept_band_by_band():
    """By hand: the power 10, 1, 1, 1 of 13. Two bands amplified one after the other, each with its own scale."""
    found = band_gains(jnp.array([[1.0, 0, 0, 0], [0, 0, 0, 2.0], [1.0, 0, 0, 2.0], [0, 0, 0, 0]]))
    first, last = (43 / 13) ** -0.5, (28 / 13) ** -0.5
    expected = [[2 * first, *[first] * 3], [*[last] * 3, 4 * last]]
    expected += [[2 * first * last, first * last, first * last, 4 * first * last], [1] * 4]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_noise_and_holes_by_hand():
    pictures = jnp.asarray(pictures_of(2, 30, 40, 3))
    amounts = {"noise": jnp.array([[0.0], [0.3]])}
    noise = np.asarray(transformed(KEY, pictures, amounts, ALL) - pictures)
    assert not noise[0].any() and stats.kstest(noise[1].ravel(), stats.norm(0, 0.3).cdf).pvalue > 1e-3
    found = np.asarray(transformed(KEY, pictures, {"cutout": jnp.array([[0.31, 0.91], [-9.0, -9.0]])}, ALL))
    np.testing.assert_array_equal(found[1], pictures[1])
    expected = np.array(pictures[0])
    for row in range(30):
        for column in range(40):
            if abs((column + 0.5) / 40 - 0.31) < 0.25 and abs((row + 0.5) / 30 - 0.91) < 0.25:
                expected[row, column] = 0
    np.testing.assert_array_equal(found[0], expected)
    assert 0.1 < (expected == 0).mean() < 0.25


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "config"), [(3, ALL), (1, only("rotation", "contrast")), (4, only("x_flip", "hue", "cutout"))]
)
def test_probability_0_is_the_identity_and_1_is_not(channels, config):
    pictures = jnp.asarray(pictures_of(2, 8, 8, channels))
    augment = jax.jit(adaptive(config))
    np.testing.assert_allclose(augment(KEY, pictures, 0.0), pictures, atol=3e-6)
    found = augment(KEY, pictures, 1.0)
    assert found.dtype == pictures.dtype and np.abs(found - pictures).max((1, 2, 3)).min() > 0.1
    assert not np.array_equal(found, augment(jax.random.key(1), pictures, 1.0))


def test_with_all_off_nothing_happens():
    pictures = jnp.asarray(pictures_of(1, 4, 4, 3))
    np.testing.assert_array_equal(jax.jit(adaptive(OFF))(KEY, pictures, 1.0), pictures)


def test_a_linear_map_but_for_brightness_and_its_adjoint():
    """<A x, y> = <x, A' y>, A' by the gradient, in float64; and the gradient's gradient is A again."""
    config = only(*set(TRANSFORMS) - {"brightness", "noise"})
    with jax.enable_x64():
        x, y, z = (jnp.asarray(RNG.normal(size=(3, 6, 5, 3))) for _ in range(3))

        def products(x, y, z):
            def augment(x):
                return adaptive(config)(KEY, x, 0.9)

            image, pull = jax.vjp(augment, x)
            (back,) = pull(y)
            again = jax.vjp(lambda y: jax.vjp(augment, x)[1](y)[0], y)[1](z)[0]
            return image, back, again, augment(z)

        image, back, again, direct = jax.jit(products)(x, y, z)
        assert image.dtype == jnp.float64
        np.testing.assert_allclose(jnp.vdot(image, y), jnp.vdot(x, back), rtol=1e-11)
        np.testing.assert_allclose(again, direct, rtol=1e-9, atol=1e-9)


def test_replicas_are_each_as_alone():
    keys, pictures = jax.random.split(KEY, 2), pictures_of(2, 3, 6, 6, 3)
    probabilities = jnp.array([0.2, 0.9])
    config = only("rotation", "brightness", "filtering")
    together = jax.jit(jax.vmap(adaptive(config)))(keys, pictures, probabilities)
    alone = jax.jit(adaptive(config))
    for i in range(2):
        np.testing.assert_allclose(together[i], alone(keys[i], pictures[i], probabilities[i]), atol=1e-5)


def test_it_is_made_of_products():
    """No convolution, and no loop, in what is done to pictures and in its gradient."""
    pictures = jnp.zeros((2, 6, 6, 3))
    amounts = {name: jnp.zeros((2, transform.numbers)) for name, transform in TRANSFORMS.items()}
    amounts.pop("noise")  # random numbers are made in a loop
    text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(transformed(KEY, x, amounts, ALL) ** 2)))(pictures))
    assert "dot_general" in text and "conv" not in text.replace("convert", "")
    assert "scan" not in text and "while" not in text


def test_what_is_refused():
    with pytest.raises(ValueError, match="pictures of 2 channels"):
        adaptive()(KEY, jnp.zeros((1, 4, 4, 2)), 0.5)
    with pytest.raises(ConfigError, match="--ada.isotropic-scaling -1 is not 0 or above"):
        AdaptiveConfig(isotropic_scaling=-1.0)
    with pytest.raises(ConfigError, match="--ada.cutout 2 is a fraction above 1"):
        AdaptiveConfig(cutout=2.0)
    with pytest.raises(ConfigError, match="--ada-thousands 0 is not above 0"):
        dcgan.Config(ada_thousands=0.0)
    with pytest.raises(ConfigError, match=r"--ada-target nan is not in \[-1, 1\]"):
        dcgan.Config(ada_target=float("nan"))


def test_an_experiment_passes_on_the_options():
    """A notch is 4 steps of 5 pictures in 40. What is 0 everywhere is changed by brightness alone."""
    options = {"ada": AdaptiveConfig(brightness=0.0), "ada_target": 0.1, "ada_thousands": 0.04}
    augment = dcgan.augmentation(dcgan.Config(augment="adaptive", batch_size=5, **options))
    moved = augment.adapt(initial(0.25), jnp.array([1.0, 1.0, 1.0, -1.0, -1.0]), jnp.int32(3))
    np.testing.assert_allclose(moved.probability, 0.25 + 5 * 4 / 40)
    np.testing.assert_allclose(augment.apply(KEY, jnp.zeros((9, 8, 8, 1)), 1.0), 0, atol=1e-5)
