"""What a user can do wrong: one line that says what and what to do, the right exit code, nothing lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxarch.run import __main__ as used
from jaxarch.run.command import Options, changes, from_json, to_json, value_of
from jaxarch.run.load import load
from jaxarch.run.program import Programs
from jaxarch.run.protocol import ConfigError
from tests.run.running import arrays, exit_code, log, run
from tests.run.sketches import gan, line, tabular


def said(capsys) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error.strip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepz", 3], "line: unknown option --stepz; did you mean --steps? --help lists all."),
        (["--batch_sizes=3"], "line: unknown option --batch_sizes; did you mean --batch-size? --help lists all."),
        (["--steps", "many"], "line: Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (["--steps"], "line: Missing value for argument '--steps'."),
        (["--dim", 0], "line: --dim 0 is below 1; 3 would do."),
        (["tall"], "line: unknown word 'tall' before the options; presets: wide."),
        (["--scan", 0], "line: --scan 0 is below 1."),
        (["--name", "a/b"], "line: --name 'a/b' cannot name a folder"),
        (["--steps", 0], "line: --steps 0 is below 1."),
        (["--steps", 10**12], "line: 1000000000000 steps are too many to be counted; the most is 2147483646."),
        (["--batch-size", 0], "line: --batch-size 0 is below 1."),
        (["--stop-at", 100], "line: --stop-at 100 is not within the run's --steps 60."),
        (["--resume"], "line: --resume needs the --name of a run; there are none in"),
        (["--resume", "--name", "a"], "line: --resume: there is no run"),
        (["--init-from", "nowhere"], "line: --init-from nowhere: there is no run; name the folder"),
        (["--log", "paper"], "line: invalid choice 'paper'"),
    ],
)
def test_usage(arguments, message, tmp_path, capsys):
    assert exit_code(line, *arguments, "--runs", tmp_path) == 2
    assert said(capsys).startswith(message)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_name_that_exists_is_not_overwritten(tmp_path, capsys):
    folder = run(line, tmp_path)
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert exit_code(line, "--runs", tmp_path, "--name", "a") == 2
    assert said(capsys) == f"line: the run {folder} exists; go on with it by --resume, or choose another --name."
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_changed_configuration_is_refused_by_name(tmp_path, capsys):
    run(line, tmp_path, "--stop-at", 10)
    capsys.readouterr()
    assert exit_code(line, "--runs", tmp_path, "--name", "a", "--resume", "--dim", 4, "--seed", 3) == 2
    message = said(capsys)
    assert "--dim 3 -> 4; --seed 0 -> 3" in message and "--init-from" in message


def test_where_to_stop_and_how_often_to_look_may_change_on_resume(tmp_path):
    run(line, tmp_path, "--stop-at", 10)
    folder = run(line, tmp_path, "--resume", "--stop-at", 20, "--eval-every", 5, "--checkpoint-every", 7, "--scan", 2)
    assert [entry["step"] for entry in log(folder) if "val/loss" in entry] == [0, 6, 15, 20]


def test_resuming_another_experiments_run_is_refused(tmp_path, capsys):
    folder = run(gan, tmp_path, "--steps", 2)
    (tmp_path / "line").mkdir()
    folder.rename(tmp_path / "line" / "a")
    capsys.readouterr()
    assert exit_code(line, "--runs", tmp_path, "--name", "a", "--resume") == 2
    assert "is a run of tests.run.sketches.gan, not of tests.run.sketches.line" in said(capsys)


def test_a_finished_run_resumed_shows_its_result(tmp_path, capsys):
    folder = run(line, tmp_path)
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run(line, tmp_path, "--resume")
    assert "is finished" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_it_said_its_result_says_it(tmp_path):
    folder = run(line, tmp_path)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    run(line, tmp_path, "--resume")
    again = json.loads((folder / "result.json").read_text())
    assert again["val/loss"] == result["val/loss"] and again["steps"] == 60


def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(tmp_path, capsys):
    folder = run(line, tmp_path, "--stop-at", 40, "--checkpoint-every", 40)
    for path in (folder / "checkpoints" / "40").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert exit_code(line, "--runs", tmp_path, "--name", "a", "--resume") == 1
    assert "can the run go on, and nothing was changed there" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before and (folder / "checkpoints" / "40").exists()


def test_a_sweep_said_again_on_resume_is_the_same_sweep(tmp_path):
    options = ["--sweep", "learning-rate=0.01,0.02"]
    run(line, tmp_path, *options, "--stop-at", 10)
    assert (run(line, tmp_path, *options, "--resume") / "result.json").exists()


def test_a_short_run_is_profiled(tmp_path, capsys):
    folder = run(line, tmp_path, "--steps", 3, "--profile")
    assert list((folder / "profile").rglob("*.json.gz")) and "profile: " in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    code = exit_code(line, "--runs", tmp_path, "--name", "a", "--nan-at", 33, "--checkpoint-every", 10)
    assert code == 1
    message = said(capsys)
    assert message.startswith("line: train/loss is not finite at step 34; the checkpoint of step 30 is kept.")
    assert np.isfinite(arrays(tmp_path / "line" / "a")[".params['w']"]).all()


def test_parameters_that_the_last_step_broke_are_not_saved(tmp_path, capsys):
    """The metric of that step was still finite."""
    assert exit_code(line, "--runs", tmp_path, "--name", "a", "--nan-at", 59, "--checkpoint-every", 10) == 1
    assert said(capsys).startswith(
        "line: a parameter after the update is not finite at step 59; the checkpoint of step 50"
    )
    assert np.isfinite(arrays(tmp_path / "line" / "a")[".params['w']"]).all()


def test_a_diverged_member_is_named_and_the_others_go_on(tmp_path, capsys):
    arguments = ["--sweep", "learning-rate=0.05,0.2", "--replicas", 2, "--nan-above", 0.1]
    folder = run(line, tmp_path, *arguments)
    out = capsys.readouterr().out
    for seed in (0, 1):
        assert f"replica with seed {seed} at learning_rate=0.2: train/loss is not finite at step 1; left out" in out
    last = log(folder)[-2:]
    assert last[0]["sweep"] == {"learning_rate": 0.05} and last[0]["alive"] == 2 and last[0]["val/loss"] < 0.1
    assert last[1]["alive"] == 0 and "val/loss" not in last[1]
    run(line, tmp_path, "--steps", 60, name="alone")
    np.testing.assert_allclose(
        last[0]["val/loss/replicas"][0], log(tmp_path / "line" / "alone")[-1]["val/loss"], rtol=1e-3
    )


def test_all_members_diverged_ends_the_run(tmp_path, capsys):
    assert exit_code(line, "--runs", tmp_path, "--name", "a", "--replicas", 2, "--nan-at", 4) == 1
    assert "all 2 replicas diverged; the first: train/loss is not finite at step 5" in capsys.readouterr().err


def test_weights_of_another_run(tmp_path, capsys):
    first = run(line, tmp_path, name="first")
    second = run(line, tmp_path, "--init-from", first, "--stop-at", 1, name="second")
    assert log(second)[0]["val/loss"] == log(first)[-1]["val/loss"]
    both = run(line, tmp_path, "--init-from", first, "--replicas", 2, "--stop-at", 1, name="both")
    np.testing.assert_allclose(log(both)[0]["val/loss/replicas"], log(first)[-1]["val/loss"], rtol=1e-6)
    # Killed before its first checkpoint it begins with them again.
    shutil.rmtree(second / "checkpoints")
    run(line, tmp_path, "--resume", "--stop-at", 1, name="second")
    assert log(second)[0]["val/loss"] == log(first)[-1]["val/loss"]
    capsys.readouterr()
    assert exit_code(line, "--runs", tmp_path, "--name", "third", "--init-from", first, "--dim", 7) == 2
    assert said(capsys) == "line: --init-from: the weights do not fit: w is [3], not [7]."
    assert not (tmp_path / "line" / "third").exists()


def test_a_truncated_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, capsys):
    whole = run(line, tmp_path, name="whole")
    folder = run(line, tmp_path, "--stop-at", 40)
    newest = max(
        (path for path in (folder / "checkpoints" / "40").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    newest.write_bytes(newest.read_bytes()[:10])
    capsys.readouterr()
    run(line, tmp_path, "--resume")
    assert "the checkpoint of step 40 is damaged (" in capsys.readouterr().out
    assert log(folder) == log(whole)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """No file may grow past 8 kB, as on a disk that is full; the weights are 12 kB."""
    run(line, tmp_path, "--stop-at", 10, "--dim", 3000)
    command = f"{sys.executable} -m tests.run.sketches.line --runs {tmp_path} --name a --resume"
    # Python and the compilation cache would cut their own files short, and leave them so.
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    full = subprocess.run(["bash", "-c", f"ulimit -f 8; exec {command}"], env=env, capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert "could not be written (File too large); the checkpoint of step 10 is kept. Make room" in full.stderr
    assert load(tmp_path / "line" / "a").state.params["w"].shape == (3000,)


def test_the_command_line_end_to_end(tmp_path):
    command = [sys.executable, "-m", "tests.run.sketches.line", "wide", "--runs", str(tmp_path), "--name", "a"]
    done = subprocess.run([*command, "--profile", "--scan", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "line" / "a"
    for name in ("config.json", "metrics.jsonl", "curves.png", "result.json", "checkpoints", "samples", "profile"):
        assert (folder / name).exists(), name
    assert list((folder / "profile").rglob("*.json.gz"))
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 60 and result["parameters"] == 7 and result["devices"] == 1 and result["seconds"] > 0
    _, config, state = load(folder)
    assert config == line.Config(dim=7) and state.params["w"].shape == (7,)
    for verb in ("evaluate", "report"):
        used = subprocess.run([sys.executable, "-m", "jaxarch.run", verb, str(folder)], capture_output=True, text=True)
        assert used.returncode == 0, used.stderr
    evaluated = subprocess.run(
        [sys.executable, "-m", "jaxarch.run", "evaluate", str(folder), "--step", "best"], capture_output=True, text=True
    )
    assert f"val/loss {result['val/loss']:.4g}" in evaluated.stdout
    wrong = subprocess.run([sys.executable, "-m", "jaxarch.run", "evaluate", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "jaxarch.run: nowhere is not a run: it has no config.json.\n"


def test_an_experiment_that_measures_in_its_report_alone_says_so(tmp_path, monkeypatch, capsys):
    folder = run(line, tmp_path, "--steps", 20)
    monkeypatch.setattr(Programs, "evaluate", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["jaxarch.run", "evaluate", str(folder)])
    capsys.readouterr()
    used.main()
    expected = f"all that this experiment measures is in its report: python -m jaxarch.run report {folder}\n"
    assert capsys.readouterr().out == expected


def test_a_checkpoint_that_is_not_there(tmp_path):
    folder = run(line, tmp_path, "--steps", 20)
    with pytest.raises(ConfigError, match="has no checkpoint of step 7; there are: "):
        load(folder, 7)
    with pytest.raises(ConfigError, match="is not a run"):
        load(tmp_path)


@dataclasses.dataclass(frozen=True)
class Inner:
    a: int = 1


@dataclasses.dataclass(frozen=True)
class Other:
    b: Path = Path("b")


@dataclasses.dataclass(frozen=True)
class Nested:
    one: Inner | None = None
    either: Inner | Other = Inner()
    places: tuple[Path, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    place: Path | None = None
    text: str | None = None


@pytest.mark.parametrize(
    "value",
    [
        Nested(),
        Nested(Inner(3), Other(Path("x")), (Path("p"), Path("q")), ((1, 2), (3, 4)), Path("r"), "s"),
    ],
)
def test_nested_configurations_survive_json(value):
    assert from_json(Nested(), json.loads(json.dumps(to_json(value)))) == value


def test_configurations_survive_json():
    options = Options(stop_at=3, sweep=("a=1,2",), init_from="x")
    assert from_json(Options(), json.loads(json.dumps(to_json(options)))) == options
    assert changes({"a": 1, "m": {"b": 2}}, {"a": 1, "m": {"b": 3}}) == ["--m.b 3 -> 2"]
    assert changes({"new": 1}, {}) == ["--new None -> 1"]


@pytest.mark.parametrize("arguments, value", [(["--name", "a"], "a"), (["--name=b"], "b"), (["--x", "1"], None)])
def test_value_of(arguments, value):
    assert value_of(arguments, "--name") == value


def test_env_steps_give_the_steps(tmp_path):
    folder = run(tabular, tmp_path, "--env-steps", 40)
    assert json.loads((folder / "result.json").read_text())["steps"] == 40
