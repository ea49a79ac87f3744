"""What a network sees in pictures: the features that metrics of generated pictures are computed from.

A metric is a statement about pictures and about the extractor, so the extractor's name stands in the metric's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Key, PyTree, UInt8
from safetensors.numpy import load_file, save_file

from jaxarch.data.augmentation import random_crop
from jaxarch.data.cache import cached
from jaxarch.data.image_files import recolored, resized
from jaxarch.data.images import ImageData, Pictures, scaled
from jaxarch.run.backend import cache_folder
from jaxarch.run.protocol import ConfigError

FORMAT = 1  # of the cache: raised when the same settings give another classifier

Features = Float[np.ndarray, "pictures dim"]
Probabilities = Float[np.ndarray, "pictures classes"]


class Extractor(NamedTuple):
    """What gives pictures their features.

    name: stands in the names of metrics, as in `val/fid[digits-cnn]`.
    size, channels: of the pictures that `apply` takes.
    apply: uint8 pictures `[batch, size, size, channels]` to features `[batch, dim]` and the probabilities of classes
        `[batch, classes]`; one class where the extractor knows of none.
    batch_size: what it is given at most at once.
    accuracy: on held-out pictures, of a classifier trained here.
    """

    name: str
    size: int
    channels: int
    apply: Callable[[Array], tuple[Array, Array]]
    batch_size: int = 256
    accuracy: float | None = None


def extracted(
    extractor: Extractor, pixels: UInt8[np.ndarray, "pictures height width channels"]
) -> tuple[Features, Probabilities]:
    """Features and probabilities of any number of pictures, of any size, grey, in colour or with transparency.

    They are brought to the extractor's channels and size batch by batch, so that only the features fill the memory.
    """
    if not len(pixels):
        raise ConfigError("there are no pictures to take features of; give at least one.")
    batch_size = min(extractor.batch_size, len(pixels))
    found = []
    for start in range(0, len(pixels), batch_size):
        batch = fitted(np.asarray(pixels[start : start + batch_size]), extractor.size, extractor.channels)
        # One shape for all batches, so that nothing is compiled twice.
        full = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        found.append([np.asarray(one, np.float32)[: len(batch)] for one in extractor.apply(jnp.asarray(full))])
    features, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return features, probabilities


def fitted(
    pixels: UInt8[np.ndarray, "pictures _ _ _"], size: int, channels: int
) -> UInt8[np.ndarray, "pictures size size channels"]:
    """The pictures in that size, grey (1), red, green and blue (3) or with opacity (4).

    The one way of resizing and recolouring, that of the data (`jaxarch.data.images`).
    """
    if channels not in (1, 3, 4) or pixels.shape[-1] not in (1, 3, 4):
        raise ConfigError(f"pictures of {pixels.shape[-1]} channels are not read as {channels}; 1, 3 and 4 are known.")
    pixels = recolored(resized(pixels, size), gray=channels == 1, alpha=channels == 4)
    return np.repeat(pixels, 3, axis=-1) if channels == 3 and pixels.shape[-1] == 1 else pixels


def pixels(size: int, channels: int) -> Extractor:
    """The pixels themselves in [0, 1], as features without a network: a baseline, and a search for copies."""

    def apply(batch: Array) -> tuple[Array, Array]:
        flat = batch.reshape(len(batch), -1).astype(jnp.float32) / 255
        return flat, jnp.ones((len(batch), 1))

    return Extractor("pixels", size, channels, jax.jit(apply))


# --- a classifier of the data itself ------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierConfig:
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    """of Adam, falling to 0 as a cosine"""
    width: int = 32
    """features of the first convolution; half of the others'"""
    dim: int = 64
    """features before the read-out, those that metrics are computed from"""
    shift: int = 8
    """pictures are moved by up to a part in so many of their size, along each axis"""
    smoothing: float = 0.1
    """the part of a target that all classes share: it bounds the features, whose lengths grow without it"""
    seed: int = 0


