"""What is drawn and measured of fakes, with a generator that draws its label."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxarch.data.images import ImageData, Pictures, load_images
from jaxarch.gan import features, reports
from jaxarch.gan.reports import extractor_of, make_fakes, make_report
from jaxarch.gan.training import GANState
from jaxarch.run import ConfigError


class Painter(nn.Module):
    """Pictures of one grey each: the label's, or that of the first latent; and a parameter, as others have one."""

    latent_dim: int = 2

    @nn.compact
    def __call__(self, latents, condition=None, *, train=True, brighter=0.0):
        grey = self.param("grey", nn.initializers.zeros, ())
        level = jnp.tanh(latents[:, 0]) if condition is None else condition - 1.0
        return jnp.broadcast_to((grey + level + brighter)[:, None, None, None], (len(latents), 8, 8, 1))


def state(grey=0.0):
    """Of which a sampler reads the average alone."""
    fields = dict.fromkeys(GANState.__dataclass_fields__)
    return GANState(**(fields | {"generator": {"grey": 9.0}, "average": {"grey": jnp.asarray(grey)}, "g_stats": {}}))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageData:
    """Three classes of pictures that lie one after another, 40, 20 and 20 of them; noise about a grey of their own."""
    place = tmp_path_factory.mktemp("data") / "shades"
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate((("a", 40), ("b", 20), ("c", 20))):
        (place / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(80 * label, 80 * label + 60, (8, 8), np.uint8)
            Image.fromarray(pixels).save(place / name / f"{number}.png")
    return load_images(str(place), size=8, gray=True, cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("count", [3, 4, 10])
def test_fakes_are_as_many_as_labels_and_of_them(count, monkeypatch):
    """Also where they fill several batches of 4, the last one in part."""
    monkeypatch.setattr(reports, "BATCH", 4)
    labels = np.arange(count) % 3
    pixels = make_fakes(Painter())(state(), jax.random.key(0), labels)
    assert pixels.shape == (count, 8, 8, 1) and pixels.dtype == np.uint8
    # -1 is black, 0 the middle, 1 white.
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], np.array([0, 128, 255])[labels])
    brighter = make_fakes(Painter(), brighter=0.5)(state(), jax.random.key(0), labels)
    np.testing.assert_array_equal(brighter[:, 0, 0, 0], np.array([64, 191, 255])[labels])


def test_latents_differ_from_batch_to_batch(monkeypatch):
    monkeypatch.setattr(reports, "BATCH", 4)
    pixels = make_fakes(Painter())(state(), jax.random.key(0), np.zeros(12, int), False)
    assert len(np.unique(pixels[:, 0, 0, 0])) > 8  # of 256 greys two may be equal


def test_the_extractor_is_of_the_data(data, monkeypatch):
    calls = []
    monkeypatch.setattr(features, "classifier", lambda data, say: calls.append(data.name) or "trained")
    name, extractor = extractor_of(data)
    assert name == "shades-cnn" and calls == []
    assert extractor() == extractor() == "trained" and calls == ["shades"]
    name, extractor = extractor_of(data._replace(classes=("all",)))
    assert name == "pixels" and (extractor().size, extractor().channels) == (8, 1)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_report(conditional, data, tmp_path, monkeypatch):
    taught = []

    def trained_on_fakes(fakes: Pictures, given: ImageData):
        taught.append(fakes)
        return {"val/cas[shades-cnn]": jnp.float32(0.5)}

    monkeypatch.setattr(features, "trained_on_fakes", trained_on_fakes)
    pixels = features.pixels(8, 1)
    report = make_report(Painter(), data, lambda: pixels, 6, conditional, {"bright.png": {"brighter": 0.2}})
    found = {}
    for step in (3, 6):
        folder = tmp_path / "samples" / f"{step:07d}"
        folder.mkdir(parents=True)
        found[step] = report(state(), jax.random.key(step), folder)
        assert {"val/fid[pixels]", "val/fid_floor[pixels]", "val/recall[pixels]"} <= found[step].keys()
        assert (folder / "fakes.png").exists() and (folder / "bright.png").exists()
        assert (folder / "nearest.png").exists() == (step == 6)
        assert ("val/cas[shades-cnn]" in found[step]) == (conditional and step == 6)
    with Image.open(tmp_path / "samples" / "training.gif") as gif:
        assert gif.n_frames == 2
    if conditional:
        # All of the training part: four fifths of each class.
        np.testing.assert_array_equal(np.bincount(taught[0].labels), [32, 16, 16])
        np.testing.assert_array_equal(taught[0].pixels[:, 0, 0, 0], np.array([0, 128, 255])[taught[0].labels])
        with Image.open(folder / "fakes.png") as picture:
            rows = np.asarray(picture.convert("L"))
        # A row a class: black, the middle, white, at their right ends.
        assert [rows[height, -5] for height in np.linspace(0, len(rows), 7)[[1, 3, 5]].astype(int)] == [0, 128, 255]


