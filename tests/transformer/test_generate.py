from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments import gpt
from jaxarch.transformer import generate as command_line
from jaxarch.transformer.beams import Beams, search
from jaxarch.transformer.decoding import left_pad
from jaxarch.transformer.generate import complete, restored
from tests.run.running import run

TINY = ["--length", 16, "--model.layers", 1, "--model.heads", 2, "--model.dim", 16, "--batch-size", 4]
TINY += ["--optim.optimizer", "adamw", "--steps", 2, "--stop-at", 1]  # no samples are drawn


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same text, and one on another."""
    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text("In the beginning was the word, and the word was with a model.\n" * 20)
    (place / "other.txt").write_text("a b c d e f g h " * 50)
    large = run(gpt, place, *TINY, "--data", place / "text.txt", name="large")
    small = run(gpt, place, *TINY, "--data", place / "text.txt", "--seed", 1, name="small")
    return large, small, run(gpt, place, *TINY, "--data", place / "other.txt", name="other")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line: its exit code, and what it wrote, or its error."""

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["generate", *map(str, arguments)])
        code = 0
        try:
            command_line.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = capsys.readouterr()
        return (code, said.out[:-1]) if code == 0 else (code, said.err.strip().splitlines()[-1])

    return call


def test_beams_write_the_best_texts(runs, command):
    model, params, tokenizer = restored(runs[0], "newest")
    prompt = tokenizer.encode("In the")
    found = search(model, {"params": params}, left_pad([list(map(int, prompt))]), 10, Beams(3, 2, 0.5), tokenizer.end)
    expected = "\n---\n".join(tokenizer.decode(np.array([*prompt, *row])).strip("\n") for row in found.tokens[0])
    options = "--prompt", "In the", "--tokens", 10, "--beams", 3, "--count", 2, "--length-penalty", 0.5
    assert command(runs[0], *options) == (0, expected)


def test_a_draft_changes_no_text(runs, command):
    """Beyond the model's length too, where the text goes on from its last half."""
    options = "--prompt", "In the", "--tokens", 20, "--temperature", 0, "--repetition-penalty", 30
    assert command(runs[0], *options, "--draft", runs[1], "--drafted", 3) == command(runs[0], *options)
    assert command(runs[0], *options) != command(runs[0], *options[:-2])


def test_a_text_that_outgrows_the_length_goes_on_from_its_last_half(runs):
    _, _, tokenizer = restored(runs[0], "newest")
    seen = []

    def write(prompts, count, key):
        seen.append((tokenizer.decode(np.asarray(prompts.tokens[0])), count))
        return np.full((1, count), int(tokenizer.encode("e")[0]))

    text = complete(write, 8, tokenizer, ["In the"], 9, jax.random.key(0))
    assert text == ["In the" + 9 * "e"]
    assert seen == [("In the", 3), ("eeee", 5), ("eeee", 1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", 0], "--tokens and --count must be 1 at least"),
        (["--length-penalty", 2], "--length-penalty is of --beams"),
        (["--drafted", 2], "--drafted is of --draft"),
        (["--repetition-penalty", 0], "--repetition-penalty 0 is not above 0"),
        (["--beams", -1], "--beams -1 is below 1"),
        (["--beams", 2, "--count", 3], "--beams 2 cannot return 3 texts"),
        (["--beams", 2, "--temperature", 1], "--beams draws nothing"),
        (["--beams", 2, "--draft", "x"], "--beams and --draft exclude each other"),
        (["--beams", 2, "--tokens", 18], "--beams needs room for all 18 --tokens; after 'In the' it is 11"),
        (["--draft", "nowhere"], "nowhere"),
        (["--draft", "OTHER"], "is not that of"),
        (["--draft", "SMALL", "--drafted", 0], "--drafted 0 is below 1"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(options, said, runs, command):
    names = {"OTHER": runs[2], "SMALL": runs[1]}
    code, line = command(runs[0], "--prompt", "In the", *(names.get(option, option) for option in options))
    assert code == 2 and line.startswith("generate: ") and said in line
