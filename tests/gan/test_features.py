"""Extractors: their batches, the classifier of the data, and what fakes teach one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.data.images import Pictures, load_images, resized
from jaxarch.gan import features, metrics
from jaxarch.run.protocol import ConfigError

SMALL = features.ClassifierConfig(steps=40, batch_size=16, learning_rate=1e-2, width=4, dim=8)


def noise(count, size=8, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels)).astype(np.uint8)


def halves(count, seed):
    """Bright above or below: two classes that a shift leaves apart."""
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 100, (count, 8, 8, 1)), rng.integers(0, 2, count)
    for one, label in zip(pixels, labels, strict=True):
        one[4 * label : 4 * label + 4] += 150
    return Pictures(pixels.astype(np.uint8), labels.astype(np.int32), np.ones(count, np.float32))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "halves.npz"
    pictures = halves(120, 0)
    np.savez(file, images=pictures.pixels, labels=pictures.labels)
    return load_images(str(file), cache=file.parent)


# --- extraction ---------------------------------------------------------------------------------


def test_batches_are_of_one_shape_and_change_nothing():
    shapes = []

    def apply(batch):
        shapes.append(batch.shape)
        flat = batch.reshape(len(batch), -1).astype(jnp.float32)
        return flat, flat[:, :2]

    whole = noise(10)
    found, probabilities = features.extracted(features.Extractor("a", 8, 1, apply, batch_size=4), whole)
    np.testing.assert_array_equal(found, whole.reshape(10, 64))
    np.testing.assert_array_equal(probabilities, whole.reshape(10, 64)[:, :2])
    assert shapes == [(4, 8, 8, 1)] * 3
    with pytest.raises(ConfigError, match="no pictures"):
        features.extracted(features.pixels(8, 1), whole[:0])


def test_pictures_are_brought_to_the_extractor_by_the_one_way_of_resizing():
    pictures = noise(3, 12, 3)
    fitted = features.fitted(pictures, 5, 3)
    np.testing.assert_array_equal(fitted, resized(pictures, 5))
    assert np.abs(np.diff(fitted.astype(int), axis=1)).max() < 200  # a mean of what is around, not one of its pixels
    taken = features.extracted(features.pixels(5, 3), pictures)[0]
    np.testing.assert_allclose(taken, resized(pictures, 5).reshape(3, -1) / 255, rtol=1e-6)


def test_channels():
    red = np.full((1, 2, 2, 3), (200, 0, 0), np.uint8)
    half = np.concatenate([red, np.full((1, 2, 2, 1), 51, np.uint8)], axis=-1)  # a fifth of red, the rest white
    for pictures, channels, expected in (
        (red, 1, [60]),  # 0.299 * 200
        (red, 4, [200, 0, 0, 255]),
        (half, 3, [244, 204, 204]),  # 0.2 * 200 + 0.8 * 255
        (half, 1, [216]),
        (half[..., 3:], 3, [51, 51, 51]),
        (half[..., 3:], 1, [51]),
        (half, 4, [200, 0, 0, 51]),
    ):
        assert features.fitted(pictures, 2, channels)[0, 0, 0].tolist() == expected
    with pytest.raises(ConfigError, match="2 channels are not read as 3"):
        features.fitted(red[..., :2], 2, 3)


# --- the classifier -----------------------------------------------------------------------------


def test_a_classifier_is_trained_once_and_kept(data, tmp_path):
    lines = []
    one = features.classifier(data, SMALL, cache=tmp_path, say=lines.append)
    again = features.classifier(data, SMALL, cache=tmp_path, say=lines.append)
    assert (one.name, one.size, one.channels, one.accuracy) == ("halves-cnn", 8, 1, 1.0)
    assert [line.split(",")[0] for line in lines] == [
        "halves-cnn: training a classifier on 96 pictures",
        "halves-cnn: trained on 96 pictures",
        "halves-cnn: trained on 96 pictures",
    ]
    assert lines[-1] == "halves-cnn: trained on 96 pictures, accuracy on 24 held out 1.0000"
    found, probabilities = features.extracted(one, data.validation.pixels)
    assert found.shape == (24, 8) and probabilities.shape == (24, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), data.validation.labels)
    np.testing.assert_array_equal(features.extracted(again, data.validation.pixels)[0], found)


def test_the_same_pictures_and_settings_give_the_same_classifier(data, tmp_path):
    def found(place, config=SMALL):
        extractor = features.classifier(data, config, cache=tmp_path / place, say=lambda line: None)
        return features.extracted(extractor, data.validation.pixels)[0]

    np.testing.assert_array_equal(found("one"), found("two"))
    assert (found("one") != found("one", features.ClassifierConfig(**(vars(SMALL) | {"seed": 1})))).any()
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_a_larger_picture_is_halved_until_it_is_small():
    network = features.Classifier(3, 4, 8)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 30, 30, 3)))["params"]
    kernels = [shapes[f"Conv_{number}"]["kernel"].shape[2:] for number in range(5)]
    assert kernels == [(3, 4), (4, 8), (8, 8), (8, 8), (8, 8)]  # at 30, 15, 8, 4 and 4 pixels
    assert shapes["Dense_0"]["kernel"].shape == (4 * 4 * 8, 8)


def test_one_class_has_no_classifier(data, tmp_path):
    with pytest.raises(ConfigError, match="halves has one class, so no classifier"):
        features.classifier(data._replace(classes=("a",)), SMALL, cache=tmp_path)


def test_shifts_repeat_the_edge():
    picture = noise(1)[0].astype(np.float32)
    moved = features.shifted(jax.random.key(0), jnp.asarray(np.repeat(picture[None], 200, axis=0)), 2)
    around = np.pad(picture, [(2, 2), (2, 2), (0, 0)], mode="edge")
    possible = {around[i : i + 8, j : j + 8].tobytes() for i in range(5) for j in range(5)}
    assert {np.asarray(one).tobytes() for one in moved} == possible
    np.testing.assert_array_equal(features.shifted(jax.random.key(0), moved, 0), moved)


def test_fakes_teach_a_classifier(data, tmp_path):
    def cas(fakes, **options):
        found = features.trained_on_fakes(fakes, data, SMALL, cache=tmp_path, say=lambda line: None, **options)
        return {name: float(value) for name, value in found.items()}

    good, names = halves(150, 1), ("val/cas[halves-cnn]", "val/cas_real[halves-cnn]")
    assert cas(good) == dict.fromkeys(names, 1.0)
    assert cas(good._replace(labels=1 - good.labels)) == dict(zip(names, (0.0, 1.0)))
    one_class = good._replace(pixels=good.pixels[good.labels == 1], labels=good.labels[good.labels == 1])
    assert cas(one_class)[names[0]] == pytest.approx(np.mean(data.validation.labels == 1))
    with pytest.raises(ConfigError, match="fakes need labels from 0 to 1 to train a classifier of halves"):
        cas(good._replace(labels=good.labels + 1))


def test_the_reference_has_seen_as_many_real_pictures(data, tmp_path):
    lines, few = [], jax.tree.map(lambda leaf: leaf[:30], halves(60, 1))
    features.trained_on_fakes(few, data, SMALL, cache=tmp_path, say=lines.append)
    assert lines[0].startswith("halves-cnn: training a classifier on 30 pictures")
    lines.clear()
    features.classifier(data, SMALL, cache=tmp_path, say=lines.append)
    assert lines[0].startswith("halves-cnn: training a classifier on 96 pictures")


@pytest.mark.slow
def test_the_digits_are_told_apart_and_seen_by_the_metrics(tmp_path):
    """Held-out accuracy of 0.97 and above; missing classes and noise are seen beside the floor."""
    data = load_images("digits", cache=tmp_path)
    extractor = features.classifier(data, cache=tmp_path)
    assert extractor.name == "digits-cnn" and extractor.accuracy is not None and extractor.accuracy >= 0.97
    training, rng = data.pictures, np.random.default_rng(0)
    evaluate = metrics.make_evaluate(extractor, training.pixels, data.validation.pixels)

    def fid(pictures):
        found = evaluate(pictures)
        return float(found["val/fid[digits-cnn]"] / found["val/fid_floor[digits-cnn]"])

    nine = training.pixels[rng.permutation(np.flatnonzero(training.labels < 9))]
    noisy = np.clip(training.pixels + rng.normal(0, 60, training.pixels.shape), 0, 255).astype(np.uint8)
    assert fid(training.pixels[rng.permutation(len(training.pixels))]) < 1.5
    assert fid(nine) > 2 and fid(noisy) > 4
