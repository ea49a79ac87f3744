"""Pictures and films of what a finished run's generator knows, by its average; its data is not needed.

python -m jaxarch.gan.edit runs/stylegan/demo mixing --layers 2 3
python -m jaxarch.gan.edit runs/stylegan/demo interpolate --count 4 --frames 20
python -m jaxarch.gan.edit runs/stylegan/demo truncation
python -m jaxarch.gan.edit runs/stylegan/demo directions --count 5 --layers 0 1
python -m jaxarch.gan.edit runs/stylegan/demo project face.png other.png --free

mixing: each row's styles with each column's. interpolate: a film from pictures to pictures. truncation: pictures with
styles more and more like the mean one. directions: pictures moved along those directions that change most (SeFa).
project: the styles of given pictures, with which the generator makes what is most like them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, PyTree, UInt8

from jaxarch.data.images import read_picture, scaled, unscaled
from jaxarch.gan import panels
from jaxarch.gan.editing import (
    ProjectionConfig,
    directions,
    has_styles,
    linear,
    mixing_grid,
    moved,
    projected,
    spherical,
    style_statistics,
    styles_of,
    synthesized,
    through,
)
from jaxarch.gan.finished import Finished, labels_of, restored
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.protocol import ConfigError, check_least

Action = Literal["mixing", "interpolate", "truncation", "directions", "project"]
Pixels = UInt8[np.ndarray, "count height width channels"]
BATCH = 64  # pictures made at once
TRUNCATIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
AMOUNTS = np.linspace(-1, 1, 7)  # columns of a table of directions
SEARCHED = 60  # pictures in a film of a search


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/stylegan/demo"""
    action: Annotated[Action, tyro.conf.Positional]
    """what to make"""
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """files of pictures, for project"""
    output: Path | None = None
    """what is written, without its ending (default: the action's name, in the run)"""
    count: int = 6
    """pictures in a row and a column of mixing, beside each other elsewhere; and directions"""
    frames: int = 24
    """of a film, from one picture to the next, or there and back"""
    layers: tuple[int, ...] = ()
    """from 0 on: those that mixing takes of the columns (default: the later half), that directions are of (all)"""
    truncation: float = 1.0
    """draws styles towards their mean: 1 not at all, 0 all the way"""
    amount: float = 1.0
    """how far directions go, where styles lie 1 from their mean on the average"""
    space: Literal["styles", "latents"] = "styles"
    """in which interpolate goes from picture to picture: straight in styles, on a sphere in latents"""
    free: bool = False
    """project finds a style for each layer (W+) instead of one for all (W)"""
    steps: int = 1000
    """of project's search"""
    label: tuple[str, ...] = ()
    """classes by name or number, in turn (default: all)"""
    seed: int = 0
    step: str = "newest"
    """checkpoint: newest, best or a number"""
    overwrite: bool = False
    """replace what is there"""


class Editor:
    """The finished generator, with what it is asked for: all functions compiled once, parameters as arguments."""

    def __init__(self, finished: Finished, arguments: Arguments):
        self.generator, self.variables, self.classes = finished
        self.key = jax.random.key(arguments.seed)
        self.truncation = arguments.truncation
        if arguments.label and not self.classes:
            raise ConfigError(f"{arguments.run} has no classes; leave out --label.")
        self.chosen = labels_of(arguments.label, self.classes) or list(range(len(self.classes)))
        self._made = jax.jit(lambda v, styles: synthesized(self.generator, v, styles))
        self._plain = jax.jit(lambda v, z, labels: cast(Array, self.generator.apply(v, z, labels, train=False)))
        self._styles = jax.jit(lambda v, z, labels, share: styles_of(self.generator, v, z, labels, share))

    def labels(self, count: int) -> Array | None:
        return jnp.asarray(np.resize(self.chosen, count), jnp.int32) if self.classes else None

    def latents(self, count: int, place: int = 0) -> Array:
        """Others for each place."""
        key = jax.random.fold_in(self.key, place)
        return jax.random.normal(key, (count, cast(Any, self.generator).latent_dim))

    def styles(self, count: int, place: int = 0, truncation: float | None = None) -> Array:
        share = jnp.float32(self.truncation if truncation is None else truncation)
        return self._styles(self.variables, self.latents(count, place), self.labels(count), share)

    def pictures(self, styles: Array) -> Pixels:
        """Of any number of styles."""
        return self._in_batches(lambda some: self._made(self.variables, some), styles)

    def plain(self, latents: Array, labels: Array | None) -> Pixels:
        """Of latents, by a generator of any kind."""
        given = latents if labels is None else (latents, labels)
        return self._in_batches(
            lambda some: self._plain(self.variables, *(some if isinstance(some, tuple) else (some, None))), given
        )

    def _in_batches(self, make: Any, given: PyTree) -> Pixels:
        count = len(jax.tree.leaves(given)[0])
        size = min(BATCH, count)
        made = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)  # one shape for all
            made.append(unscaled(np.asarray(make(jax.tree.map(lambda leaf, rows=rows: leaf[rows], given)))))
        return np.concatenate(made)[:count]


