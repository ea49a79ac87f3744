"""The planner's table, and its memory against what XLA:CPU plans for the same step."""

from __future__ import annotations

import json

import pytest

from benchmarks import plan
from benchmarks.plan import MODELS, compared, compiled, lines, parsed
from benchmarks.planning import Job, Mesh, Model, memory, ranked
from jaxarch.run.machines import MACHINES
from jaxarch.run.protocol import ConfigError

# Model and job, in float32: what XLA:CPU computes in.
PLANNED = {
    "gpt2": (MODELS["gpt2"], Job(1024, 32, compute=4)),
    "wide": (Model(8, 1024, 16, 16, 64, 2816, 32000), Job(512, 64, compute=4)),
    "long": (Model(6, 512, 8, 4, 64, 1536, 32000), Job(4096, 16, compute=4)),
    "llama-1b": (MODELS["llama-1b"], Job(2048, 16, "full", compute=4)),
    "llama-8b": (MODELS["llama-8b"], Job(4096, 16, "full", compute=4)),
}
MESHES = [Mesh(data=8), Mesh(fsdp=8), Mesh(fsdp=2, tensor=4), Mesh(fsdp=4, context=2)]


def check_planned(name, mesh):
    model, job = PLANNED[name]
    analysis = compiled(model, job, mesh)[1].memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert memory(model, job, mesh, cpu=True).total == pytest.approx(held, rel=0.1), (name, mesh)


@pytest.mark.devices(8)
def test_memory_is_as_planned():
    check_planned("wide", Mesh(data=8))
    check_planned("llama-8b", Mesh(fsdp=8))


@pytest.mark.slow
@pytest.mark.devices(8)
def test_memory_of_five_models_on_four_meshes():
    for mesh in MESHES:
        for name in PLANNED:
            check_planned(name, mesh)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plan", *map(str, arguments)])
    try:
        plan.main()
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_as_a_whole(tmp_path, monkeypatch, capsys):
    arguments = ("--model", "gpt2", "--devices", 4, "--length", 1024, "--global-batch", 8, "--output", tmp_path)
    assert run(monkeypatch, *arguments, "--top", 2, "--mesh", "tensor=4") == 0
    records = json.loads((tmp_path / "plan-gpt2-h100-4.json").read_text())["records"]
    job = Job(1024, 8, "full")
    found = ranked(MODELS["gpt2"], job, MACHINES["h100"], 4)
    assert [record["mesh"] for record in records] == [each.mesh._asdict() for each in found]
    assert records[0]["mfu"] == found[0].mfu and records[0]["bytes"]["total"] == found[0].memory.total
    printed = capsys.readouterr().out.splitlines()
    # A head, two meshes and the one that is asked for, what the numbers are, where they are written.
    assert len(printed) == 1 + 3 + 2 and printed[3].split()[0] == "tensor=4"
    assert printed[1].split()[0] == plan.shown(found[0].mesh)


def test_what_does_not_fit_is_said():
    found = ranked(MODELS["llama-8b"], Job(8192, 8), MACHINES["v5e"], 8)
    said = lines(found, plan.Arguments("v5e"))
    assert not found[0].fits and "does not fit 16 GB" in said[1]


def test_beside_the_compiler():
    """Of a program that sent and held half as much as planned, and a collective that is in no plan."""
    model, job, mesh = Model(2, 8, 4, 2, 2, 16, 32), Job(16, 8, compute=4), Mesh(fsdp=2)
    planned = memory(model, job, mesh, cpu=True)
    state = planned.parameters + planned.optimizer
    sent = [
        {"kind": "all-gather", "axes": ["fsdp"], "bytes": 4 * 1664 / 2},
        {"kind": "all-to-all", "axes": ["fsdp"], "bytes": 1e9},
    ]
    found = {"arguments": state, "temporaries": (planned.total - state) / 2, "sent": sent, "seconds": 1.0}
    said = {line[:32].strip(): line[32:].split() for line in compared(model, job, mesh, found)[2:]}
    assert said["arguments"][2] == "+0.0" and said["temporaries"][2] == "+100.0"
    assert said["all-gather fsdp"][2] == "+100.0"
    assert said["all-to-all fsdp"] == ["1.000", "0.000", "-100.0", "%", "0.000"]
    assert "reduce-scatter fsdp" in said


def test_usage(monkeypatch, capsys, tmp_path):
    assert parsed("fsdp=4,tensor=2", 8) == Mesh(fsdp=4, tensor=2)
    for text, message in (
        ("fsdp=4", "of 4 devices, not of --devices 8"),
        ("rows=8", "no axis 'rows'"),
        ("replica=8", "of one member"),
    ):
        with pytest.raises(ConfigError, match=message):
            parsed(text, 8)
    assert run(monkeypatch, "--machine", "v5e", "--precision", "f32", "--output", tmp_path) == 2
    assert "no rate is published for v5e" in capsys.readouterr().err
    assert run(monkeypatch, "--devices", 7, "--output", tmp_path) == 2
    assert "--devices 7: no mesh divides" in capsys.readouterr().err
    wrong = ("--model", "gpt2", "--devices", 8, "--global-batch", 16, "--mesh", "tensor=8", "--check")
    assert run(monkeypatch, *wrong, "--output", tmp_path) == 2  # before it is compiled
    assert "--mesh tensor=8 does not divide gpt2 and the batch evenly." in capsys.readouterr().err