@pytest.mark.parametrize("conditional", [False, True])
def test_what_reports_are_made_of(conditional, data, tmp_path, monkeypatch):
    """Panels of the same latents at each step, for each class; metrics of others, drawn by the given key."""
    made, measured, nearest = [], [], []

    def makes(generator, **options):
        def make(state, key, labels, told=True):
            made.append((options, int(jax.random.bits(key)), labels.tolist(), told))
            return np.zeros((len(labels), 8, 8, 1), np.uint8)

        return make

    monkeypatch.setattr(reports, "make_fakes", makes)
    monkeypatch.setattr(reports.metrics, "make_evaluate", lambda *given: measured.extend(given) or (lambda fakes: {}))
    monkeypatch.setattr(reports, "_draw_nearest", lambda *given: nearest.append(given))
    monkeypatch.setattr(features, "trained_on_fakes", lambda fakes, given: {})
    pixels = features.pixels(8, 1)
    report = make_report(Painter(), data, lambda: pixels, 6, conditional, {"bright.png": {"brighter": 0.2}})
    fixed = int(jax.random.bits(jax.random.key(0)))
    for step in (3, 6):
        made.clear()
        (tmp_path / f"{step:07d}").mkdir()
        report(state(), jax.random.key(step), tmp_path / f"{step:07d}")
        asked = [[label] * 12 for label in range(3)] if conditional else [[0] * 64]
        panels = [(options, fixed, one, conditional) for options in ({}, {"brighter": 0.2}) for one in asked]
        assert made[:-1] == panels
        options, key, labels, told = made[-1]
        assert (options, key, told) == ({}, int(jax.random.bits(jax.random.key(step))), conditional)
        assert len(labels) == (64 if conditional and step == 6 else 16)
    assert measured[0] is pixels and len(nearest) == 1
    np.testing.assert_array_equal(measured[1], data.pictures.pixels)
    np.testing.assert_array_equal(measured[2], data.validation.pixels)
    np.testing.assert_array_equal(nearest[0][2], data.pictures.pixels)


def test_fakes_have_all_classes_in_every_report(data, tmp_path, monkeypatch):
    """Not the first ones alone, of pictures that lie class by class."""
    seen = []
    monkeypatch.setattr(reports.metrics, "make_evaluate", lambda *_: lambda fakes: seen.append(fakes) or {})
    report = make_report(Painter(), data, lambda: features.pixels(8, 1), 9, True)
    report(state(), jax.random.key(0), tmp_path)
    levels, counts = np.unique(seen[0][:, 0, 0, 0], return_counts=True)
    assert levels.tolist() == [0, 128, 255] and counts.sum() == 16 and counts.min() >= 2


def test_too_few_pictures_are_said_before_a_run(data):
    few = jax.tree.map(lambda leaf: leaf[:11], data.validation)
    for some, message in (
        (data._replace(rows=data.rows[:11]), "11 pictures to learn from are too few .* a smaller --held-out or more"),
        (
            data._replace(validation=few),
            "11 pictures held out are too few .* a larger --held-out or --eval-pictures, or",
        ),
        (data._replace(rows=data.rows[:11], validation=few), "11 pictures .* 12 is the least; more pictures will do."),
    ):
        with pytest.raises(ConfigError, match=message):
            make_report(Painter(), some, lambda: features.pixels(8, 1), steps=1)
