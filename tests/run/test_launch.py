"""The launch files, run with stand-ins for the scheduler's commands, which write down how they are called."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
# An option with a space and a quote must arrive whole.
OPTIONS = ["llama", "--mesh", "data=2,fsdp=8", "--prompt", "It's so"]

# The first line of `codes` is how the run ends. It leaves its folder behind, as a run that was begun does.
PYTHON = """\
printf '%s\\n' "$@" > "$CALLS/python.$(ls "$CALLS" | grep -c python)"
code=$(head -n 1 "$CALLS/codes"); sed -i 1d "$CALLS/codes"
while [ $# -gt 0 ]; do case $1 in --name) name=$2 ;; --runs) runs=$2 ;; esac; shift; done
mkdir -p "$runs/gpt/$name" && touch "$runs/gpt/$name/config.json"
exit "$code"
"""
SRUN = 'while [[ $1 == --* ]]; do echo "$1" >> "$CALLS/srun"; shift; done; exec "$@"\n'
SCONTROL = 'echo "$@" >> "$CALLS/scontrol"\n'
GCLOUD = 'printf "%s\\n" "${@:1:$#-1}" > "$CALLS/gcloud"; exec bash -c "${@: -1}"\n'


@pytest.fixture
def machine(tmp_path: Path):
    """A call that runs a script there, with the codes by which the run's starts will end."""
    commands, calls = tmp_path / "commands", tmp_path / "calls"
    for folder in (commands, calls, tmp_path / "jaxarch"):
        folder.mkdir()
    for name, body in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL, "gcloud": GCLOUD, "sleep": ":\n"}.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}")
        (commands / name).chmod(0o755)

    def call(*command: object, codes: tuple[int, ...], **variables: object) -> int:
        (calls / "codes").write_text("".join(f"{code}\n" for code in codes))
        # Nothing but the scripts' own variables: `make PYTHON=...` hands that one down to all that it calls.
        environment = {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls)}
        environment |= {name: str(value) for name, value in variables.items()}
        return subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, timeout=20).returncode

    call.calls = calls
    return call


def started(calls: Path) -> list[list[str]]:
    """The arguments of each start of python, in order."""
    return [(calls / f"python.{i}").read_text().split("\n")[:-1] for i in range(len([*calls.glob("python.*")]))]


def whole(runs: Path | str, resumed: bool) -> list[str]:
    last = ["--resume"] if resumed else []
    return ["-m", "experiments.gpt", *OPTIONS, "--distributed", "--name", "large", "--runs", str(runs), *last]


@pytest.mark.parametrize("script", ["slurm.sh", "tpu.sh"])
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


def test_slurm_goes_on_where_it_was_stopped(machine, tmp_path):
    def start(code: int, count: int) -> int:
        given = {"RUNS": tmp_path / "runs", "SLURM_JOB_ID": 17, "SLURM_RESTART_COUNT": count}
        return machine("bash", LAUNCH / "slurm.sh", "gpt", "large", *OPTIONS, codes=(code,), **given)

    requeued = machine.calls / "scontrol"
    assert start(143, 0) == 143  # the time limit's signal
    assert requeued.read_text() == "requeue 17\n"
    assert start(134, 1) == 134  # another process died
    assert requeued.read_text() == "requeue 17\n" * 2
    assert start(0, 2) == 0 and requeued.read_text() == "requeue 17\n" * 2
    first, *later = started(machine.calls)
    assert first == whole(tmp_path / "runs", resumed=False)
    assert later == [whole(tmp_path / "runs", resumed=True)] * 2
    # The others may take their time to save.
    assert set((machine.calls / "srun").read_text().split()) == {"--kill-on-bad-exit=0", "--wait=120"}


@pytest.mark.parametrize(("code", "count"), [(2, 0), (1, 20)])
def test_slurm_gives_up(machine, code, count):
    """On a wrong command, and after twenty new starts."""
    given = {"SLURM_JOB_ID": 17, "SLURM_RESTART_COUNT": count}
    assert machine("bash", LAUNCH / "slurm.sh", "gpt", "large", *OPTIONS, codes=(code,), **given) == code
    assert not (machine.calls / "scontrol").exists()
    assert started(machine.calls) == [whole("runs", resumed=False)]


def test_slurm_is_asked_for_a_signal_to_the_processes_and_for_new_starts():
    asked = [line.split()[1] for line in (LAUNCH / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(asked)
    values = dict(option.split("=", 1) for option in asked if "=" in option)
    assert values["--ntasks-per-node"] == values["--gpus-per-node"]


def test_tpu_starts_again_until_it_is_done(machine, tmp_path):
    given = {"RUNS": tmp_path / "the runs", "POD": "pod", "ZONE": "zone", "PYTHON": "python"}
    assert machine("bash", LAUNCH / "tpu.sh", "gpt", "large", *OPTIONS, codes=(1, 143, 0), **given) == 0
    runs = str(tmp_path / "the runs")
    assert started(machine.calls) == [whole(runs, resumed=False), *[whole(runs, resumed=True)] * 2]
    called = "compute tpus tpu-vm ssh pod --zone zone --worker=all --command"
    assert (machine.calls / "gcloud").read_text().split() == called.split()


def test_tpu_gives_up_and_asks_for_what_it_needs(machine, tmp_path):
    given = {"RUNS": tmp_path / "runs", "POD": "pod", "ZONE": "zone", "PYTHON": "python"}
    assert machine("bash", LAUNCH / "tpu.sh", "gpt", "large", codes=(1,) * 9, RESTARTS=2, **given) == 1
    assert len(started(machine.calls)) == 3
    assert started(machine.calls)[0][:3] == ["-m", "experiments.gpt", "--distributed"]  # no empty word
    assert machine("bash", LAUNCH / "tpu.sh", "gpt", "large", codes=(), POD="pod", ZONE="zone") != 0
    assert len(started(machine.calls)) == 3
    assert machine("bash", LAUNCH / "tpu.sh", "gpt", "large", codes=(2,), **given) == 2  # a wrong command
    assert len(started(machine.calls)) == 4


def test_kubernetes_starts_again_all_pods(machine, tmp_path):
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job = spec["spec"]["replicatedJobs"][0]
    pods, template = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = template["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["PROCESSES"]) == pods["completions"] == pods["parallelism"]
    # JobSet's name of a pod: <set>-<job>-<replica>-<index>, in the subdomain <set>.
    name = spec["metadata"]["name"]
    assert variables["COORDINATOR"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert spec["spec"]["failurePolicy"]["maxRestarts"] == 20 and pods["backoffLimit"] == 0
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]

    command = [*container["command"], *container["args"]]
    given = variables | {"RUNS": tmp_path / "runs", "JOB_COMPLETION_INDEX": 1}
    assert machine(*command, codes=(134,), **given) == 134
    assert machine(*command, codes=(0,), **given) == 0
    first, second = started(machine.calls)
    words = f"--distributed --coordinator {variables['COORDINATOR']} --processes 2 --process 1 --name large"
    mesh = dict(pair.split("=") for pair in first[first.index("--mesh") + 1].split(","))
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(mesh["data"]) * int(mesh["fsdp"]) == pods["completions"] * gpus
    assert shlex.join(first).endswith(f"{words} --runs {tmp_path / 'runs'}")
    assert second == [*first, "--resume"]
