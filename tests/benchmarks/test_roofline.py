"""What the records say, on some made by hand; and once as a whole, small."""

from __future__ import annotations

import json

import pytest

from benchmarks import roofline
from benchmarks.roofline import record, roofs
from jaxarch.run import peaks


def exit_code(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["roofline", *map(str, arguments)])
    try:
        roofline.main()
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_the_ridge_is_where_the_bounds_meet():
    records = [
        record("float32", 10, 2000, 1200, [2.0, 1.0, 4.0]),
        record("float32", 20, 16000, 4800, [10.0]),
        record("bfloat16", 10, 2000, 600, [0.25]),
        record("stream", 7, 100, 800, [3.0, 2.0]),
    ]
    assert records[0]["rate"] == 1000 and records[1]["intensity"] == pytest.approx(10 / 3)
    single, half = roofs(records)
    assert single["implementation"] == "float32" and half["implementation"] == "bfloat16"
    assert (single["flops"], single["bandwidth"], single["ridge"]) == (2000, 400, 5)
    assert (half["flops"], half["bandwidth"], half["ridge"]) == (8000, 400, 20)


def test_as_a_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXARCH_CACHE", str(tmp_path))
    assert exit_code(monkeypatch, "--sizes", 16, 64, "--repeats", 2, "--output", tmp_path) == 0
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert set(content) == {"environment", "records", "fits"}
    assert [(r["implementation"], r["length"]) for r in content["records"][:-1]] == [
        ("float32", 16), ("bfloat16", 16), ("float32", 64), ("bfloat16", 64),
    ]  # fmt: skip
    for r in content["records"]:
        assert 0 < r["seconds"]["q25"] <= r["seconds"]["median"] <= r["seconds"]["q75"]
    assert content["records"][0]["flops"] == 8192 and content["records"][0]["bytes"] == 3072
    assert content["records"][1]["bytes"] == 1536
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    # What it found is what runs are held against.
    single, half = content["fits"]
    assert peaks.flops("float32") == single["flops"] and peaks.flops("bfloat16") == half["flops"]
    assert peaks.bandwidth() == single["bandwidth"]
    assert "bound by operations from" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", 0, 8], "roofline: --sizes 0 is below 1."),
        (["--repeats", 0], "roofline: --repeats 0 is below 1."),
        (["--dtypes", "int8"], "roofline: "),
        (["--sizes", "many"], "roofline: "),
    ],
)
def test_usage(arguments, message, monkeypatch, capsys):
    assert exit_code(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1
