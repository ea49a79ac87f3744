"""StyleGAN2: its parts against their definitions, the whole against values of the published code."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from jaxarch.gan.regularizers import gradient_at, path_lengths
from jaxarch.gan.stylegan2 import (
    Conv,
    Dense,
    StyleGAN2Config,
    modulated_convolution,
    stylegan2,
    truncated,
)
from jaxarch.gan.training import GANState, make_sampler
from jaxarch.run.protocol import ConfigError
from tests.gan.record_stylegan2 import KEY, MEAN_LENGTH, PLACE, VARIANTS, drawn, labels, networks

SMALL = StyleGAN2Config(latent_dim=5, style_dim=6, mapping_layers=2, channel_base=64, channel_max=8)
RNGS = dict(zip(("params", "noise", "mixing"), jax.random.split(jax.random.key(0), 3), strict=True))


def error(found: Any, expected: Any) -> float:
    """Of all leaves together, relative."""
    one, other = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-9))  # some gradients are 0


# --- the published code -------------------------------------------------------------------------


def recorded(name: str) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """What was found, and the gradients of each player by the names of its parameters."""
    values = load_file(PLACE / f"{name}.safetensors")
    gradients: dict[str, dict[str, np.ndarray]] = {"generator": {}, "discriminator": {}}
    for path in [path for path in values if "/" in path]:
        player, _, rest = path.partition("/")
        gradients[player][rest] = values.pop(path)
    return values, gradients


def given_of(name: str, player: int) -> tuple[Any, Any, Any]:
    return networks(name)[player], jax.tree.map(jnp.asarray, drawn(name)), jax.tree.map(jnp.asarray, labels(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_generator_is_the_published_one(name):
    """Pictures, the lengths of paths, and the gradients of their penalty, of the second order."""
    generator, given, asked = given_of(name, 0)
    values, gradients = recorded(name)
    mean = {"averages": {"style": jnp.zeros(generator.config.style_dim)}}

    @jax.jit
    def answers(params):
        def styles_of(params):
            return generator.apply({"params": params, **mean}, given["latents"], asked, train=False, method="mapping")

        def pictures(params, styles):
            options = {"train": False, "noise": given["noise"], "method": "synthesis"}
            return generator.apply({"params": params, **mean}, styles, **options)

        def penalty(params):
            lengths = path_lengths(lambda styles: pictures(params, styles), styles_of(params), KEY)
            return jnp.mean((lengths - MEAN_LENGTH) ** 2), lengths

        grads, lengths = jax.grad(penalty, has_aux=True)(params)
        return pictures(params, styles_of(params)), lengths, grads

    pictures, lengths, grads = answers(given["generator"])
    assert error(pictures, values["pictures"]) < 2e-6
    assert error(lengths, values["lengths"]) < 2e-6
    own = flatten_dict(grads, sep="/")
    assert error(own, gradients["generator"]) < 2e-6
    for path, leaf in gradients["generator"].items():
        assert error(own[path], leaf) < 1e-4, path


@pytest.mark.parametrize("name", VARIANTS)
def test_the_discriminator_is_the_published_one(name):
    """Logits, R1 and its gradients; in float64 too, as biases' gradients are small differences of large numbers."""
    discriminator, given, asked = given_of(name, 1)
    values, gradients = recorded(name)

    def answers(dtype):
        network = discriminator.clone(dtype=dtype)
        params, samples = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype), (given["discriminator"], given["samples"])
        )

        def critic(params, x):
            return network.apply({"params": params}, x, asked)

        both = jax.value_and_grad(lambda p: gradient_at(lambda x: critic(p, x), samples))
        return jax.jit(lambda p: (critic(p, samples), *both(p)))(params)

    logits, penalty, grads = answers(jnp.float32)
    assert error(logits, values["logits"]) < 2e-6
    assert error(penalty, values["penalty"]) < 2e-6
    assert error(flatten_dict(grads, sep="/"), gradients["discriminator"]) < 2e-6
    with jax.enable_x64(True):
        logits, penalty, grads = answers(jnp.float64)
        assert error(logits, values["logits"]) < 1e-7
        own = flatten_dict(grads, sep="/")
        for path, leaf in gradients["discriminator"].items():
            assert error(own[path], leaf) < 1e-7, path


