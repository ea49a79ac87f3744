"""The benchmark of scaling: its arithmetic by hand, and a small run of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling
from benchmarks.scaling import Arguments, lines, scaled


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["scaling", *map(str, arguments)])
    try:
        scaling.main()
    except SystemExit as exit_:
        return exit_.code
    return 0


def stub(virtual):
    """A worker whose step takes a second on one device and three on two, and a quarter of a second at the peak."""

    class Worker:
        def __init__(self, family, n, axis, examples, precision, steps, devices):
            assert devices == n
            self.n, self.said = n, {"sent": {"all-reduce": 5e6}, "at_peak": 0.25, "virtual": virtual}

        def measure(self):
            return {1: 1.0, 2: 3.0}[self.n]

        def close(self):
            pass

    return Worker


@pytest.mark.parametrize(
    "virtual, kind, examples, efficiency, mfu",
    [
        (False, "weak", [8, 16], 1 / 3, 0.25 / 3 / 2),  # as long as one device's step would be ideal
        (True, "weak", [8, 16], 2 / 3, 0.25 / 3),  # twice the work on the same cores
        (False, "strong", [16, 16], 1 / 6, 0.25 / 3 / 2),  # half as long would be
        (True, "strong", [16, 16], 1 / 3, 0.25 / 3),
    ],
)
def test_efficiency(virtual, kind, examples, efficiency, mfu, monkeypatch):
    monkeypatch.setattr(scaling, "Worker", stub(virtual))
    one, two = scaled(Arguments(devices=(1, 2), rounds=2), "gpt", kind)
    assert [one["examples"], two["examples"]] == examples
    assert one["efficiency"] == {"median": 1, "q25": 1, "q75": 1} and one["mfu"] == 0.25
    assert two["efficiency"]["median"] == pytest.approx(efficiency) and two["mfu"] == pytest.approx(mfu)
    assert two["rate"] == pytest.approx(16 * 128 / 3) and two["unit"] == "tokens"
    said = lines([one, two])
    assert "all-reduce 5 MB" in said[2] and ("virtual" in said[-1]) == virtual


def test_what_a_mesh_of_one_device_costs(monkeypatch):
    """A step of 2 seconds takes 2.04 on it; those without it and with it are told apart by their meshes."""
    monkeypatch.setattr(scaling, "made", lambda family, examples, precision, sizes: (sizes, None))
    monkeypatch.setattr(scaling, "stepping", lambda sizes, batch, steps: lambda: 2.04 if sizes == {"fsdp": 1} else 2.0)
    found = scaling.overhead(Arguments(("gpt",), axis="fsdp", rounds=2), "gpt")
    assert (found["seconds"]["median"], found["without"]["median"]) == (2.04, 2.0)
    assert found["ratio"]["median"] == pytest.approx(1.02)
    assert "costs +2.0 %" in lines([found])[-1]


@pytest.mark.slow
def test_as_a_whole(tmp_path, monkeypatch, capsys):
    """Two workers, and a mesh of one device beside none."""
    small = ("--families", "gpt", "--devices", 1, 2, "--kinds", "weak", "mesh", "--examples", 1)
    assert run(monkeypatch, *small, "--steps", 1, "--rounds", 1, "--output", tmp_path) == 0
    one, two, mesh = json.loads((tmp_path / "scaling.json").read_text())["records"]
    assert (one["devices"], two["devices"], mesh["kind"]) == (1, 2, "mesh")
    assert one["sent"].get("all-reduce", 0) == 0 and two["virtual"]
    # All gradients of 2 layers of 12 x 256 x 256, a table of 256 x 256 twice, 5 norms; a sum of two sends it once.
    assert two["sent"]["all-reduce"] == pytest.approx(4 * (24 * 65536 + 2 * 65536 + 5 * 256), rel=1e-4)
    assert mesh["ratio"]["median"] == pytest.approx(mesh["seconds"]["median"] / mesh["without"]["median"])
    assert (tmp_path / "scaling.png").exists() and "a mesh of one device costs" in capsys.readouterr().out


def test_usage(monkeypatch, capsys):
    assert run(monkeypatch, "--families", "nothing") == 2
    assert "--families nothing is none; there are gpt, dcgan, ppo." in capsys.readouterr().err
    assert run(monkeypatch, "--axis", "fsdp") == 2
    assert "ppo can use data" in capsys.readouterr().err
    assert run(monkeypatch, "--devices", 2, 4) == 2
    assert "begin with 1" in capsys.readouterr().err
    assert run(monkeypatch, "--families", "dcgan", "--kinds", "mesh", "--precision", "bf16") == 2
    assert "gpt alone" in capsys.readouterr().err
    assert run(monkeypatch, "--examples", -1, "--kinds", "weak") == 2
    assert "--examples -1 is below 0." in capsys.readouterr().err
    assert run(monkeypatch, "--examples", 6) == 2
    assert "divided by --devices 1 2 4 8; 8 would do." in capsys.readouterr().err
    assert run(monkeypatch, "--families") == 2
