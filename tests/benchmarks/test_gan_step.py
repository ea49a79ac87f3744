"""The benchmark of a GAN's step as a whole, small; the plain version beside ours."""

from __future__ import annotations

import json

import jax
import pytest

from benchmarks import gan_step
from benchmarks.gan_step import Arguments, NaiveDiscriminator, NaiveGenerator
from jaxarch.gan.dcgan import DCGANConfig, dcgan


def exit_code(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gan_step", *map(str, arguments)])
    try:
        gan_step.main()
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_as_a_whole(tmp_path, monkeypatch, capsys):
    small = ("--size", 8, "--features", 2, "--batch", 2, "--steps", 1, "--rounds", 1, "--no-torch")
    assert exit_code(monkeypatch, *small, "--output", tmp_path) == 0
    records = json.loads((tmp_path / "gan_step.json").read_text())["records"]
    assert [record["implementation"] for record in records] == ["jaxarch", "Flax, as one writes it first"]
    for record in records:
        assert record["pass"] == "train_step" and record["length"] == 8 and record["seconds"]["median"] > 0
    ours, naive = (record["seconds"]["median"] for record in records)
    assert records[1]["speed_of_ours"]["median"] == pytest.approx(naive / ours)
    assert "x as fast" in capsys.readouterr().out


def test_the_plain_networks_are_as_large():
    """Ours have biases besides: of the picture's channels, of D's first layer, of the logit."""
    latents, pictures = jax.numpy.ones((1, 100)), jax.numpy.ones((1, 32, 32, 3))

    def numbers(network, x):
        shapes = jax.eval_shape(network.init, jax.random.key(0), x)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    generator, discriminator = dcgan(DCGANConfig(features=4), (32, 32, 3))
    assert numbers(generator, latents) == numbers(NaiveGenerator(32, 4), latents) + 3
    assert numbers(discriminator, pictures) == numbers(NaiveDiscriminator(4), pictures) + 4 + 1


def test_ours_is_compiled_with_the_options_of_convolutions(monkeypatch):
    """Without them the step is up to a fifth slower."""
    found = []
    options = gan_step.backend.compiler_options
    monkeypatch.setattr(gan_step.backend, "compiler_options", lambda text: found.append(options(text)) or found[-1])
    gan_step.ours(Arguments(size=8, features=2, batch=2, steps=1))()
    assert found[-1] == {} or "xla_cpu_experimental_ynn_fusion_type" in found[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", 12], "gan_step: --size 12 is not 8, 16, 32, 64"),
        (["--features", 0], "gan_step: --features 0 is below 1."),
    ],
)
def test_usage(arguments, message, monkeypatch, capsys):
    assert exit_code(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1
