"""The command that edits with a finished run: what it draws is what was asked for; what cannot be is one clear line."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxarch.data.images import unscaled
from jaxarch.gan import edit, panels
from jaxarch.gan.editing import styles_of, synthesized
from jaxarch.gan.finished import restored, save_description
from jaxarch.gan.r3gan import R3GANConfig, r3gan
from jaxarch.gan.stylegan2 import StyleGAN2Config, stylegan2
from jaxarch.gan.training import GANState, streams
from jaxarch.run.checkpoint import Checkpoints
from jaxarch.run.command import write_json
from jaxarch.run.program import Carry

SMALL = StyleGAN2Config(latent_dim=4, style_dim=4, mapping_layers=1, channel_base=32, channel_max=8)
MEAN = jnp.array([0.5, -0.5, 1.0, 0.0])


def finished_run(folder: Path, generator: Any, classes: tuple[str, ...] = ()) -> Path:
    """As a run leaves it, after no training."""
    (folder / "assets").mkdir(parents=True)
    write_json(folder / "config.json", {"config": {}})
    write_json(folder / "assets" / "classes.json", classes)
    save_description(folder / "assets", generator, "labels" if classes else "none")
    key, labels = jax.random.key(0), jnp.zeros(1, jnp.int32) if classes else None
    latents = jnp.zeros((1, generator.latent_dim))
    variables = dict(jax.jit(generator.init)({"params": key, **streams(key)}, latents, labels))
    params = variables.pop("params")
    if "averages" in variables:
        variables = {"averages": {"style": MEAN}}
    state = GANState(params, {}, None, variables, {}, {}, {}, jnp.zeros(()), None, jax.random.key(0), ())
    Checkpoints(folder / "checkpoints").save(1, Carry(state, {}), {}, None)
    return folder


@pytest.fixture(scope="module")
def styled(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "a", stylegan2(SMALL, (4, 4, 1), 2)[0], ("one", "two"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    config = R3GANConfig(latent_dim=4, channel_base=32, channel_max=8, group_width=4)
    return finished_run(tmp_path_factory.mktemp("runs") / "b", r3gan(config, (4, 4, 3))[0])


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command line: its exit code, what it said, and the pictures that it put into panels."""

    def call(*arguments, output="out"):
        capsys.readouterr()
        drawn: list[np.ndarray] = []
        with monkeypatch.context() as patch:
            for name, place in (("grid", 0), ("named_rows", 1)):
                own = getattr(panels, name)

                def kept(*given, own=own, place=place, **options):
                    drawn.append(np.asarray(given[place]))
                    return own(*given, **options)

                patch.setattr(edit.panels, name, kept)
            patch.setattr("sys.argv", ["edit", *map(str, arguments), "--output", str(tmp_path / output)])
            code = 0
            try:
                edit.main()
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        said = capsys.readouterr()
        return code, (said.out if code == 0 else said.err).strip().splitlines()[-1], drawn

    return call


@cache
def maker(run: Path) -> Any:
    generator, variables, _ = restored(run)
    styles = partial(styles_of, generator, variables)
    return jax.jit(lambda z, labels, share: synthesized(generator, variables, styles(z, labels, share)))


def made(run: Path, latents: np.ndarray, labels: list[int], truncation: float = 1.0) -> np.ndarray:
    """Three at a time, so that one program does for all."""
    some = jnp.asarray(np.resize(latents, (3, 4))), jnp.asarray(np.resize(labels, 3))
    return unscaled(np.asarray(maker(run)(*some, jnp.float32(truncation))))[: len(labels)]


def latents(place: int, count: int, seed: int = 0) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(seed), place), (count, 4)))


def assert_close(one: np.ndarray, other: np.ndarray) -> None:
    """But for the rounding of a level."""
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_mixing(styled, command, tmp_path):
    """Rows to the left, columns above; all layers of the columns make the columns, some neither."""
    code, said, drawn = command(styled, "mixing", "--count", 3, "--layers", 0, 1)
    assert code == 0 and said == f"written to {tmp_path / 'out.png'}"
    cells = drawn[0].reshape(4, 4, 4, 4, 1)
    assert (cells[0, 0] == 255).all()
    assert_close(cells[1:, 0], made(styled, latents(0, 3), [0, 1, 0]))
    assert_close(cells[0, 1:], made(styled, latents(1, 3), [0, 1, 0]))
    for row in cells[1:, 1:]:
        assert_close(row, cells[0, 1:])
    _, _, drawn = command(styled, "mixing", "--count", 2, output="other")
    cells = drawn[0].reshape(3, 3, 4, 4, 1).astype(int)
    assert np.abs(cells[1:, 1:] - cells[1:, :1]).max() > 1 and np.abs(cells[1:, 1:] - cells[:1, 1:]).max() > 1


