from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from jaxarch.run import processes
from jaxarch.run.command import exits
from jaxarch.run.processes import check_coordinator, join
from jaxarch.run.protocol import ConfigError, RunError
from tests.run.running import assert_same, log
from tests.run.several import MESH, MODULE, Several, free_port, several, wait_for

STEPS, BATCH = 12, 16
OFTEN = ("--eval-every", 4, "--checkpoint-every", 2)
SLOWLY = ("--pause", 0.04)  # a step's eight examples take 0.3 seconds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing disturbs: its folder, how they ended, the examples that each read."""
    place = tmp_path_factory.mktemp("whole")
    (place / "reads").mkdir()
    ended = several("--name", "a", "--runs", place, *MESH, *OFTEN, "--reads", place / "reads")
    assert [process.code for process in ended] == [0, 0], ended
    reads = [[int(line) for line in (place / "reads" / str(i)).read_text().split()] for i in range(2)]
    return place / "network" / "a", ended, reads


def test_only_the_first_prints_and_writes(whole):
    folder, (first, second), _ = whole
    assert "step 12  val/loss" in first.out and "on 8 cpu device(s)" in first.out
    assert (second.out, second.err, first.err) == ("", "", "")
    steps = [line["step"] for line in log(folder)]
    assert steps == list(range(STEPS + 1))
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.json", "curves.png", "metrics.jsonl", "result.json", "samples"
    }  # fmt: skip
    assert {path.name for path in (folder / "samples").rglob("*.txt")} == {"largest-0.txt"}
    assert all("val/largest" in line for line in log(folder) if line["step"] % 4 == 0)  # of the first's report


def test_each_reads_its_rows_alone(whole):
    _, _, reads = whole
    for process, numbers in enumerate(reads):
        later = [number for number in numbers if number >= BATCH]  # of the first batch all want the shape
        half = range(process * BATCH // 2, (process + 1) * BATCH // 2)
        assert later == [step * BATCH + row for step in range(1, STEPS) for row in half]


def damage(checkpoint):
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_a_run_that_is_stopped_loses_a_process_and_a_checkpoint_ends_as_if_undisturbed(whole, tmp_path):
    folder, name = tmp_path / "network" / "a", ("--name", "a", "--runs", tmp_path, *MESH)
    running = Several(*name, *OFTEN, *SLOWLY)
    wait_for(folder / "metrics.jsonl", lambda text: text.count("\n") > 3)
    running.processes[1].send_signal(signal.SIGTERM)
    first, second = running.ended()
    assert (first.code, second.code, second.err) == (143, 143, "")
    stopped_at = saved(folder)[-1]
    assert f"stopped by SIGTERM after step {stopped_at} and saved" in first.err and first.err.count("\n") == 1
    assert log(folder)[-1]["step"] == stopped_at < 8

    running = Several(*name, "--resume")
    wait_for(folder / "metrics.jsonl", lambda text: text.count("\n") > stopped_at + 3)
    running.processes[0].kill()  # the one whom all others ask
    killed = time.monotonic()
    lost, other = running.ended()
    assert lost.code == -signal.SIGKILL and other.code not in (0, -signal.SIGKILL)
    assert running.started + other.seconds - killed < 90
    assert not (folder / "result.json").exists()

    before, newest = saved(folder)[-2:]
    damage(folder / "checkpoints" / str(newest))
    first, second = several(*name, "--resume")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.out.count(f"the checkpoint of step {newest} is damaged (") == 1
    assert f"from step {before} to step {STEPS}" in first.out and second.out + second.err == ""
    assert_same(folder, whole[0])


@pytest.mark.parametrize(
    "second, code, line",
    [
        (("--steps", 11), 2, "process 1 was given other values than the first: --steps 12 -> 11."),
        (("--lenght", 3), 2, "process 1: unknown option --lenght; did you mean"),
        ("without data", 2, "process 1: there are no data; --data FILE would do."),
    ],
)
def test_an_error_of_one_ends_all_with_one_line_of_the_first(second, code, line, tmp_path):
    own, environments = {1: second}, None
    if isinstance(second, str):
        own, environments = None, {1: {"NETWORK_WITHOUT_DATA": "1"}}
    ended = several("--name", "a", "--runs", tmp_path, *MESH, own=own, environments=environments)
    assert [process.code for process in ended] == [code, code]
    assert ended[0].err.startswith(f"network: {line}") and ended[0].err.count("\n") == 1 and ended[1].err == ""
    assert not (tmp_path / "network").exists()


TELLING = """
import sys
import jax
from jaxarch.run import processes
processes.join("test", sys.argv[3], 2, int(sys.argv[7]))
number = jax.process_index()
assert processes.each([number, "x" * 2000 * number]) == [[0, ""], [1, "x" * 2000]]
assert processes.said("first" if number == 0 else "second") == "first"
assert processes.largest(3 - number) == 3 and processes.largest(number) == 1
assert list(processes.share("abcde")) == (list("ace") if number == 0 else list("bd"))
for kind, wanted in ((OSError(28, "No space"), processes.RunError), (processes.ConfigError("No space"),) * 2):
    try:
        with processes.agreed():
            if number == 1:
                raise kind
    except Exception as error:
        assert isinstance(error, wanted if isinstance(wanted, type) else type(wanted))
        assert str(error) == "process 1: No space"
    else:
        raise SystemExit("it was not told")
"""


def test_what_one_gives_all_are_told():
    ended = several(prefix=("-c", TELLING))
    assert [process.code for process in ended] == [0, 0], ended


def alone(*arguments: object, patience: int = 300) -> subprocess.CompletedProcess:
    """One process that waits so many seconds for the others."""
    module, name = MODULE.rsplit(".", 1)
    script = (
        f"from jaxarch.run import processes; processes.PATIENCE = {patience}; "
        f"from {module} import {name} as m; m.main(m.experiment, m.Config)"
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((), "network: --distributed: coordinator_address should be defined. Where no scheduler says so, give"),
        (("--processes", "two"), "network: --processes two is not a number of processes."),
        (("--processes", 2, "--process", 2), "network: --process 2 is none of --processes 2, which are 0 to 1."),
    ],
)
def test_what_is_missing_to_find_the_others_is_said(arguments, line):
    at = ("--coordinator", f"localhost:{free_port()}") if arguments else ()
    done = alone("--distributed", *at, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_dead_process_is_missed_soon(monkeypatch):
    """Within 90 seconds all are to have ended: the heartbeat that is missed, and then the wait for the others."""
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **options: given.update(options, place=place))
    join("network", "localhost:1", 2, 1)
    assert given["place"] == ("localhost:1", 2, 1)
    assert 10 <= given["heartbeat_timeout_seconds"] <= 45 >= given["shutdown_timeout_seconds"]


