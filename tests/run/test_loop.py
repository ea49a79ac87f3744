"""Laws of the loop: resumed = uninterrupted, scanned = looped, stopped by a signal = not stopped."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxarch.run import command, loop, peaks, program
from jaxarch.run.checkpoint import Checkpoints
from jaxarch.run.console import Console
from jaxarch.run.loop import Plan, Reached, Run, batches, dispatches, feed, plan
from jaxarch.run.metrics import Log, read
from jaxarch.run.program import Member, Programs, members
from tests.run.running import after, arrays, assert_same, log, run
from tests.run.sketches import gan, line, tabular

WAYS = [[], ["--scan", 4], ["--replicas", 3], ["--sweep", "learning-rate=0.01,0.1"]]
CASES = [pytest.param(line, 30, way, id=f"line {way}") for way in WAYS]
CASES += [pytest.param(gan, 20, way, id=f"gan {way}") for way in WAYS[:2]]
CASES += [pytest.param(tabular, 200, way, id=f"tabular {way}") for way in WAYS[:2]]
CASES += [pytest.param(gan, 20, way, id=f"gan {way}", marks=pytest.mark.slow) for way in WAYS[2:]]
CASES += [pytest.param(tabular, 200, way, id=f"tabular {way}", marks=pytest.mark.slow) for way in WAYS[2:]]


@pytest.mark.parametrize("module, half, way", CASES)
def test_stopped_and_resumed_is_uninterrupted(module, half, way, tmp_path):
    way = [*way, "--eval-every", half]
    whole = run(module, tmp_path, *way, name="whole")
    run(module, tmp_path, *way, "--stop-at", half + 3, name="parts")  # not a multiple of any interval
    parts = run(module, tmp_path, "--resume", name="parts")
    assert_same(whole, parts)


def test_scanned_is_looped(tmp_path):
    looped = run(gan, tmp_path, "--eval-every", 8, name="looped")
    scanned = run(gan, tmp_path, "--eval-every", 8, "--scan", 8, name="scanned")
    left, right = arrays(looped), arrays(scanned)
    for key, value in left.items():
        np.testing.assert_array_equal(value, right[key], err_msg=key)
    evaluated = [[entry for entry in log(folder) if "val/distance" in entry] for folder in (looped, scanned)]
    assert [entry["val/distance"] for entry in evaluated[0]] == [entry["val/distance"] for entry in evaluated[1]]


def test_another_seed_is_another_run_and_the_same_seed_the_same(tmp_path):
    one, same, other = (run(line, tmp_path, "--seed", seed, name=f"{n}") for n, seed in enumerate((1, 1, 2)))
    assert_same(one, same)
    assert log(one)[0] != log(other)[0]


def test_same_seed_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "tests.run.sketches.gan", "--steps", "10", "--runs", tmp_path, "--name"]
    for name in ("one", "two"):
        subprocess.run([*command, name], check=True, capture_output=True)
    assert_same(tmp_path / "gan" / "one", tmp_path / "gan" / "two")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_has_the_same_curve(number, code, tmp_path):
    options = ["--steps", "20000", "--eval-every", "10000", "--runs", str(tmp_path), "--name", "stopped"]
    command = [sys.executable, "-m", "tests.run.sketches.line"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    folder = tmp_path / "line" / "stopped"
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--name stopped --resume" in said and len(said.splitlines()) == 1
    step = int(said.split("after step ")[1].split()[0])
    assert step < 20000
    assert (folder / "checkpoints" / str(step) / "tree").is_dir(), "what it did is saved, to the step"
    run(line, tmp_path, "--resume", "--stop-at", step + 200, name="stopped")
    whole = run(line, tmp_path, *options[:4], "--stop-at", step + 200, name="whole")
    assert_same(whole, folder)


@given(st.integers(0, 50), st.integers(1, 60), st.lists(st.integers(1, 20), min_size=3, max_size=3), st.integers(1, 9))
def test_dispatches_cover_every_step_once_and_stop_at_every_look(start, length, looks, scan):
    schedule = Plan(start + length, start + length, *looks, scan)
    steps = [(first, first + count) for first, count in dispatches(start, schedule)]
    assert [n for first, last in steps for n in range(first, last)] == list(range(start, start + length))
    for (first, last), look in itertools.product(steps, looks):
        assert not any(n % look == 0 for n in range(first + 1, last)), "a look was jumped over"


def test_the_feed_gives_step_t_its_own_examples():
    experiment = line.experiment(line.Config(batch_size=5))
    fed = list(feed(Programs(experiment, [Member(0, {})]), iter([(0, 1), (1, 3), (4, 2)])))
    x = np.concatenate([batch[0].reshape(-1, 3) for _, _, batch in fed])
    expected = np.stack([experiment.data[i][0] for i in range(6 * 5)])
    np.testing.assert_array_equal(x, expected)
    assert batches(experiment, 2, 1)[0].shape == (1, 5, 3)


def test_what_has_no_data_is_fed_on_a_mesh_too():
    """A world in the state has no examples that the mesh could cut."""
    programs = Programs(tabular.experiment(tabular.Config()), [Member(0, {})])
    programs.mesh = jax.sharding.AbstractMesh((8,), ("data",))
    assert list(feed(programs, iter([(0, 1), (1, 4)]))) == [(0, 1, 1), (1, 4, 4)]


def test_a_broken_example_reaches_the_caller():
    class Broken:
        def __getitem__(self, i):
            raise OSError("unreadable")

    experiment = line.experiment(line.Config())._replace(data=Broken())
    with pytest.raises(OSError, match="unreadable"):
        list(feed(Programs(experiment, [Member(0, {})]), iter([(0, 1)])))


# A step of `line` multiplies [4, 3] by [3], and once more for the gradient of the weights.
LINE_FLOPS = 2 * 2 * 4 * 3


@pytest.fixture
def decreed(monkeypatch):
    """A machine of 1,000 operations a second on which step t takes t + 1 seconds, and all that is no step very many."""
    now = 0.0

    def lasting(owner, name, seconds):
        function = getattr(owner, name)

        def wrapped(*arguments, **options):
            nonlocal now
            now += seconds(*arguments) if callable(seconds) else seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapped)

    def steps(programs, carry, batches, index):
        count = batches if isinstance(batches, int) else len(jax.tree.leaves(batches)[0])
        return sum(range(index + 1, index + count + 1))

    for module in (loop, program):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(peaks, "flops", lambda dtype, say: 1000.0)
    lasting(Programs, "steps", steps)
    for owner, name in (
        (peaks, "flops"), (Programs, "evaluate"), (loop, "report"), (Checkpoints, "save"), (command, "draw"),
    ):  # fmt: skip
        lasting(owner, name, 10_000.0)


def rounded(value):
    """To four figures, as in the log."""
    return float(f"{value:.4g}")


def with_speed(folder):
    """The result and the lines of the log, without those of step 0, which have no speed."""
    lines = read(folder / "metrics.jsonl")
    assert not any("steps_per_second" in entry or "mfu" in entry for entry in lines if entry["step"] == 0)
    return [json.loads((folder / "result.json").read_text()), *(entry for entry in lines if entry["step"])]


@pytest.mark.parametrize(
    "way, members", [([], 1), (["--scan", 4], 1), (["--replicas", 3], 3), (["--sweep", "learning-rate=0.01,0.1"], 2)]
)
def test_mfu_is_operations_over_what_the_machine_could_have_done(way, members, decreed, tmp_path):
    result, *lines = with_speed(run(line, tmp_path, "--steps", 12, *way))
    assert result["seconds"] == 78 and result["mfu"] == rounded(members * 12 * LINE_FLOPS / 78 / 1000)
    steps = [0, *dict.fromkeys(entry["step"] for entry in lines)]
    before = dict(itertools.pairwise(reversed(steps)))
    assert len(before) >= 3
    for entry in lines:
        taken = range(before[entry["step"]], entry["step"])
        speed = len(taken) / sum(t + 1 for t in taken)
        assert entry["steps_per_second"] == rounded(speed)
        assert entry["mfu"] == rounded(members * speed * LINE_FLOPS / 1000)


def test_speed_counts_from_where_a_resumed_run_begins(decreed, tmp_path):
    """A thousand steps that took ten hours are not in the next lines."""
    experiment = line.experiment(line.Config())
    programs, carry = after(experiment, [Member(0, {})], 0)
    reached, schedule = Reached(carry, 1000, 36_000.0), Plan(2000, 1010, 5, 2000, 2000, 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    running = Run(programs, schedule, tmp_path, checkpoints, Console(), Log(tmp_path), reached)
    running.train()
    lines = read(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in lines] == [1005, 1010]
    taken = sum(range(1001, 1006)), sum(range(1006, 1011))
    assert [entry["steps_per_second"] for entry in lines] == [rounded(5 / seconds) for seconds in taken]
    assert running.speed()["steps_per_second"] == rounded(1010 / (36_000 + sum(taken)))


def test_what_makes_no_products_has_no_mfu(decreed, tmp_path, capsys):
    for entry in with_speed(run(tabular, tmp_path, "--env-steps", 20)):
        assert "steps_per_second" in entry and "mfu" not in entry
    assert "MFU" not in capsys.readouterr().out


def test_the_last_line_says_the_mfu(decreed, tmp_path, capsys):
    run(line, tmp_path, "--steps", 3)
    assert "3 steps in 0:06, 2.4 % MFU (compiled" in capsys.readouterr().out.splitlines()[-1]


def test_operations_by_formula_come_before_those_counted():
    experiment = line.experiment(line.Config())
    assert after(experiment, [Member(0, {})], 0)[0].operations() == {"float32": LINE_FLOPS}
    given = experiment._replace(flops={"bfloat16": 7})
    assert after(given, members(given.hypers, [], 0, 3), 0)[0].operations() == {"bfloat16": 21}

    def endless(state, batch, index):
        x = jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, batch[0][:3])
        return state, {"x": x[0, 0]}

    assert after(experiment._replace(step=endless), [Member(0, {})], 0)[0].operations() == {}


def test_the_plan_looks_ten_times_and_rounds_to_whole_dispatches():
    assert plan(2000, None, 0, 0, 1) == Plan(2000, 2000, 20, 200, 200, 1)
    assert plan(2000, 100, 0, 50, 16) == Plan(2000, 100, 32, 208, 50, 16)
    assert plan(3, None, 0, 0, 1) == Plan(3, 3, 1, 1, 1, 1)
