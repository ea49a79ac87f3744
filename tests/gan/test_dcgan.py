"""DCGAN and its conditional forms against the same networks written in NumPy."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.conditional_gan
import experiments.dcgan
from jaxarch.gan.dcgan import DCGANConfig, Discriminator, Generator, dcgan, widths
from jaxarch.gan.training import GameConfig, OptimConfig, hypers, make_init, make_step
from jaxarch.run.protocol import ConfigError

KEY = jax.random.key(0)
CONFIG = DCGANConfig(latents=3, features=2)
LABELS = np.array([1, 0, 2, 1, 1], np.int32)


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shaken(variables):
    """Parameters and statistics of which none is 0 or 1."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten([jnp.asarray(0.1 + np.abs(some(*leaf.shape, seed=n))) for n, leaf in enumerate(leaves)])


# --- the networks in NumPy ----------------------------------------------------------------------


def convolved(x, layer, stride=2):
    """4 x 4 with stride 2, or 3 x 3; a zero around the picture."""
    kernel = layer["kernel"]
    size, length = kernel.shape[0], x.shape[1] // stride
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [slice(i, i + (length - 1) * stride + 1, stride) for i in range(size)]
    windows = np.stack([x[:, rows, columns] for rows in places for columns in places], -2)
    y = np.einsum("bhwkc,kcf->bhwf", windows, kernel.reshape(size * size, *kernel.shape[2:]))
    return y + layer.get("bias", 0)


def up(y, kernel):
    """The adjoint: each pixel adds its products to 4 x 4 pixels, 2 apart; what lies beyond the edge is cut off."""
    batch, size, _, _ = y.shape
    x = np.zeros((batch, 2 * size + 2, 2 * size + 2, kernel.shape[2]))
    for i in range(4):
        for j in range(4):
            x[:, i : i + 2 * size : 2, j : j + 2 * size : 2] += y @ kernel[i, j].T
    return x[:, 1:-1, 1:-1]


def normalized(x, variables, name, labels=None, train=True):
    params = variables["params"][name]
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    if not train:
        mean, variance = variables["batch_stats"][name]["mean"], variables["batch_stats"][name]["var"]
    scale, bias = params["scale"], params["bias"]
    if labels is not None:
        scale, bias = scale[labels][:, None, None], bias[labels][:, None, None]
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def generated(variables, latents, labels, told, deep, train):
    params = variables["params"]
    if told == "embedding":
        latents = np.concatenate([latents, params["embedding"]["embedding"][labels]], axis=1)
    by_norm = labels if told == "batch_norm" else None
    x = (latents @ params["dense"]["kernel"]).reshape(len(latents), 4, 4, -1)
    for number in range(2 if deep else 1):
        x = np.maximum(normalized(x, variables, f"norm_{number}", by_norm, train), 0)
        x = up(x, params[f"up_{number}"]["kernel"])
    x = np.maximum(normalized(x, variables, f"norm_{number + 1}", by_norm, train), 0)
    if deep:
        return np.tanh(convolved(x, params["picture"], 1))
    return np.tanh(up(x, params["picture"]["kernel"]) + params["picture"]["bias"])


def judged(variables, x, labels, told, norm, deep, train):
    params = variables["params"]
    if told == "embedding":
        x = np.concatenate([x, params["embedding"]["embedding"][labels].reshape(len(x), 16, 16, 1)], axis=-1)
    for number, stride in enumerate([1, 2, 1, 2, 1] if deep else [2, 2]):
        x = convolved(x, params[f"layer_{number}"], stride)
        if norm == "batch" and number:
            x = normalized(x, variables, f"norm_{number}", None, train)
        x = np.maximum(x, 0.2 * x)
    flat = x.reshape(len(x), -1)
    logits = (flat @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]
    if told == "projection":
        return logits + (x.sum(axis=(1, 2)) * params["embedding"]["embedding"][labels]).sum(axis=1)
    if told == "auxiliary":
        return logits, flat @ params["classes"]["kernel"] + params["classes"]["bias"]
    return logits


