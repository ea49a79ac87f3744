"""Pictures from finished runs: that they are the averaged generator's, of the asked classes; and what cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxarch.data.images import load_images, scaled, unscaled
from jaxarch.gan import sample as command_line
from jaxarch.gan.dcgan import DCGANConfig, dcgan
from jaxarch.gan.finished import _composed, _described, pictures, restored, takes
from jaxarch.gan.stylegan2 import StyleGAN2Config, stylegan2
from jaxarch.run import load
from jaxarch.run.checkpoint import Checkpoints
from jaxarch.run.program import Carry
from tests.gan.sketches import dots
from tests.run.running import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    pytest.importorskip("sklearn")
    made = {"labels": ["--labels", True], "plain": ["--plain", True, "--average", 0]}
    return {name: run(dots, place, *options, name=name) for name, options in made.items()}


def of_two(tmp_path: Path, runs) -> Path:
    """A run as of two replicas: twice the same state."""
    shutil.copytree(runs["plain"], tmp_path / "two")
    state = load(runs["plain"]).state
    carry = Carry(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state), {})
    Checkpoints(tmp_path / "two" / "checkpoints").save(9, carry, {}, None)
    return tmp_path / "two"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line: its exit code, and what it wrote, or its error."""

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["sample", *map(str, arguments)])
        code = 0
        try:
            command_line.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = capsys.readouterr()
        return (code, said.out.strip()) if code == 0 else (code, said.err.strip().splitlines()[-1])

    return call


def latents(seed: int, count: int) -> np.ndarray:
    key = jax.random.key(seed)
    return np.stack([jax.random.normal(jax.random.fold_in(key, number), (3,)) for number in range(count)])


def test_pictures_are_those_of_the_averaged_generator(runs):
    """Of the asked labels and with the kept collections, as `Dots` says, in numpy."""
    state = jax.tree.map(np.asarray, load(runs["labels"]).state.replace(key=0))
    finished, labels = restored(runs["labels"]), np.array([3, 3, 7, 0, 1])
    assert finished.classes == tuple("0123456789")
    seen = state.g_stats["averages"]["seen"]
    assert seen > 1

    def expected(params):
        x = latents(5, 5) + params["embed"]["embedding"][labels]
        x = x @ params["out"]["kernel"] + params["out"]["bias"] + 1e-3 * seen
        return 0.5 * np.tanh(x).reshape(-1, 4, 4, 1)

    for batch_size in (2, 64):
        found = pictures(finished, jax.random.key(5), labels, batch_size, truncation=0.5)
        np.testing.assert_allclose(found, expected(state.average), atol=1e-6)
    assert np.abs(found - expected(state.generator)).max() > 1e-4


def test_pictures_of_a_run_without_an_average_and_without_classes(runs):
    state = load(runs["plain"]).state
    dense = jax.tree.map(np.asarray, state.generator["out"])
    expected = np.tanh(latents(0, 3) @ dense["kernel"] + dense["bias"]).reshape(-1, 4, 4, 1)
    finished = restored(runs["plain"])
    assert state.average is None and finished.classes == ()
    np.testing.assert_allclose(pictures(finished, jax.random.key(0), np.zeros(3, int)), expected, atol=1e-6)


def test_a_grid_and_single_files(runs, command, tmp_path):
    out, files = tmp_path / "deep" / "a.png", tmp_path / "files"
    options = ["--count", 5, "--label", "7", 2, "--seed", 1, "--files", files, "--output", out]
    assert command(runs["labels"], *options) == (0, f"written to {out} and {files}")
    assert sorted(path.relative_to(files).as_posix() for path in files.rglob("*.png")) == [
        "2/00001.png", "2/00003.png", "7/00000.png", "7/00002.png", "7/00004.png",
    ]  # fmt: skip
    finished = restored(runs["labels"])
    pixels = unscaled(pictures(finished, jax.random.key(1), np.array([7, 2, 7, 2, 7])))
    with Image.open(files / "2" / "00003.png") as found:
        np.testing.assert_array_equal(np.asarray(found), pixels[3, :, :, 0])
    with Image.open(out) as found:  # two columns, three rows: 14 x 9 pixels, 37 times
        assert found.size == (9 * 37, 14 * 37)
        np.testing.assert_array_equal(np.asarray(found)[: 4 * 37 : 37, 5 * 37 :: 37], pixels[1, :, :, 0])
    assert command(runs["labels"], *options) == (
        2,
        f"sample: --output {out} is there already; --overwrite replaces it.",
    )
    assert command(runs["labels"], *options, "--overwrite")[0] == 0


