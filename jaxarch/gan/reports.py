"""What runs of GANs on pictures report: panels of fakes over the same latents, and metrics of many others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt8

from jaxarch.data.images import ImageData, Pictures, unscaled
from jaxarch.gan import features, inception, metrics, panels
from jaxarch.gan.features import Extractor
from jaxarch.gan.training import GANState, latents_of, make_sampler
from jaxarch.run.protocol import ConfigError, Metrics

SHOWN, OF_EACH_CLASS = 64, 12  # fakes of a report; of a conditional generator, latents in a row
MOST_ROWS = 20  # classes that are shown
NEAREST = 5  # training pictures beside each of ten fakes
BATCH = 256  # fakes made at once
SMALL = 8  # pixels along a side of what is compared where no network gives features


def make_fakes(generator: nn.Module, **options: Any) -> Callable[..., UInt8[np.ndarray, "count height width channels"]]:
    """`(state, key, labels, conditional=True) -> pixels` on the host, as many as labels, by the averaged generator.

    conditional: the generator is told the labels.
    options: of the generator's call, as StyleGAN's `truncation`.
    """
    sample = jax.jit(partial(make_sampler(generator), **options))

    def fakes(state: GANState, key: Key[Array, ""], labels: Int[np.ndarray, " count"], conditional: bool = True) -> Any:
        made = []
        for start in range(0, len(labels), BATCH):
            some = np.resize(labels[start : start + BATCH], min(BATCH, len(labels)))  # one shape for all
            own = jax.random.fold_in(key, start)
            latents, asked = latents_of(generator, own, len(some)), jnp.asarray(some, jnp.int32)
            noise_key = jax.random.fold_in(own, 0)
            found = sample(state, latents, asked if conditional else None, noise_key)
            made.append(unscaled(np.asarray(found, np.float32)))
        return np.concatenate(made)[: len(labels)]

    return fakes


def extractor_of(
    data: ImageData, inception_weights: Path | None = None, say: Callable[[str], None] = print
) -> tuple[str, Callable[[], Extractor]]:
    """The name of what gives features, and the extractor when it is first asked for.

    Inception, where its weights are named; else a classifier of the data; of one class the pixels, at 8 x 8.
    """
    if inception_weights is not None:
        found = inception.extractor(inception_weights)
        return found.name, lambda: found
    if len(data.classes) < 2:
        plain = features.pixels(min(SMALL, *data.shape[:2]), data.shape[2])
        return plain.name, lambda: plain
    return f"{data.name}-cnn", cache(lambda: features.classifier(data, say=say))


def make_report(
    generator: nn.Module,
    data: ImageData,
    extractor: Callable[[], Extractor],
    steps: int,
    conditional: bool = False,
    variants: Mapping[str, dict[str, Any]] = {},
) -> Callable[[GANState, Key[Array, ""], Path], Metrics]:
    """Fakes over the same latents (`fakes.png`, over the steps `training.gif`), and metrics of as many others as there
    are held-out pictures.

    After the last step also fakes beside the training pictures nearest to them (`nearest.png`), and, of a conditional
    generator, what they teach a classifier (`val/cas`).
    steps: the last one's number.
    variants: more panels over the same latents, by the names of their files: options of the generator's call.
    Raises ConfigError where there are fewer pictures than metrics need.
    """
    trained, held_out = len(data.rows), len(data.validation.labels)
    for count, what, cure in (
        (trained, "to learn from", "a smaller --held-out or "),
        (held_out, "held out", "a larger --held-out or --eval-pictures, or "),
    ):
        if count < metrics.LEAST:
            cure = cure if trained + held_out >= 2 * metrics.LEAST else ""
            raise ConfigError(
                f"{count} pictures {what} are too few for metrics of fakes, {metrics.LEAST} is the least; "
                f"{cure}more pictures will do."
            )
    make = make_fakes(generator)
    panels_of = {panels.FAKES: make, **{name: make_fakes(generator, **options) for name, options in variants.items()}}
    shown = min(len(data.classes), MOST_ROWS)

    @cache
    def training() -> np.ndarray:
        return np.asarray(data.pictures.pixels)  # a copy, where its rows are scattered

    @cache
    def judge() -> Callable[[np.ndarray], dict[str, Array]]:
        return metrics.make_evaluate(extractor(), training(), np.asarray(data.validation.pixels))

    def draw(make: Callable[..., np.ndarray], state: GANState, path: Path) -> None:
        if not conditional:
            pixels = make(state, jax.random.key(0), np.zeros(SHOWN, np.int32), False)
            return panels.save(panels.grid(pixels), path)
        rows = []
        for label in range(shown):  # the same latents in all of them
            rows.append(make(state, jax.random.key(0), np.full(OF_EACH_CLASS, label, np.int32)))
        panels.save(panels.named_rows(data.classes[:shown], np.stack(rows)), path, scale=1)

    def report(state: GANState, key: Key[Array, ""], folder: Path) -> Metrics:
        for name, by in panels_of.items():
            draw(by, state, folder / name)
        panels.training_gif(folder)
        last = str(steps).zfill(7) in folder.parts
        count = len(data.rows) if conditional and last else len(data.validation.labels)
        # Classes as often as in the data, where those of a folder lie one after another.
        labels = np.resize(np.random.default_rng(0).permutation(data.everything.labels[data.rows]), count)
        fakes = make(state, key, labels, conditional)
        found = judge()(fakes)
        if last:
            _draw_nearest(extractor(), fakes[:10], training(), folder / "nearest.png")
        if last and conditional and len(data.classes) > 1:
            taught = features.trained_on_fakes(Pictures(fakes, labels, np.ones(count, np.float32)), data)
            found |= taught
        return dict(found)

    return report


def _draw_nearest(extractor: Extractor, fakes: np.ndarray, training: np.ndarray, path: Path) -> None:
    """Each fake, and after it the training pictures nearest to it."""
    places, _ = metrics.nearest_pictures(extractor, fakes, training, min(NEAREST, len(training)))
    rows = np.concatenate([fakes[:, None], training[places]], axis=1)
    names: Sequence[str] = [f"fake {number}, then the nearest" for number in range(1, len(fakes) + 1)]
    panels.save(panels.named_rows(names, rows), path, scale=1)
