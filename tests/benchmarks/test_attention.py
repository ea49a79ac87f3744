"""The profiler's reading of its cells, on records made by hand; and once as a whole."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.attention import Arguments, answers, cells, compared, fits, largest, validated, work
from benchmarks.measuring import quartiles
from jaxarch.run.protocol import ConfigError

LENGTHS = [512, 1024, 2048, 4096, 8192]
ARGUMENTS = Arguments(implementations=("dense",), lengths=tuple(LENGTHS), passes="forward", causal=False)


def record(name, length, seconds, peak=2**20):
    """One that was measured seven times within 1 %."""
    samples = list(seconds * np.linspace(0.995, 1.005, 7))
    return {
        "implementation": name, "pass": "forward", "length": length, "samples": samples, "flops": 10**9,
        "seconds": quartiles(samples), "peak_bytes": peak, "invalid": False,
    }  # fmt: skip


def planted():
    """Attention of 1e-9 n^2 s and 1e3 n B; projections of 1e-6 n s meet it at 1,000, the layer of 4e-6 n at 4,000."""
    out = []
    for n in LENGTHS:
        out.append(record("dense", n, 1e-9 * n**2, 1000 * n))
        out += [record("projections", n, 1e-6 * n), record("layer", n, 4e-6 * n)]
    return out


def test_answers_are_those_that_were_planted():
    records = planted()
    found = fits(records, idle=0.0)
    line, fastest = answers(ARGUMENTS, found, records)
    assert line.startswith("dense, forward: exponent 2.00 [2.00, 2.00]; of memory 1.00 [1.00, 1.00]; ")
    assert f"longest in 2 GiB: {2 * 2**30 / 1000:,.0f}" in line
    assert "above its projections from 1,000 (by operations 1,024)" in line
    assert "above the rest of the layer from 4,000 (by operations 3,072)" in line
    assert fastest == "fastest, forward: 512 dense, 1,024 dense, 2,048 dense, 4,096 dense, 8,192 dense"


def test_a_cell_whose_memory_is_not_known_still_has_its_time():
    records = planted()
    records[0]["peak_bytes"] = 0
    found = {fit["quantity"]: len(fit["slopes"]) for fit in fits(records, 0.0) if fit["implementation"] == "dense"}
    assert found == {"seconds": 4, "bytes": 3}


def test_a_rate_above_the_machines_is_invalid_and_left_out():
    records = planted()
    records[0]["flops"] = 10**15
    validated(records, peak=1e13)
    assert [r["invalid"] for r in records] == [True] + [False] * 14
    assert "512" not in answers(ARGUMENTS, fits(records, 0.0), records)[-1]


def test_the_fastest_of_several_is_named():
    records = [record("dense", 512, 2.0), record("blockwise", 512, 1.0), record("jax_nn", 512, 3.0)]
    assert answers(ARGUMENTS, [], records) == ["fastest, forward: 512 blockwise"]


@pytest.mark.parametrize(
    "coefficients, root", [((-4, 0, 1), 2), ((-6, 1, 1), 2), ((-10, 2, 0), 5), ((1, 1, 1), 0), ((-1, -2, 0), None)]
)
def test_roots_by_hand(coefficients, root):
    assert largest(*map(float, coefficients)) == root


def test_work_is_that_of_the_task():
    cell = cells(Arguments(lengths=(8,), heads=2, dim=4))
    by = {(c.implementation, c.pass_): work(c) for c in cell}
    assert by["dense", "forward"] == 2 * 2 * 36 * 8  # 36 pairs, widths 4 + 4
    assert by["dense", "forward_backward"] == 3.5 * by["dense", "forward"]
    assert by["projections", "forward"] == 2 * 8 * 4 * 64 and by["layer", "forward"] == 2 * 8 * 12 * 64


def test_a_slower_cell_is_named(tmp_path):
    old = tmp_path / "attention.json"
    old.write_text(json.dumps({"records": planted()}))
    assert compared(planted(), old) == []
    slow = planted()
    slow[3] = record("dense", 1024, 2e-9 * 1024**2)
    assert compared(slow, old) == ["dense, forward, 1024: 2.00 times the seconds"]
    old.write_text("[]")
    with pytest.raises(ConfigError, match="is not what this benchmark writes"):
        compared(slow, old)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"implementations": ("flash",)}, "--implementations flash: there are blocks, blockwise, dense"),
        ({"lengths": (0,)}, "--lengths must be 1"),
        ({"kv_heads": 3}, "--kv-heads 3 does not divide --heads 8"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Arguments(**options)


@pytest.mark.slow
def test_as_a_whole(tmp_path):
    command = [sys.executable, "-m", "benchmarks.attention", "--output", str(tmp_path), "--heads", "2", "--dim", "16"]
    command += ["--lengths", "37", "64", "128", "--implementations", "dense", "blockwise", "--kv-heads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "attention.json").read_text())
    assert len(content["records"]) == 24 and all(r["seconds"]["median"] > 0 for r in content["records"])
    assert len((tmp_path / "attention.csv").read_text().splitlines()) == 25
    for quantity in ("seconds", "bytes"):
        assert (tmp_path / f"attention-{quantity}.png").stat().st_size > 10_000