@pytest.mark.parametrize("space", ["styles", "latents"])
def test_a_film_of_interpolation(space, styled, command, tmp_path):
    code, said, drawn = command(styled, "interpolate", "--count", 2, "--frames", 3, "--space", space, "--seed", 4)
    assert code == 0 and said == f"written to {tmp_path / 'out.gif'}"
    assert len(drawn) == 12
    for place in range(4):
        assert_close(drawn[3 * place], made(styled, latents(place, 2, seed=4), [0, 1]))
    with Image.open(tmp_path / "out.gif") as film:
        assert film.n_frames > 6


def test_latents_of_any_generator_can_be_filmed(plain, command):
    code, _, drawn = command(plain, "interpolate", "--space", "latents", "--count", 1, "--frames", 2)
    assert code == 0 and len(drawn) == 8 and drawn[0].shape == (1, 4, 4, 3)
    code, said, _ = command(plain, "interpolate", output="other")
    assert code == 2 and "--space styles is of generators with styles, as StyleGAN's; this one is a R3GAN" in said
    code, said, _ = command(plain, "mixing")
    assert code == 2 and "mixing is of generators with styles" in said


def test_truncation_ends_at_the_mean_style(styled, command):
    code, _, drawn = command(styled, "truncation", "--count", 3, "--label", "two")
    (rows,) = drawn[:1]
    assert code == 0 and rows.shape == (5, 3, 4, 4, 1)
    assert_close(rows[0], made(styled, latents(0, 3), [1, 1, 1]))
    assert_close(rows[2], made(styled, latents(0, 3), [1, 1, 1], 0.5))
    assert_close(rows[4], np.broadcast_to(rows[4][:1], rows[4].shape))


def test_directions_pass_through_the_picture(styled, command, tmp_path):
    code, said, drawn = command(styled, "directions", "--count", 2, "--frames", 4)
    assert code == 0 and said == f"written to {tmp_path / 'out.png'} and {tmp_path / 'out.gif'}"
    table = drawn[0]
    assert table.shape == (2, 7, 4, 4, 1)
    own = made(styled, latents(0, 1), [0])
    for row in table:
        assert_close(row[3], own[0])
        assert np.abs(row[0].astype(int) - row[6]).max() > 1
    film = drawn[-4:]
    assert_close(film[0], np.concatenate([own, own]))
    assert_close(film[1], table[:, 6])


def test_project_finds_a_picture_of_the_generators_own(styled, command, tmp_path):
    picture = made(styled, latents(9, 1), [1], 0.7)[0, :, :, 0]
    Image.fromarray(picture).save(tmp_path / "given.png")
    options = ["--steps", 150, "--label", "two", "--free"]
    code, said, drawn = command(styled, "project", tmp_path / "given.png", *options)
    endings = " and ".join(str(tmp_path / f"out.{ending}") for ending in ("png", "gif", "npz"))
    assert code == 0 and said == f"written to {endings}"
    given, found = drawn[0].astype(float)
    np.testing.assert_array_equal(given[0, :, :, 0], picture)
    mean = made(styled, latents(9, 1), [1], 0.0)[0].astype(float)
    assert np.mean((found - given) ** 2) < 0.02 * np.mean((mean - given) ** 2)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["styles"].shape == (1, 2, 4) and arrays["noise_4_1"].shape == (1, 4, 4, 1)
    with Image.open(tmp_path / "out.gif") as film:
        assert film.n_frames > 10


@pytest.mark.parametrize(
    "options, message",
    [
        (["mixing", "--layers", 2], "edit: --layers must be of 0 to 1."),
        (["directions", "--layers", 1], "edit: --layers must be of the convolutions 0 to 0."),
        (["mixing", "a.png"], "edit: project, and nothing else, takes files of pictures"),
        (["project"], "edit: project, and nothing else, takes files of pictures"),
        (
            ["project", "missing.png"],
            "edit: the picture missing.png cannot be read (No such file or directory); mend or remove it.",
        ),
        (["directions", "--amount", "nan"], "edit: --amount nan is no number; 1 is the default."),
        (["mixing", "--count", 0], "edit: --count 0 is below 1."),
        (["mixing", "--label", "three"], "edit: --label three is none of this run's classes: one, two."),
        (["paint"], "edit: "),
    ],
)
def test_bad_options_are_one_clear_line(options, message, styled, command):
    code, said, _ = command(styled, *options)
    assert code == 2 and said.startswith(message)


def test_nothing_is_overwritten_without_being_asked(styled, command, tmp_path):
    (tmp_path / "out.gif").write_text("mine")
    code, said, _ = command(styled, "directions")
    assert code == 2 and said == f"edit: {tmp_path / 'out.gif'} is there already; --overwrite replaces it."
    assert command(styled, "directions", "--count", 1, "--frames", 1, "--overwrite")[0] == 0
