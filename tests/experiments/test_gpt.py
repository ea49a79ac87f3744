"""The main job from end to end, small: a run with all its parts resumed, a member = solo, bad data, samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from experiments import gpt
from jaxarch.attention.cost import flops
from jaxarch.run.program import Member, members
from jaxarch.transformer.decoder import ModelConfig
from jaxarch.transformer.training import OptimConfig
from tests.run.running import after, assert_same, exit_code, log, run

TINY = ["--model.layers", 1, "--model.heads", 2, "--model.dim", 16, "--length", 16, "--batch-size", 4]
TEXT = "In the beginning was the word, and the word was with a model of eleven parameters.\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "my.txt"
    path.write_text(TEXT)
    return path


def test_stopped_and_resumed_is_uninterrupted_with_all_its_parts(text, tmp_path):
    """Dropout, accumulation, the average, several steps a dispatch, a tokeniser trained by the run."""
    options = [*TINY, "--data", text, "--tokenizer", "bpe", "--vocab-size", 280, "--steps", 12, "--eval-every", 6]
    options += ["--model.dropout", 0.2, "--optim.accumulate", 2, "--optim.ema", 0.9, "--scan", 3]
    whole = run(gpt, tmp_path, *options, name="whole")
    run(gpt, tmp_path, *options, "--stop-at", 7, name="parts")
    parts = run(gpt, tmp_path, "--resume", name="parts")
    assert_same(whole, parts)
    assert json.loads((parts / "assets" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_resuming_on_other_data_is_refused(text, tmp_path, capsys):
    run(gpt, tmp_path, *TINY, "--data", text, "--steps", 4, "--stop-at", 2)
    text.write_text(TEXT.replace("eleven", "7"))
    capsys.readouterr()
    assert exit_code(gpt, "--runs", tmp_path, "--name", "a", "--resume") == 2
    assert "the data has changed since the run began" in capsys.readouterr().err


def test_resuming_on_the_same_characters_in_another_order_is_refused(text, tmp_path, capsys):
    run(gpt, tmp_path, *TINY, "--data", text, "--steps", 4, "--stop-at", 2)
    text.write_text(TEXT[::-1])
    capsys.readouterr()
    assert exit_code(gpt, "--runs", tmp_path, "--name", "a", "--resume") == 2
    assert "data.json differs" in capsys.readouterr().err


def test_samples_of_a_text_without_line_breaks(text, tmp_path):
    text.write_text(" ".join(TEXT.split()))
    folder = run(gpt, tmp_path, *TINY, "--data", text, "--steps", 2, "--length", 1)
    assert len((folder / "samples" / "0000002" / "samples.txt").read_text()) > 100


def test_a_prompt_that_the_tokeniser_does_not_know_leaves_no_run(text, tmp_path, capsys):
    assert exit_code(gpt, "--runs", tmp_path, "--name", "a", *TINY, "--data", text, "--prompt", "日") == 2
    assert "is not among the" in capsys.readouterr().err and not (tmp_path / "gpt").exists()


def test_weights_of_another_alphabet_are_refused(text, tmp_path, capsys):
    folder = run(gpt, tmp_path, *TINY, "--data", text, "--steps", 2)
    text.write_text(TEXT.replace("e", "é"))
    options = ["--data", text, "--steps", 2, "--init-from", folder]
    assert exit_code(gpt, "--runs", tmp_path, "--name", "b", *TINY, *options) == 2
    assert "tokenizer.json is not this run's" in capsys.readouterr().err


@pytest.mark.parametrize("x64, tolerance", [(False, 1e-5), (True, 1e-10)])
def test_a_member_is_the_solo_run(text, x64, tolerance, monkeypatch):
    with jax.enable_x64(x64):
        if x64:
            monkeypatch.setitem(gpt.PRECISIONS, "f32", jax.numpy.float64)
        config = gpt.Config(
            data=str(text), length=16, batch_size=4, model=ModelConfig(1, 2, 16), optim=OptimConfig(warmup=2), steps=40
        )
        experiment = gpt.experiment(config)
        grid = members(experiment.hypers, ["learning-rate=0.001,0.002"], seed=3, replicas=2)
        programs, together = after(experiment, grid, 20)
        for number in (1, 2):
            _, alone = after(experiment, [grid[number]], 20)
            own = programs.member(together.state, number)
            if x64:
                assert jax.tree.leaves(own.params)[0].dtype == jax.numpy.float64
            chex.assert_trees_all_close(own.params, alone.state.params, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("precision, dtype", [("f32", "float32"), ("bf16", "bfloat16")])
def test_the_operations_of_a_step_are_those_of_its_program(text, precision, dtype):
    """Exactly, in micro-batches as well, once the pairs are added that the mask hides, 6 of 16."""
    model, optim = ModelConfig(1, 2, 16), OptimConfig(accumulate=2)
    config = gpt.Config(data=str(text), length=4, batch_size=6, model=model, optim=optim, precision=precision)
    experiment = gpt.experiment(config)
    hidden = 3 * flops(4 * 3 // 2, 6, 2, 8, 8)
    programs, _ = after(experiment._replace(flops=None), [Member(0, {})], 0)
    assert programs.operations() == {dtype: experiment.flops[dtype] + hidden} and list(experiment.flops) == [dtype]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model.heads", 5, "--model.dim", 64], "gpt: --model.heads 5 does not divide --model.dim 64; 4 or 8 would."),
        (["--model.layer", 3], "gpt: unknown option --model.layer; did you mean --model.layers? --help lists all."),
        (["--length", 1_000_000], "gpt: the training part of"),
        (["--data", "empty.txt"], "gpt: --data empty.txt is empty"),
        (["--data", "latin.txt"], "gpt: latin.txt is not UTF-8: byte 0xe9 at offset 3;"),
        (["--data", "nothing.txt"], "gpt: --data nothing.txt does not exist"),
        (["--optim.accumulate", 5], "gpt: --optim.accumulate 5 does not divide --batch-size 12."),
        (["--precision", "f16"], "gpt: "),
        (["--tokenizer", "words"], "gpt: "),
        (["--steps", 0], "gpt: --steps 0 is below 1."),
    ],
)
def test_usage(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("Caf\xe9".encode("latin-1"))
    assert exit_code(gpt, *arguments, "--runs", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_line_on_the_default_text(tmp_path):
    """As a newcomer types it: train, look at what is there, generate, on the text that needs no file."""
    command = [sys.executable, "-m", "experiments.gpt", "--runs", tmp_path, "--name", "a", "--steps", 30]
    done = subprocess.run([*map(str, [*command, *TINY])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "gpt" / "a"
    first, *_, last = log(folder)
    assert (
        abs(
            first["val/loss"]
            - np.log(len(json.loads((folder / "assets" / "tokenizer.json").read_text())["characters"]))
        )
        < 0.1
    )
    assert last["val/loss"] < first["val/loss"] - 0.2
    assert (folder / "samples" / "0000030" / "samples.txt").stat().st_size > 100
    generate = [sys.executable, "-m", "jaxarch.transformer.generate", str(folder), "--prompt", "The", "--tokens", "40"]
    one, two = (subprocess.run(generate, capture_output=True, text=True) for _ in range(2))
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("The") and len(one.stdout.strip("\n")) >= 35 and one.stdout == two.stdout
    wrong = subprocess.run([*generate, "--prompt", "\u2603"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "generate: the character" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_help_lists_the_options_that_scripts_rely_on():
    shown = subprocess.run([sys.executable, "-m", "experiments.gpt", "--help"], capture_output=True, text=True).stdout
    shared = (
        "steps stop-at seed data-seed name runs resume init-from eval-every checkpoint-every scan replicas sweep log"
    )
    own = "data batch-size precision profile length model.layers model.heads model.dim optim.learning-rate"
    for option in f"{shared} {own}".split():
        assert f"--{option}" in shown, option


def test_the_list_of_experiments():
    shown = subprocess.run([sys.executable, "-m", "experiments"], capture_output=True, text=True)
    assert shown.returncode == 0 and "A GPT trained on text." in shown.stdout and "measured:" in shown.stdout