def test_the_default_is_a_grid_in_the_run(runs, command):
    for _ in range(2):
        assert command(runs["plain"], "--count", 9) == (0, f"written to {runs['plain'] / 'pictures.png'}")
    with Image.open(runs["plain"] / "pictures.png") as found:
        assert found.size[0] == found.size[1] >= 512


def test_arrays_are_read_as_data(runs, command, tmp_path):
    assert command(runs["labels"], "--count", 20, "--output", tmp_path / "fakes.npz")[0] == 0
    data = load_images(str(tmp_path / "fakes.npz"), cache=tmp_path)
    assert data.classes == tuple("0123456789") and data.counts["train"] == dict.fromkeys("0123456789", 1)
    numbers = np.arange(20) % 10
    expected = unscaled(pictures(restored(runs["labels"]), jax.random.key(0), numbers))
    np.testing.assert_array_equal(data.everything.pixels, expected)
    np.testing.assert_array_equal(data.everything.labels, numbers)
    assert scaled(data.pictures.pixels).shape == (10, 4, 4, 1)


def not_described(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"config": {}}')
    return tmp_path


def empty(tmp_path: Path, runs) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "generator.json").write_text((runs["plain"] / "assets" / "generator.json").read_text())
    return tmp_path


def of_more(tmp_path: Path, runs) -> Path:
    described = json.loads((runs["plain"] / "assets" / "generator.json").read_text())
    (empty(tmp_path, runs) / "assets" / "generator.json").write_text(json.dumps(described | {"condition": "other"}))
    return tmp_path


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("plain", ["--count", 0], "--count 0 is below 1."),
        ("plain", ["--columns", -1], "--columns -1 is below 0; 0 is the default."),
        ("plain", ["--output", "a.gif"], "--output a.gif is neither a .png nor an .npz."),
        ("labels", ["--truncation", "nan"], "--truncation nan is no number; 0.7 is usual."),
        ("plain", ["--label", "3"], "{} has no classes; leave out --label."),
        ("labels", ["--label", "cat"], "--label cat is none of this run's classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9."),
        ("plain", ["--truncation", 0.5], "--truncation is of generators with a mean style, as StyleGAN's; {} is of a"),
        ("plain", ["--step", 9], "{} has no checkpoint of step 9; there are:"),
        (of_two, [], "{} holds several replicas or points of a sweep; name a run of one."),
        (lambda tmp_path, runs: tmp_path / "nothing", [], "{} is not a run: it has no config.json."),
        (lambda tmp_path, runs: not_described(tmp_path), [], "{} is not the run of a GAN that makes pictures; jaxarch"),
        (empty, [], "{} has no checkpoint yet."),
        (of_more, [], "the generator of {} makes its pictures of more than latents and labels."),
    ],
)
def test_bad_input_is_one_clear_line(name, options, message, runs, command, tmp_path):
    path = runs[name] if isinstance(name, str) else name(tmp_path, runs)
    code, said = command(path, *options)
    assert code == 2 and said.startswith("sample: " + message.replace("{}", str(path))), said


def test_a_module_as_json_and_back():
    networks = [dcgan(DCGANConfig(), (8, 8, 1), 10)[0], stylegan2(StyleGAN2Config(), (8, 8, 3))[0]]
    for module in (dots.Dots(3, (4, 4, 1), 10, jnp.bfloat16), *networks):
        assert _composed(json.loads(json.dumps(_described(module)))) == module
    assert [takes(module, "truncation") for module in networks] == [False, True]
    with pytest.raises(TypeError, match="Dots.latent_dim is <function"):
        _described(dots.Dots(lambda x: x, (4, 4, 1)))


def test_a_generator_that_has_changed_is_said_as_such(runs, command, monkeypatch):
    monkeypatch.delattr(sys.modules["tests.gan.sketches.dots"], "Plain")
    code, said = command(runs["plain"])
    assert code == 2 and "the run's generator tests.gan.sketches.dots.Plain is no longer what it was" in said