def numpy_of(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize(
    ("classes", "told", "deep"), [(0, "batch_norm", False), (3, "embedding", False), (3, "batch_norm", True)]
)
def test_generator(classes, told, deep):
    generator = Generator(16, 2, latent_dim=3, features=2, deep=deep, classes=classes, told=told)
    latents, labels = some(5, 3), LABELS if classes else None
    variables = shaken(generator.init(KEY, jnp.asarray(latents), labels))
    told = told if classes else None
    for train in (True, False):
        pictures, moved = generator.apply(variables, jnp.asarray(latents), labels, train=train, mutable=["batch_stats"])
        expected = generated(numpy_of(variables), latents, labels, told, deep, train)
        np.testing.assert_allclose(pictures, expected, atol=2e-4)
        kept = jax.tree.map(np.array_equal, moved["batch_stats"], variables["batch_stats"])
        assert not train == all(jax.tree.leaves(kept)) == any(jax.tree.leaves(kept))


@pytest.mark.parametrize(
    ("told", "norm", "deep"),
    [
        (None, "batch", False),
        (None, "none", True),
        ("embedding", "batch", True),
        ("projection", "none", False),
        ("auxiliary", "batch", False),
    ],
)
def test_discriminator(told, norm, deep):
    discriminator = Discriminator(2, norm, deep, classes=3 if told else 0, told=told or "projection")
    pictures, labels = some(5, 16, 16, 3), LABELS if told else None
    variables = shaken(discriminator.init(KEY, pictures, labels))
    assert set(variables) == {"params", "batch_stats"} - ({"batch_stats"} if norm == "none" else set())
    for train in (True, False):
        said, _ = discriminator.apply(variables, pictures, labels, train=train, mutable=["batch_stats"])
        expected = judged(numpy_of(variables), pictures, labels, told, norm, deep, train)
        for one, other in zip(jax.tree.leaves(said), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_spectral_normalisation_reaches_every_matrix():
    """The function scales with no kernel: each is divided by its own largest singular value."""
    discriminator = Discriminator(2, "spectral", classes=3, told="projection")
    pictures = some(5, 8, 8, 1)
    variables = discriminator.init(KEY, pictures, LABELS)
    vectors, params = variables["spectral"], variables["params"]
    assert set(vectors) == set(params) == {"layer_0", "logit", "embedding"}
    once = discriminator.apply(variables, pictures, LABELS, train=False)
    doubled = {name: {kind: 2 * leaf for kind, leaf in leaves.items()} for name, leaves in params.items()}
    np.testing.assert_allclose(
        discriminator.apply({**variables, "params": doubled}, pictures, LABELS, train=False), once, rtol=1e-5
    )
    with_classes = Discriminator(2, "spectral", classes=3, told="auxiliary").init(KEY, pictures, LABELS)
    assert "classes" in with_classes["spectral"]


def test_minibatch_deviation_sees_a_collapse():
    """Of equal pictures the added map is near 0, of others it is not: with weights on it alone the logits tell."""
    discriminator = Discriminator(2, "none", minibatch_deviation=True)
    pictures = some(4, 8, 8, 1)
    variables = discriminator.init(KEY, pictures)
    kernel = variables["params"]["logit"]["kernel"].reshape(16, 3, 1)
    kernel = kernel.at[:, :2].set(0).at[:, 2].set(1).reshape(48, 1)
    variables = {"params": {**variables["params"], "logit": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    same, different = np.repeat(pictures[:1], 4, axis=0), pictures
    assert np.all(discriminator.apply(variables, same) < 0.01)
    assert np.all(discriminator.apply(variables, 10 * different) > 0.1)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_and_channels(size, channels):
    generator, discriminator = dcgan(CONFIG, (size, size, channels))
    latents = jnp.ones((1, 3))
    g = jax.eval_shape(generator.init, KEY, latents)
    pictures = jax.eval_shape(lambda v: generator.apply(v, latents, train=False), g)
    assert pictures.shape == (1, size, size, channels)
    two = jnp.ones((1, size, size, 2 * channels))  # packed
    d = jax.eval_shape(discriminator.init, KEY, two)
    assert jax.eval_shape(lambda v: discriminator.apply(v, two, train=False), d).shape == (1,)


def test_layers_are_as_wide_as_the_picture_is_small():
    generator, discriminator = dcgan(CONFIG, (32, 32, 3))
    g = jax.eval_shape(generator.init, KEY, jnp.ones((1, 3)))["params"]
    d = jax.eval_shape(discriminator.init, KEY, jnp.ones((1, 32, 32, 3)))["params"]
    assert [g[name]["kernel"].shape[2:] for name in ("up_0", "up_1", "picture")] == [(4, 8), (2, 4), (3, 2)]
    assert [d[name]["kernel"].shape[2:] for name in ("layer_0", "layer_1", "layer_2")] == [(3, 2), (2, 4), (4, 8)]
    assert g["dense"]["kernel"].shape == (3, 16 * 8) and d["logit"]["kernel"].shape == (16 * 8, 1)


def test_deep_layers_are_those_of_table_3():
    """Of Miyato et al. 2018, for 32 pixels, a quarter as wide: convolutions of 3 x 3 and 4 x 4 in turn."""
    generator, discriminator = dcgan(DCGANConfig(3, 16, "spectral", deep=True), (32, 32, 3))
    g = jax.eval_shape(generator.init, KEY, jnp.ones((1, 3)))["params"]
    d = jax.eval_shape(discriminator.init, KEY, jnp.ones((1, 32, 32, 3)))["params"]
    expected = [(3, 64), (4, 64), (3, 128), (4, 128), (3, 256), (4, 256), (3, 512)]
    kernels = [d[f"layer_{number}"]["kernel"].shape for number in range(7)]
    assert [(shape[0], 4 * shape[3]) for shape in kernels] == expected and "layer_7" not in d
    assert d["logit"]["kernel"].shape == (4 * 4 * 512 // 4, 1)
    assert [4 * g[f"up_{number}"]["kernel"].shape[2] for number in range(3)] == [256, 128, 64] and "up_3" not in g
    assert g["dense"]["kernel"].shape == (3, 4 * 4 * 512 // 4) and g["picture"]["kernel"].shape == (3, 3, 16, 3)


def test_widths_are_those_of_the_paper():
    """Fig. 1: 64 pixels, 1024 features at 4 x 4, 128 at 32 x 32. Beyond, no wider."""
    assert widths(64, 128) == [128, 256, 512, 1024] and widths(8, 5) == [5] and widths(128, 1)[-2:] == [8, 8]


def test_the_draw_is_that_of_the_paper():
    """Sec. 4: all weights from N(0, 0.02)."""
    g, d = dcgan(DCGANConfig(features=32), (16, 16, 3))
    inits = jax.jit(lambda: (g.init(KEY, jnp.ones((1, 100))), d.init(KEY, jnp.ones((1, 16, 16, 3)))))
    for params in (variables["params"] for variables in inits()):
        kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in str(path[-1])]
        assert len(kernels) == 3
        for kernel in kernels:
            np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)


def test_half_precision_has_float32_parameters():
    g, d = dcgan(CONFIG, (8, 8, 1), dtype=jnp.bfloat16)
    variables = g.init(KEY, jnp.ones((2, 3)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    pictures = g.apply(variables, jnp.ones((2, 3)), train=False)
    assert pictures.dtype == jnp.bfloat16
    assert d.apply(d.init(KEY, pictures), pictures, train=False).dtype == jnp.bfloat16


PLAIN_GAME = GameConfig("non_saturating", "none", reuse_fakes=True)
PLAYED = [
    (DCGANConfig(3, 2, "batch", deep=True), ("embedding", "auxiliary"), PLAIN_GAME),
    (DCGANConfig(3, 2, "spectral", minibatch_deviation=True), ("batch_norm", "projection"), GameConfig()),
]


@pytest.mark.parametrize(("config", "told", "game"), PLAYED)
def test_a_step_moves_all_there_is(config, told, game):
    """R1 and R2 in the second game: through them too every parameter has a finite gradient."""
    generator, discriminator = dcgan(config, (8, 8, 1), 3, told)
    optim = OptimConfig(average=0.0)
    pictures, labels = np.tanh(some(4, 8, 8, 1)), LABELS[:4]
    init = jax.jit(make_init(generator, discriminator, game, optim, pictures, labels))
    before = init(KEY, hypers(game, optim))
    step = jax.jit(make_step(generator, discriminator, game, optim, lambda batch: batch))
    after, _ = step(before, (pictures, labels), jnp.int32(0))
    still = set()
    for name in ("generator", "discriminator", "g_stats", "d_stats"):
        old, new = (getattr(state, name) for state in (before, after))
        moved = jax.tree.map(lambda one, other: bool(jnp.any(one != other)), old, new)
        still |= {jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(moved) if not leaf}
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(new))
    # A difference of logits has no bias, a matrix of one column one singular vector.
    assert still <= {"['logit']['bias']", "['spectral']['logit']['vector']"}


def step_of(game):
    return make_step(*dcgan(CONFIG, (8, 8, 1)), game, OptimConfig(), lambda batch: batch)


def test_labels_that_are_missing():
    for network, x in (
        (Generator(8, 1, 3, classes=2), jnp.ones((1, 3))),
        (Discriminator(classes=2), np.ones((1, 8, 8, 1))),
    ):
        with pytest.raises(ValueError, match="a conditional network needs labels"):
            network.init(KEY, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dcgan(CONFIG, (12, 12, 1)), "--size 12 is not 8, 16, 32, 64 or another power of two."),
        (lambda: dcgan(CONFIG, (4, 4, 1)), "--size 4 is not 8"),
        (lambda: dcgan(CONFIG, (8, 16, 1)), "pictures of 8 x 16 pixels are not square"),
        (lambda: step_of(GameConfig(path_length=2.0)), "--game.path-length is of generators with styles"),
        (lambda: step_of(GameConfig(consistency=1.0)), "--game.consistency compares samples with augmented ones"),
        (lambda: DCGANConfig(latents=0), "--model.latents 0 is below 1."),
        (lambda: DCGANConfig(features=-1), "--model.features -1 is below 1."),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("experiment", [experiments.dcgan, experiments.conditional_gan])
def test_classes_are_an_asset_where_labels_are_told(experiment, tmp_path):
    """`--init-from` takes no weights of a run with other assets: without labels other pictures are no hindrance."""
    pytest.importorskip("sklearn")
    experiment.experiment(experiment.Config()).assets(tmp_path)
    assert (tmp_path / "classes.json").exists() == (experiment is experiments.conditional_gan)
    assert (tmp_path / "data.json").exists() and (tmp_path / "generator.json").exists()