def test_one_that_ends_alone_does_not_wait_for_the_others(monkeypatch):
    """As it would by Python's own way out, where `jax.distributed` waits until all are there."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    processes.end(3)
    assert codes == [3]


def test_one_whose_peer_is_gone_says_it_in_a_line(monkeypatch, capsys):
    """And of what is a mistake in the program all that is known."""
    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for said, line in (
        (
            "UNKNOWN: Gloo AllReduce failed: [pair.cc:547] Connection closed by peer [::1]:7946",
            "another process is",
        ),
        ("no such thing", "Traceback"),
    ):
        with pytest.raises(SystemExit, match="^1$"), exits("network"):
            raise ValueError(said)
        err = capsys.readouterr().err
        assert line in err and (err.count("\n") == 1) == (line != "Traceback")


@pytest.mark.parametrize("coordinator", ["localhost", ":55527", "localhost:port", "localhost:0", "localhost:70000"])
def test_an_address_that_is_none_is_said(coordinator):
    with pytest.raises(ConfigError, match=f"--coordinator {coordinator} is not HOST:PORT"):
        join("network", coordinator, 2, 0)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("", 0)) as taken:
        coordinator = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{coordinator}: Address already in use; another port would do."):
            check_coordinator(coordinator, 0)
        check_coordinator(coordinator, 1)  # which does not listen


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_waits_in_vain_for_the_others_says_so(process, tmp_path):
    at = ("--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process", process)
    done = alone("--distributed", *at, "--name", "a", "--runs", tmp_path, *MESH, patience=3)
    assert done.returncode == 1 and done.stderr.startswith(
        "network: --distributed: the processes did not meet within 3 s;"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_process_that_falls_silent_is_missed(tmp_path):
    """As a host does that is gone from the network: it closes no connection."""
    running = Several("--name", "a", "--runs", tmp_path, *MESH, *OFTEN, *SLOWLY, "--steps", 500)
    wait_for(tmp_path / "network" / "a" / "metrics.jsonl", lambda text: text.count("\n") > 3)
    running.processes[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert running.processes[0].wait(timeout=90) != 0
    assert 5 < time.monotonic() - stopped < 90
    running.processes[1].kill()
    running.ended()


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_interrupted_from_the_keyboard_all_stop_after_the_same_step(process, tmp_path):
    running = Several("--name", "a", "--runs", tmp_path, *MESH, *OFTEN, *SLOWLY)
    wait_for(tmp_path / "network" / "a" / "metrics.jsonl", lambda text: text.count("\n") > 3)
    running.processes[process].send_signal(signal.SIGINT)
    first, second = running.ended()
    assert (first.code, second.code, second.err) == (130, 130, "")
    assert "stopped by SIGINT after step" in first.err and first.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_of_one_ends_all_and_the_last_checkpoint_is_kept(process, tmp_path):
    module, name = MODULE.rsplit(".", 1)
    script = f"""
import resource
import jax
from jaxarch.run.checkpoint import Checkpoints
from {module} import {name} as m
save = Checkpoints.save
def tight(self, step, *rest):
    if step == 8 and jax.process_index() == {process}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    save(self, step, *rest)
Checkpoints.save = tight
m.main(m.experiment, m.Config)
"""
    arguments = ("--name", "a", "--runs", tmp_path, *MESH, "--eval-every", 12, "--checkpoint-every", 4)
    ended = several(*arguments, prefix=("-c", script))
    assert ended[process].code == 1 and ended[1 - process].code not in (0, None)
    line = (
        f"process {process}: the checkpoint of step 8 could not be written (File too large); the checkpoint of step 4"
    )
    assert line in ended[process].err
    first, _ = several("--name", "a", "--runs", tmp_path, *MESH, "--resume")
    assert first.code == 0 and "from step 4" in first.out
