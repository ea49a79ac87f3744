"""What a network sees in pictures: the features that metrics of generated pictures are computed from.

A metric is a statement about pictures and about the extractor, so the extractor's name stands in the metric's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxarch.run.protocol import ConfigError

Features = Float[np.ndarray, "pictures dim"]
Probabilities = Float[np.ndarray, "pictures classes"]


class Extractor(NamedTuple):
    """What gives pictures their features.

    name: stands in the names of metrics, as in `val/fid[digits-cnn]`.
    size, channels: of the pictures that `apply` takes.
    apply: uint8 pictures `[batch, size, size, channels]` to features `[batch, dim]` and the probabilities of classes
        `[batch, classes]`; one class where the extractor knows of none.
    """

    name: str
    size: int
    channels: int
    apply: Callable[[Array], tuple[Array, Array]]


def extracted(
    extractor: Extractor, pixels: UInt8[np.ndarray, "pictures height width channels"], batch_size: int = 256
) -> tuple[Features, Probabilities]:
    """Features and probabilities of any number of pictures, of any size, grey, in colour or with transparency.

    They are brought to the extractor's channels and size batch by batch, so that only the features fill the memory.
    """
    if not len(pixels):
        raise ConfigError("there are no pictures to take features of; give at least one.")
    batch_size = min(batch_size, len(pixels))
    found = []
    for start in range(0, len(pixels), batch_size):
        batch = fitted(np.asarray(pixels[start : start + batch_size]), extractor.size, extractor.channels)
        # One shape for all batches, so that nothing is compiled twice.
        full = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        found.append([np.asarray(one, np.float32)[: len(batch)] for one in extractor.apply(jnp.asarray(full))])
    features, probabilities = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return features, probabilities


def fitted(
    pixels: UInt8[np.ndarray, "pictures _height _width _channels"], size: int, channels: int
) -> UInt8[np.ndarray, "pictures size size channels"]:
    """The pictures in that size, grey (1), red, green and blue (3) or with opacity (4).

    What is transparent becomes white, colour becomes grey as 0.299 R + 0.587 G + 0.114 B.
    """
    given = pixels.shape[-1]
    if given not in (1, 3, 4) or channels not in (1, 3, 4):
        raise ConfigError(f"pictures of {given} channels are not read as {channels}; 1, 3 and 4 are known.")
    values = pixels
    if given == 4 and channels != 4:
        opacity = values[..., 3:] / np.float32(255)
        values = values[..., :3] * opacity + 255 * (1 - opacity)
    if values.shape[-1] == 1 and channels != 1:
        values = np.repeat(values, 3, axis=-1)
    if values.shape[-1] == 3 and channels == 1:
        values = values @ np.array([[0.299], [0.587], [0.114]], np.float32)
    if values.shape[-1] == 3 and channels == 4:
        values = np.concatenate([values, np.full_like(values[..., :1], 255)], axis=-1)
    pixels = values if values.dtype == np.uint8 else np.round(values).astype(np.uint8)
    if pixels.shape[1:3] == (size, size):
        return pixels
    from jaxarch.data.images import resized

    return resized(pixels, size)


def pixels(size: int, channels: int) -> Extractor:
    """The pixels themselves in [0, 1], as features without a network: a baseline, and a search for copies."""

    def apply(batch: Array) -> tuple[Array, Array]:
        flat = batch.reshape(len(batch), -1).astype(jnp.float32) / 255
        return flat, jnp.ones((len(batch), 1))

    return Extractor("pixels", size, channels, jax.jit(apply))
