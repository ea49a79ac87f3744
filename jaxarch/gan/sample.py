"""Pictures from a finished run of a GAN, by the average of its generator; its data is not needed.

python -m jaxarch.gan.sample runs/dcgan/demo --count 64
python -m jaxarch.gan.sample runs/conditional_gan/demo --label 3 7 --count 40 --files threes-and-sevens
python -m jaxarch.gan.sample runs/stylegan/demo --truncation 0.7 --seed 1 --output faces.png
python -m jaxarch.gan.sample runs/dcgan/demo --count 10000 --output fakes.npz
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxarch.data.images import unscaled
from jaxarch.gan import panels
from jaxarch.gan.finished import labels_of, pictures, restored, takes
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError

MOST_COLUMNS = 20  # of a grid with a column for each class


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/dcgan/demo"""
    count: int = 64
    """how many pictures"""
    output: Path | None = None
    """a .png of them all, or an .npz of pixels and labels, which --data of experiments reads (default: pictures.png in
    the run)"""
    files: Path | None = None
    """folder that gets each picture as a file of its own size as well"""
    label: tuple[str, ...] = ()
    """classes by name or number, in turn (default: all)"""
    truncation: float | None = None
    """draws styles towards their mean: 1 not at all, 0 all the way; more alike, with fewer faults (StyleGAN)"""
    columns: int = 0
    """pictures in a row (default: as many as rows, or the classes)"""
    seed: int = 0
    step: str = "newest"
    """checkpoint: newest, best or a number"""
    overwrite: bool = False
    """replace what is there"""


def checked(arguments: Arguments) -> tuple[Path, ...]:
    """Where to write. Raises ConfigError for options that cannot be."""
    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count} is below 1.")
    if arguments.columns < 0:
        raise ConfigError(f"--columns {arguments.columns} is below 0; 0 is the default.")
    if arguments.truncation is not None and not math.isfinite(arguments.truncation):
        raise ConfigError(f"--truncation {arguments.truncation:g} is no number; 0.7 is usual.")
    output = arguments.output or arguments.run / "pictures.png"
    if output.suffix not in (".png", ".npz"):
        raise ConfigError(f"--output {output} is neither a .png nor an .npz.")
    for option, path in (("output", arguments.output), ("files", arguments.files)):
        if path and path.exists() and not arguments.overwrite:
            raise ConfigError(f"--{option} {path} is there already; --overwrite replaces it.")
    return output, *([arguments.files] if arguments.files else [])


def main() -> None:
    with exits("sample"):
        arguments = parsed_or_usage(Arguments, "python -m jaxarch.gan.sample", __doc__ or "", sys.argv[1:])
        written = checked(arguments)
        backend.prepare()
        finished = restored(arguments.run, arguments.step)
        if arguments.label and not finished.classes:
            raise ConfigError(f"{arguments.run} has no classes; leave out --label.")
        if arguments.truncation is not None and not takes(finished.generator, "truncation"):
            raise ConfigError(
                f"--truncation is of generators with a mean style, as StyleGAN's; {arguments.run} is of a "
                f"{type(finished.generator).__name__}."
            )
        chosen = labels_of(arguments.label, finished.classes) or list(range(len(finished.classes))) or [0]
        labels = np.resize(chosen, arguments.count)
        options = {} if arguments.truncation is None else {"truncation": arguments.truncation}
        pixels = unscaled(pictures(finished, jax.random.key(arguments.seed), labels, **options))
        columns = arguments.columns or (len(chosen) if 1 < len(chosen) <= MOST_COLUMNS else 0)
        write(pixels, labels, finished.classes, written[0], columns)
        if arguments.files:
            write_files(pixels, labels, finished.classes, arguments.files)
        print("written to " + " and ".join(map(str, written)))


def write(pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], output: Path, columns: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".npz":
        if classes:
            np.savez(output, pixels=pixels, labels=np.array(classes)[labels])
        else:
            np.savez(output, pixels=pixels)
    else:
        panels.save(panels.grid(pixels, columns), output)


def write_files(pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], folder: Path) -> None:
    """One file a picture, in a subfolder for each class where there are classes."""
    for number, (one, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / (classes[label].replace("/", "-") if classes else ".")
        place.mkdir(parents=True, exist_ok=True)
        panels.save(one, place / f"{number:05d}.png", scale=1)


if __name__ == "__main__":
    main()