class Classifier(nn.Module):
    """A small convolutional network: halved until a side has at most 4 pixels, then a layer, then a read-out."""

    classes: int
    width: int
    dim: int

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch dim"], Float[Array, "batch classes"]]:
        x = nn.relu(nn.Conv(self.width, (3, 3))(pictures))
        while min(x.shape[1:3]) > 4:
            x = nn.relu(nn.Conv(2 * self.width, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Conv(2 * self.width, (3, 3))(x))
        # Of a ReLU's features a third to a half are 0 for every picture after training.
        features = nn.gelu(nn.Dense(self.dim)(x.reshape(len(x), -1)))
        return features, nn.Dense(self.classes)(features)


def classifier(
    data: ImageData,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
) -> Extractor:
    """The features of a classifier of these very classes, named as `digits-cnn`.

    Trained on the training part when first asked for, and kept in `cache` (default: `cache_folder()`). Its accuracy on
    the held-out part is said, and is the extractor's. The same pictures and settings give the same network on one
    machine; on another rounding differs, and with it, a little, every metric.

    Raises ConfigError where there is one class.
    """
    return _of_real(data, config, len(data.rows), cache, say)


def trained_on_fakes(
    fakes: Pictures,
    data: ImageData,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    cache: Path | None = None,
    say: Callable[[str], None] = print,
    prefix: str = "val",
) -> dict[str, Array]:
    """`val/cas[digits-cnn]`: the accuracy on held-out real pictures of a classifier that has seen only labelled fakes
    (Ravuri & Vinyals 2019, sec. 3), and `val/cas_real[digits-cnn]`: of one that has seen as many real ones.

    What `classifier` trains, trained as it is: blurred fakes, wrong labels and missing modes all lower it. As many
    fakes and real ones are drawn as there are of both.

    Raises ConfigError where there is one class, or a label that none has.
    """
    labels, classes = np.asarray(fakes.labels), len(data.classes)
    count = min(len(labels), len(data.rows))
    if not count or labels.min() < 0 or labels.max() >= classes:
        raise ConfigError(f"fakes need labels from 0 to {classes - 1} to train a classifier of {data.name}.")
    real = _of_real(data, config, count, cache, say)
    rows = np.random.default_rng(config.seed).choice(len(labels), count, replace=False)
    params = _trained(_network(data, config), real.size, data.shape[2], fakes, rows, config)
    of_fakes = _accuracy(_extractor(data, config, params), data.validation)
    found = {"cas": of_fakes, "cas_real": real.accuracy}
    return {f"{prefix}/{name}[{real.name}]": jnp.float32(value) for name, value in found.items()}


def _of_real(
    data: ImageData, config: ClassifierConfig, count: int, cache: Path | None, say: Callable[[str], None]
) -> Extractor:
    """Trained on so many pictures of the training part, or as it was kept."""
    if len(data.classes) < 2:
        raise ConfigError(
            f"{data.name} has one class, so no classifier of its pictures can be trained; give them labels by "
            "subfolders, take pixels as features, or name --inception-weights."
        )
    where, name = cache_folder() if cache is None else cache, f"{data.name}-cnn"

    def build(folder: Path) -> None:
        say(f"{name}: training a classifier on {count:,} pictures, once; it is kept in {where}")
        rows = np.random.default_rng(config.seed).choice(data.rows, count, replace=False)
        size = _extractor(data, config, {}).size
        params = _trained(_network(data, config), size, data.shape[2], data.everything, rows, config)
        accuracy = _accuracy(_extractor(data, config, params), data.validation)
        (folder / "accuracy.json").write_text(json.dumps(accuracy))
        flat = cast(dict[str, Any], traverse_util.flatten_dict(params, sep="."))
        save_file({key: np.asarray(value) for key, value in flat.items()}, folder / "params.safetensors")

    pictures = {"classes": data.classes, "shape": data.shape, "counts": data.counts, "count": count}
    settings = {"what": "classifier", "format": FORMAT, **dataclasses.asdict(config)}
    folder = cached(where, pictures | settings, build)
    params = traverse_util.unflatten_dict(load_file(folder / "params.safetensors"), sep=".")
    accuracy = json.loads((folder / "accuracy.json").read_text())
    say(f"{name}: trained on {count:,} pictures, accuracy on {len(data.validation.labels):,} held out {accuracy:.4f}")
    return _extractor(data, config, params)._replace(accuracy=accuracy)


def _network(data: ImageData, config: ClassifierConfig) -> Classifier:
    return Classifier(len(data.classes), config.width, config.dim)


def _extractor(data: ImageData, config: ClassifierConfig, params: PyTree) -> Extractor:
    network = _network(data, config)

    @jax.jit
    def apply(params: PyTree, pixels: Array) -> tuple[Array, Array]:
        features, logits = cast(tuple[Array, Array], network.apply({"params": params}, scaled(pixels)))
        return features, jax.nn.softmax(logits)

    height, width, channels = data.shape
    return Extractor(f"{data.name}-cnn", min(height, width), channels, lambda pixels: apply(params, pixels))


def _accuracy(extractor: Extractor, pictures: Pictures) -> float:
    probabilities = extracted(extractor, np.asarray(pictures.pixels))[1]
    return float(np.mean(probabilities.argmax(axis=1) == pictures.labels))


def _trained(
    network: Classifier, size: int, channels: int, pictures: Pictures, rows: np.ndarray, config: ClassifierConfig
) -> PyTree:
    """The parameters after training on these rows of the pictures, read batch by batch."""
    rng = np.random.default_rng(config.seed)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adam(schedule)

    @jax.jit
    def init(key: Array) -> tuple[PyTree, PyTree]:
        params = network.init(key, jnp.zeros((1, size, size, channels)))["params"]
        return params, optimizer.init(params)

    @jax.jit
    def step(params: PyTree, state: PyTree, key: Array, pixels: Array, labels: Array) -> tuple[PyTree, PyTree]:
        inputs = shifted(key, scaled(pixels), size // config.shift)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, network.classes), config.smoothing)

        def loss(params: PyTree) -> Array:
            logits = cast(tuple[Array, Array], network.apply({"params": params}, inputs))[1]
            return optax.softmax_cross_entropy(logits, targets).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(config.seed)
    params, state = init(key)
    order = np.zeros(0, int)
    for index in range(config.steps):
        while len(order) < config.batch_size:
            order = np.concatenate([order, rng.permutation(rows)])
        some, order = np.sort(order[: config.batch_size]), order[config.batch_size :]
        pixels = fitted(np.asarray(pictures.pixels[some]), size, channels)
        params, state = step(params, state, jax.random.fold_in(key, index), pixels, pictures.labels[some])
    return jax.block_until_ready(params)


def shifted(
    key: Key[Array, ""], pictures: Float[Array, "batch height width channels"], most: int
) -> Float[Array, "batch height width channels"]:
    """Each picture moved by up to `most` pixels along both axes; its edge is repeated where nothing is."""
    if not most:
        return pictures
    around = [(0, 0), (most, most), (most, most), (0, 0)]
    return random_crop(key, jnp.pad(pictures, around, mode="edge"), most)[:, most:-most, most:-most]