def checked(arguments: Arguments) -> Path:
    """Where to write, without an ending. Raises ConfigError for options that cannot be."""
    check_least(arguments, ("count", "frames", "steps"), 1)
    for name in ("truncation", "amount"):
        if not math.isfinite(getattr(arguments, name)):
            raise ConfigError(f"--{name} {getattr(arguments, name):g} is no number; 1 is the default.")
    if (arguments.action == "project") != bool(arguments.pictures):
        raise ConfigError("project, and nothing else, takes files of pictures: edit RUN project FILE ...")
    output = arguments.output or arguments.run / arguments.action
    for path in outputs(arguments.action, output) if arguments.output and not arguments.overwrite else []:
        if path.exists():
            raise ConfigError(f"{path} is there already; --overwrite replaces it.")
    return output


def outputs(action: Action, output: Path) -> list[Path]:
    endings = {"interpolate": (".gif",), "directions": (".png", ".gif"), "project": (".png", ".gif", ".npz")}
    return [output.with_name(output.name + ending) for ending in endings.get(action, (".png",))]


def mixing(editor: Editor, arguments: Arguments, output: Path) -> None:
    """The rows' pictures to the left, the columns' above."""
    layers = arguments.layers or range(cast(Any, editor.generator).layers // 2, cast(Any, editor.generator).layers)
    _check_layers(layers, cast(Any, editor.generator).layers)
    rows, columns = editor.styles(arguments.count, 0), editor.styles(arguments.count, 1)
    cells = jax.jit(mixing_grid, static_argnums=2)(rows, columns, tuple(layers))
    left, above = editor.pictures(rows), editor.pictures(columns)
    inner = editor.pictures(cells.reshape(-1, *cells.shape[2:])).reshape(*cells.shape[:2], *left.shape[1:])
    whole = np.full((len(rows) + 1, len(columns) + 1, *left.shape[1:]), 255, np.uint8)
    whole[1:, 0], whole[0, 1:], whole[1:, 1:] = left, above, inner
    panels.save(panels.grid(whole.reshape(-1, *left.shape[1:]), len(columns) + 1), outputs("mixing", output)[0])


def interpolate(editor: Editor, arguments: Arguments, output: Path) -> None:
    """As many pictures as asked for, each on a way of its own through as many points."""
    count, frames = arguments.count, arguments.frames
    if arguments.space == "styles":
        _check_styles(editor, "--space styles")
        points = jnp.stack([editor.styles(count, place) for place in range(4)])
        film = jax.jit(through, static_argnums=(1, 2))(points, linear, frames)
        pixels = editor.pictures(film.reshape(-1, *film.shape[2:]))
    else:
        points = jnp.stack([editor.latents(count, place) for place in range(4)])
        film = jax.jit(through, static_argnums=(1, 2))(points, spherical, frames)
        labels = editor.labels(count)
        tiled = None if labels is None else jnp.tile(labels, len(film))
        pixels = editor.plain(film.reshape(-1, film.shape[-1]), tiled)
    _film(pixels.reshape(len(film), count, *pixels.shape[1:]), outputs("interpolate", output)[0])


def truncation(editor: Editor, arguments: Arguments, output: Path) -> None:
    """A row for each truncation."""
    rows = [editor.pictures(editor.styles(arguments.count, truncation=share)) for share in TRUNCATIONS]
    table = panels.named_rows([f"{share:g}" for share in TRUNCATIONS], np.stack(rows))
    panels.save(table, outputs("truncation", output)[0], scale=1)


def along(editor: Editor, arguments: Arguments, output: Path) -> None:
    """A row for each direction, one picture moved along it; as a film, there and back, several pictures."""
    count, layers = arguments.count, list(arguments.layers) or None
    found = jax.jit(lambda params: directions(params, count, layers)[0])(editor.variables["params"])
    own = editor.labels(1)
    deviation = jax.jit(lambda v: style_statistics(editor.generator, v, editor.key, 1000, 1, own)[1])(editor.variables)
    reach = arguments.amount * deviation[0]
    # ToRGB, the last of the styles, goes along where all layers do.
    styles = editor.styles(1)

    @jax.jit
    def at(shares: Array) -> Array:
        """The picture's styles moved by each share along each direction."""
        every = jax.vmap(lambda share: jax.vmap(lambda one: moved(styles, one, reach * share, layers)[0])(found))
        return every(shares).reshape(-1, *styles.shape[1:])

    columns = editor.pictures(at(jnp.asarray(AMOUNTS, jnp.float32)))
    table = columns.reshape(len(AMOUNTS), len(found), *columns.shape[1:]).swapaxes(0, 1)
    picture, film = outputs("directions", output)
    panels.save(panels.named_rows([f"direction {n + 1}" for n in range(len(found))], table), picture, scale=1)
    shares = np.sin(2 * np.pi * np.arange(arguments.frames) / arguments.frames)
    frames = editor.pictures(at(jnp.asarray(shares, jnp.float32)))
    _film(frames.reshape(len(shares), len(found), *frames.shape[1:]), film)


def project(editor: Editor, arguments: Arguments, output: Path) -> None:
    """What was given above what was found; the search as a film; styles and noise as arrays."""
    height, _, channels = cast(Any, editor.generator).image
    if channels not in (1, 3):
        raise ConfigError("the generator's pictures have opacity; project searches for pictures without.")
    given = np.stack([read_picture(path, height, gray=channels == 1) for path in arguments.pictures])
    config = ProjectionConfig(steps=arguments.steps, free=arguments.free)
    labels = editor.labels(len(given))
    search = jax.jit(lambda v, x: projected(editor.generator, v, x, editor.key, config, labels))
    found = search(editor.variables, scaled(given))
    picture, film, arrays = outputs("project", output)
    made = jax.jit(lambda v, styles, noise: synthesized(editor.generator, v, styles, noise))
    pixels = unscaled(np.asarray(made(editor.variables, found.found, found.noise)))
    panels.save(panels.named_rows(["given", "found"], np.stack([given, pixels])), picture, scale=1)
    places = np.unique(np.linspace(0, arguments.steps - 1, SEARCHED).round().astype(int))
    frames = [unscaled(np.asarray(made(editor.variables, found.styles[place], found.noise))) for place in places]
    _film(np.stack([np.concatenate([given, frame]) for frame in frames]), film, columns=len(given))
    np.savez(arrays, styles=found.found, **{f"noise_{name}": one for name, one in found.noise.items()})
    print("mean squared errors: " + " ".join(f"{value:.5f}" for value in np.asarray(found.distances[-1])))


def _film(frames: UInt8[np.ndarray, "frames count height width channels"], path: Path, columns: int = 0) -> None:
    panels.gif([panels.grid(frame, columns) for frame in frames], path, seconds=0.08, hold=0.08)


def _check_styles(editor: Editor, what: str) -> None:
    if not has_styles(editor.generator):
        raise ConfigError(
            f"{what} is of generators with styles, as StyleGAN's; this one is a {type(editor.generator).__name__}. "
            "interpolate --space latents takes any."
        )


def _check_layers(layers: Sequence[int], count: int) -> None:
    if min(layers) < 0 or max(layers) >= count:
        raise ConfigError(f"--layers must be of 0 to {count - 1}.")


ACTIONS = {
    "mixing": mixing,
    "interpolate": interpolate,
    "truncation": truncation,
    "directions": along,
    "project": project,
}


def main() -> None:
    with exits("edit"):
        arguments = parsed_or_usage(Arguments, "python -m jaxarch.gan.edit", __doc__ or "", sys.argv[1:])
        output = checked(arguments)
        backend.prepare()
        editor = Editor(restored(arguments.run, arguments.step), arguments)
        if arguments.action != "interpolate":
            _check_styles(editor, arguments.action)
        output.parent.mkdir(parents=True, exist_ok=True)
        ACTIONS[arguments.action](editor, arguments, output)
        print("written to " + " and ".join(map(str, outputs(arguments.action, output))))


if __name__ == "__main__":
    main()