# --- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulation_is_a_kernel_for_each_picture(demodulate):
    """Karras et al. 2020, eq. 1 and 3, pixel by pixel."""
    rng = np.random.default_rng(0)
    x, kernel, styles = (rng.normal(size=shape) for shape in [(2, 4, 5, 3), (3, 3, 3, 2), (2, 3)])
    around = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = np.zeros((2, 4, 5, 2))
    for n in range(2):
        own = kernel * styles[n][:, None]
        if demodulate:
            own = own / np.sqrt((own**2).sum((0, 1, 2)) + 1e-8)
        for i in range(4):
            for j in range(5):
                expected[n, i, j] = np.einsum("abc,abco->o", around[n, i : i + 3, j : j + 3], own)
    given = [jnp.asarray(part, jnp.float32) for part in (x, kernel, styles)]
    found = jax.jit(lambda x, k, s: modulated_convolution(x, k, s, demodulate))(*given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_demodulated_has_unit_variance():
    rng = np.random.default_rng(0)
    shapes = (4, 32, 32, 6), (3, 3, 6, 4), (4, 6)
    x, kernel, styles = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    found = np.asarray(modulated_convolution(x, 5 * kernel, 3 * styles))[:, 1:-1, 1:-1]
    np.testing.assert_allclose(found.var((0, 1, 2)), 1, atol=0.1)


def test_truncation_is_a_share_of_the_way_to_the_mean():
    styles, mean = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]]), jnp.asarray([1.0, 0.0])
    np.testing.assert_allclose(truncated(styles, mean, 0.5), [[[1, 1], [2, 2]]])


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_a_new_layer_keeps_the_mean_square(rate):
    """Whatever the width, though parameters are of size 1 / rate."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(500, 300)), jnp.float32)
    for active in (True, False):
        layer = Dense(200, rate=rate, active=active)
        y, variables = layer.init_with_output(jax.random.key(0), x)
        np.testing.assert_allclose(np.mean(np.square(y)), 1.04 if active else 1, rtol=0.03)  # 2 (1 + 0.2^2) / 2
        np.testing.assert_allclose(np.std(variables["params"]["kernel"]) * rate, 1, rtol=0.02)


def test_a_new_convolution_keeps_the_mean_square():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 30)), jnp.float32)
    y, _ = Conv(50).init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(np.mean(np.square(y)[:, 1:-1, 1:-1]), 1.04, rtol=0.05)


# --- the mapping --------------------------------------------------------------------------------

GENERATOR, DISCRIMINATOR = stylegan2(SMALL, (8, 8, 3), classes=2)
LATENTS = jax.random.normal(jax.random.key(1), (64, 5))
LABELS = jnp.arange(64) % 2


@pytest.fixture(scope="module")
def variables():
    return jax.jit(GENERATOR.init)(RNGS, LATENTS[:1], LABELS[:1])


def mapped(variables, generator=GENERATOR, **options):
    return jax.jit(lambda v: generator.apply(v, LATENTS, LABELS, method="mapping", **options))(variables)


def test_the_mean_style_moves_by_a_two_hundredth_in_training_alone(variables):
    assert not variables["averages"]["style"].any()
    styles = mapped(variables, train=False)
    assert styles.shape == (64, 4, 6)
    _, after = mapped(variables, train=True, rngs=RNGS, mutable=["averages"])
    np.testing.assert_allclose(after["averages"]["style"], 0.005 * styles[:, 0].mean(0), rtol=1e-4, atol=1e-8)
    _, again = mapped({**variables, **after}, train=True, rngs=RNGS, mutable=["averages"])
    np.testing.assert_allclose(again["averages"]["style"], 1.995 * after["averages"]["style"], rtol=1e-4, atol=1e-8)
    _, unmoved = mapped({**variables, **after}, train=False, mutable=["averages"])
    np.testing.assert_array_equal(unmoved["averages"]["style"], after["averages"]["style"])


def test_latents_and_labels_count_by_their_direction(variables):
    styles = mapped(variables, train=False)
    apply = jax.jit(lambda z, c: GENERATOR.apply(variables, z, c, method="mapping", train=False))
    np.testing.assert_allclose(apply(7 * LATENTS, LABELS), styles, rtol=1e-3, atol=1e-6)
    other = apply(LATENTS, 1 - LABELS)
    assert np.abs(other - styles).mean() > 0.1 * np.abs(styles).mean()


def test_a_truncation_of_0_is_the_mean_style(variables):
    mean = jnp.arange(6.0)
    given = {**variables, "averages": {"style": mean}}
    np.testing.assert_array_equal(mapped(given, train=False, truncation=0.0), np.broadcast_to(mean, (64, 4, 6)))
    whole, half = (mapped(given, train=False, truncation=t) for t in (1.0, 0.5))
    np.testing.assert_allclose(half, (whole + mean) / 2, rtol=1e-5, atol=1e-6)


def test_mixed_pictures_have_their_own_style_first_and_another_from_some_layer_on(variables):
    plain = mapped(variables, train=False)[:, 0]
    for share in (0.0, 0.5, 1.0):
        generator = GENERATOR.clone(config=dataclasses.replace(SMALL, mixing=share))
        styles = np.asarray(mapped(variables, generator, train=True, rngs=RNGS))
        own = np.all(np.abs(styles - plain[:, None]) < 1e-6, axis=-1)
        assert own[:, 0].all()
        changes = own.sum(1)  # the layer at which the other style begins; 4: none does
        assert set(changes) == {0.0: {4}, 0.5: {1, 2, 3, 4}, 1.0: {1, 2, 3}}[share]
        assert abs((changes < 4).mean() - share) < 0.2
        for row, first in zip(styles, changes):
            np.testing.assert_array_equal(row[first:], np.broadcast_to(row[-1], row[first:].shape))
    # Other latents for each picture, whose labels are the same.
    late = styles[:, -1]
    assert len(np.unique(late.round(5), axis=0)) == 64


# --- the synthesis ------------------------------------------------------------------------------


def noises(variables, **options) -> dict[str, np.ndarray]:
    """What each layer adds: its output where kernels are 0 and noise has the strength 1."""
    params = flatten_dict(variables["params"], sep="/")
    for path in params:
        if path.startswith("convs") and path.endswith(("kernel", "noise_strength")) and "affine" not in path:
            params[path] = jnp.ones(()) if path.endswith("strength") else 0 * params[path]
    tree: dict[str, Any] = {}
    for path, leaf in params.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf

    @jax.jit
    def applied(tree):
        given = {**variables, "params": tree}
        return GENERATOR.apply(given, LATENTS[:3], LABELS[:3], capture_intermediates=True, **options)[1]

    found = {}
    for name, values in applied(tree)["intermediates"].items():
        if name.startswith("convs"):
            y = np.asarray(values["__call__"][0])[..., 0] / np.sqrt(2)
            found[name] = np.where(y < 0, 5 * y, y)
    return found


def test_every_layer_and_picture_has_noise_of_its_own(variables):
    found = noises(variables, train=True, rngs=RNGS, mutable=["intermediates"])
    assert {name: layer.shape for name, layer in found.items()} == {
        "convs_4_1": (3, 4, 4),
        "convs_8_0": (3, 8, 8),
        "convs_8_1": (3, 8, 8),
    }
    same_size = np.concatenate([found["convs_8_0"], found["convs_8_1"]]).reshape(6, -1)
    assert np.abs(np.corrcoef(same_size) - np.eye(6)).max() < 0.5
    np.testing.assert_allclose(same_size.std(), 1, atol=0.15)


def test_a_pictures_noise_does_not_depend_on_how_many_are_made(variables):
    def made(count):
        apply = jax.jit(lambda v: GENERATOR.apply(v, LATENTS[:count], LABELS[:count], train=False, rngs=RNGS))
        return apply({**variables, "params": loud})

    loud = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if "noise_strength" in jax.tree_util.keystr(path) else leaf, variables["params"]
    )
    np.testing.assert_allclose(made(5)[:2], made(2), atol=1e-5)


def test_the_sampler_draws_noise_where_it_is_given_a_key(variables):
    loud = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if "noise_strength" in jax.tree_util.keystr(path) else leaf, variables["params"]
    )
    stats = {"averages": variables["averages"]}
    state = GANState(loud, {}, None, stats, {}, {}, {}, None, None, None, None)
    sample = jax.jit(make_sampler(GENERATOR))
    given = jnp.tile(LATENTS[:1], (2, 1)), LABELS[:1].repeat(2)
    for key, alike in ((None, True), (RNGS["noise"], False)):
        one, other = sample(state, *given, key)
        assert np.allclose(one, other, atol=1e-5) == alike


def test_without_a_key_the_noise_is_the_same_for_all_pictures_and_calls(variables):
    found, again = (noises(variables, train=False, mutable=["intermediates"]) for _ in range(2))
    for name, layer in found.items():
        np.testing.assert_array_equal(layer, again[name])
        np.testing.assert_array_equal(layer, np.broadcast_to(layer[:1], layer.shape))
    one, other = found["convs_8_0"][0].ravel(), found["convs_8_1"][0].ravel()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_noise_that_is_given_is_what_counts(variables):
    assert GENERATOR.noise_shapes() == {"4_1": (1, 4, 4, 1), "8_0": (1, 8, 8, 1), "8_1": (1, 8, 8, 1)}
    given = {
        name: jnp.full(shape, 2.0 + number) for number, (name, shape) in enumerate(GENERATOR.noise_shapes().items())
    }
    found = noises(variables, train=True, rngs=RNGS, mutable=["intermediates"], noise=given)
    assert [float(found[f"convs_{name}"].mean().round(4)) for name in given] == [2, 3, 4]


def test_in_bfloat16_it_is_the_same_model(variables):
    generator, discriminator = stylegan2(SMALL, (8, 8, 3), 2, jnp.bfloat16)
    pictures, halves = (
        jax.jit(lambda v, g=g: g.apply(v, LATENTS[:8], LABELS[:8], train=False))(variables)
        for g in (GENERATOR, generator)
    )
    assert halves.dtype == jnp.float32 and error(halves, pictures) < 0.03
    params = jax.jit(DISCRIMINATOR.init)(RNGS, pictures, LABELS[:8])
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, params))
    logits, halves = (
        jax.jit(lambda v, d=d: d.apply(v, pictures, LABELS[:8]))(params) for d in (DISCRIMINATOR, discriminator)
    )
    assert logits.shape == (8,) and halves.dtype == jnp.float32 and error(halves, logits) < 0.1


@pytest.mark.parametrize("image, layers", [((4, 4, 1), 2), ((8, 8, 4), 4), ((64, 64, 3), 10), ((1024, 1024, 3), 18)])
def test_every_power_of_two(image, layers):
    generator, discriminator = stylegan2(SMALL, image)
    assert generator.layers == layers and generator.latent_dim == 5
    latents = jnp.zeros((1, 5))
    shapes = jax.eval_shape(generator.init, RNGS, latents)
    pictures = jax.eval_shape(lambda v: generator.apply(v, latents, rngs=RNGS), shapes)
    assert pictures.shape == (1, *image)
    params = jax.eval_shape(discriminator.init, RNGS, pictures)
    assert jax.eval_shape(discriminator.apply, params, pictures).shape == (1,)


def test_a_conditional_network_needs_labels():
    with pytest.raises(ValueError, match="was given no labels"):
        jax.eval_shape(GENERATOR.init, RNGS, LATENTS)


@pytest.mark.parametrize(
    "wrong, image, message",
    [
        ({}, (8, 16, 3), "pictures of 8 x 16 pixels are not square, of 4, 8, 16 ... pixels; --size 32 is."),
        ({}, (12, 12, 3), "pictures of 12 x 12 pixels are not square"),
        ({}, (2, 2, 3), "pictures of 2 x 2 pixels are not square"),
        ({"style_dim": 0}, (8, 8, 3), "--model.style-dim 0 is below 1."),
        ({"mixing": 1.5}, (8, 8, 3), "--model.mixing 1.5 is not in [0, 1]; 0.9 is usual."),
        ({"mapping_rate": 0.0}, (8, 8, 3), "--model.mapping-rate 0 is not above 0; 0.01 is usual."),
        ({"clamp": -1.0}, (8, 8, 3), "--model.clamp -1 is not 0 or above; 0 is off."),
    ],
)
def test_wrong_numbers_are_refused(wrong, image, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        stylegan2(StyleGAN2Config(**wrong), image)
