"""The profiler's reading of its cells, on records made by hand; and once as a whole."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.attention import CONFIGS, Arguments, attention_of, cells, measure_all, predicted, work
from benchmarks.attention_answers import (
    answers,
    compared,
    earlier,
    fits,
    longest,
    meetings,
    shares,
    signs,
    table,
    validated,
    where,
)
from benchmarks.attention_cell import configured
from benchmarks.measuring import quartiles
from jaxarch.run.protocol import ConfigError

LENGTHS = [512, 1024, 2048, 4096, 8192]
ARGUMENTS = Arguments(implementations=("dense",), lengths=tuple(LENGTHS), passes="forward", causal=False)


def record(name, length, seconds, peak=2**20):
    """One that was measured seven times within 1 %."""
    samples = list(seconds * np.linspace(0.995, 1.005, 7))
    return {
        "implementation": name, "pass": "forward", "length": length, "samples": samples, "flops": 10**9,
        "seconds": quartiles(samples), "peak_bytes": peak, "predicted_bytes": None, "invalid": False,
        "batch": 1, "heads": 8, "kv_heads": 8, "dim": 64, "dtype": "float32", "causal": False, "window": None,
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
    expected = "dense, forward: exponent 2.00 [2.00, 2.00], 2.00 between the last two lengths; "
    assert line.startswith(expected)
    assert f"longest in 2 GiB: {2 * 2**30 / 1000:,.0f}" in line
    assert "above its projections from 1,000 (by operations 1,024)" in line
    assert "above the layer's other products from 4,000 (by operations 3,072)" in line
    assert fastest == "fastest exact one, forward: 512 dense, 1,024 dense, 2,048 dense, 4,096 dense, 8,192 dense"


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
    found = fits(records, 0.0)
    assert "512" not in answers(ARGUMENTS, found, records)[-1]
    assert [len(fit["slopes"]) for fit in found if fit["implementation"] == "dense"] == [3, 3]
    assert [row.count("INVALID") for row in table(records)] == [0, 1, 0, 0]


def test_a_rate_a_quarter_above_the_machines_is_allowed_for():
    """By the median: 1.249 and 1.251 lie within the noise of each other."""
    records = [record("dense", 512, 1.0) | {"flops": rate} for rate in (1.249e13, 1.251e13)]
    validated(records, peak=1e13)
    assert [r["invalid"] for r in records] == [False, True]


def test_what_a_call_costs_that_does_nothing_is_taken_off_its_seconds():
    records = [record("dense", n, 1e-9 * n**2 + 1e-5, 1000 * n) for n in LENGTHS]
    seconds, memory = fits(records, idle=1e-5)
    assert seconds["exponent"] == pytest.approx(2) and memory["exponent"] == pytest.approx(1)


def test_no_operations_are_told_where_they_are_not_those_of_the_crossover():
    """That of a layer whose keys are all seen, with as many heads of keys and a feed-forward layer of four widths."""
    records = planted()
    for options in ({"window": 64}, {"kv_heads": 2}, {"hidden": 64}):
        assert "by operations" not in answers(dataclasses.replace(ARGUMENTS, **options), fits(records, 0.0), records)[0]


def test_the_fastest_of_several_is_named():
    records = [record("dense", 512, 2.0), record("blockwise", 512, 1.0), record("jax_nn", 512, 3.0)]
    assert answers(ARGUMENTS, [], records) == ["fastest exact one, forward: 512 blockwise"]


@pytest.mark.parametrize(
    "coefficients, place",
    [
        ((-4, 0, 1), "from 2"), ((-6, 1, 1), "from 2"), ((-10, 2, 0), "from 5"), ((1, 1, 1), "everywhere"),
        ((-1, -2, 0), "nowhere"), ((-10, 2, -1), "nowhere"), ((0, 3, -1), "up to 3"), ((1, 0, 0), "everywhere"),
        ((5, 2, 0), "everywhere"), ((-2, 3, -1), "from 1 up to 2"), ((2, -3, 1), "up to 1 and from 2"),
        ((0, 0, 0), "nowhere"),
    ],
)  # fmt: skip
def test_roots_by_hand(coefficients, place):
    assert where(*signs(*map(float, coefficients))) == place


def test_work_is_that_of_the_task():
    cell = cells(Arguments(lengths=(8,), heads=2, dim=4))
    by = {(c.implementation, pass_): work(c, pass_) for c in cell for pass_ in c.passes}
    assert by["dense", "forward"] == 2 * 2 * 36 * 8  # 36 pairs, widths 4 + 4
    assert by["dense", "forward_backward"] == 3 * by["dense", "forward"]
    assert by["projections", "forward"] == 2 * 8 * 4 * 64 and by["layer", "forward"] == 2 * 8 * 12 * 64


def test_work_of_decoding_of_windows_and_of_states():
    """Two heads of width 4 over 8 positions; a state has 4 x 4 numbers, and each of them is made and read."""
    asked = Arguments(lengths=(8,), heads=2, dim=4, passes="all", implementations=("dense", "linear"))

    def by_name(arguments):
        return {(c.implementation, pass_): work(c, pass_) for c in cells(arguments) for pass_ in c.passes}

    by, windowed = by_name(asked), by_name(dataclasses.replace(asked, window=3))
    assert by["dense", "decode"] == 2 * 2 * 8 * 8  # 8 pairs, widths 4 + 4
    assert windowed["dense", "decode"] == 2 * 2 * 3 * 8 and windowed["dense", "forward"] == 2 * 2 * 21 * 8
    assert by["linear", "decode"] == 4 * 2 * 16 and by["linear", "forward"] == 8 * by["linear", "decode"]
    for name in ("linear", "projections", "layer"):
        assert by[name, "forward"] == 8 * by[name, "decode"]
        assert by[name, "forward_backward"] == 3 * by[name, "forward"]


def test_memory_is_predicted_by_hand():
    """Four arrays of 64 numbers, and 2 x 64 weights twice in float32; while decoding there is no formula."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        asked = Arguments(lengths=(8,), heads=2, dim=4, dtype=dtype, implementations=("dense", "jax_nn", "linear"))
        by = {c.implementation: (predicted(c, "forward"), predicted(c, "decode")) for c in cells(asked)}
        assert by["dense"] == by["jax_nn"] == (4 * 64 * size + 2 * 2 * 64 * 4, None)
        assert by["linear"] == by["layer"] == (None, None)


def test_which_cells_there_are(monkeypatch):
    """The rest of a layer at the three greatest lengths; what is for whole sequences does not decode."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # PyTorch is installed
    asked = Arguments(
        lengths=tuple(LENGTHS), passes="all", window=64, implementations=("blocks", "dense", "torch_sdpa")
    )
    by = {(c.implementation, c.length): c.passes for c in cells(asked)}
    assert {name for name, _ in by} == {"blocks", "dense", "projections", "layer"}, "PyTorch has no window"
    assert [n for name, n in by if name == "layer"] == LENGTHS[-3:] == [n for name, n in by if name == "projections"]
    assert by["blocks", 512] == ("forward", "forward_backward") and by["dense", 512][0] == "decode"
    assert not [c for c in cells(dataclasses.replace(asked, passes="decode")) if c.implementation == "blocks"]
    assert "torch_sdpa" in {c.implementation for c in cells(dataclasses.replace(asked, window=0))}


def test_a_slower_cell_is_named(tmp_path):
    assert compared(planted(), planted()) == []
    slow = planted()
    slow[3] = record("dense", 1024, 2e-9 * 1024**2)
    assert compared(slow, planted()) == ["dense, forward, 1024: 2.00 times the seconds"]
    # The quartiles lie a quarter of a per cent from the median: a tenth lies between them from 1.106 on.
    for times, said in ((1.1, []), (1.11, ["dense, forward, 1024: 1.11 times the seconds"])):
        slow[3] = record("dense", 1024, times * 1e-9 * 1024**2)
        assert compared(slow, planted()) == said
    slow[3]["seconds"] = None
    assert compared(slow, planted()) == ["dense, forward, 1024: failed"]
    assert compared(planted(), slow) == []
    with pytest.raises(ConfigError, match="no cell of this run's"):
        compared([r | {"dtype": "bfloat16"} for r in planted()], planted())


def test_what_is_compared_must_be_ours(tmp_path):
    old = tmp_path / "attention.json"
    old.write_text(json.dumps({"records": planted()}))
    assert earlier(old) == planted()
    for text in ("[]", "{", '{"records": []}', '{"records": [{"length": 1}]}'):
        old.write_text(text)
        with pytest.raises(ConfigError, match="is not what this benchmark writes"):
            earlier(old)
    with pytest.raises(ConfigError, match="this run would write there"):
        Arguments(compare=old, output=tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"implementations": ("flash",)}, "--implementations flash: there are blocks, blockwise, delta_rule"),
        ({"lengths": (0,)}, "--lengths must be 1"),
        ({"kv_heads": 3}, "--kv-heads 3 does not divide --heads 8"),
        ({"repeats": 0}, "--repeats 0 is below 1"),
        ({"kv_heads": -2}, "--kv-heads -2 is below 0"),
        ({"gibibytes": 0.0}, "--gibibytes 0 is not above 0"),
        ({"implementations": ("window",)}, "window needs --window"),
        ({"implementations": ("blocks",), "causal": False}, "blocks is for --causal True"),
        ({"implementations": ("ring",), "devices": 3}, "over --devices 3: give --lengths that 6 divides"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Arguments(**options)


def test_known_models_have_their_published_operations():
    """Of a layer: GPT-2's has 7.08 million weights in its products, Llama 3's of 8 billion 218.1 million."""
    for name, weights in {"gpt2": 7_077_888, "vit-b": 7_077_888, "llama3-8b": 218_103_808}.items():
        layer = [c for c in cells(Arguments(**CONFIGS[name])) if c.implementation == "layer"]
        assert {work(c, "forward") / c.length for c in layer} == {2 * weights}


def test_what_does_not_fit_or_is_late_is_said_and_left_out(capsys):
    arguments = Arguments(implementations=("dense",), lengths=(65536,), passes="forward", budget=1e-9)
    todo = [c for c in cells(arguments) if c.implementation == "dense"]
    assert predicted(todo[0], "forward") > 2 * 8 * 65536**2 * 4
    assert measure_all(arguments, todo) == []
    assert "dense, forward, 65,536: left out, would take 256.5 GiB; see --gibibytes" in capsys.readouterr().out
    small = cells(dataclasses.replace(arguments, lengths=(64,)))
    assert measure_all(arguments, small) == []
    assert "3 cells were not begun within --budget 1e-09" in capsys.readouterr().out


def test_the_passes_that_fit_are_measured_and_there_need_be_no_budget(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr("benchmarks.attention.measured", lambda cell: begun.append(cell.passes) or [])
    arguments = dataclasses.replace(ARGUMENTS, lengths=(512,), passes="both")
    one = cells(arguments)[0]
    between = (predicted(one, "forward") + predicted(one, "forward_backward")) / 2 / 2**30
    measure_all(dataclasses.replace(arguments, gibibytes=between), [one])
    assert begun == [("forward",)]
    assert capsys.readouterr().out.startswith("dense, forward_backward, 512: left out")


def test_the_longest_length_is_that_of_the_predicted_bytes():
    records = planted()
    assert longest(records, "dense", "forward", 1e6) == pytest.approx(1000)
    for r in records:
        r["predicted_bytes"] = r["length"] ** 2 // 4
    assert longest(records, "dense", "forward", 1e6) == pytest.approx(2000)
    assert meetings((0.0, 0.0, 1e-9), (0.0, 1e-6, 0.0)) == ([pytest.approx(1000)], [False, True])


@pytest.mark.parametrize("options", ["--model.layers 2", "--model.layers 1 --optim.accumulate 2"])
def test_the_share_of_a_step_is_that_which_was_planted(options):
    """Of two layers, or of one twice, each 1e-9 n^2 s; the step takes 1e-5 n s beside them: half of it at 5,000."""
    records = []
    for n in LENGTHS:
        records += [record("step", n, 1e-5 * n + 2e-9 * n**2), record("auto", n, 1e-9 * n**2)]
    for r in records:
        r["pass"] = "forward_backward"
    _, config = configured(f"experiments.gpt {options}")
    *lines, last = shares(ARGUMENTS, config, fits(records, 0.0), records)
    assert lines[0].startswith("512: attention takes 9 % of the step's 5.6 ms")
    assert f"half of the step from 5,000 (by operations it passes its projections at {2 * config.model.dim}, " in last


def test_the_attention_of_an_experiment_has_its_shapes():
    options = "--batch-size 6 --optim.accumulate 2 --model.dim 32 --model.heads 4 --model.kv-heads 2 --precision bf16"
    own = attention_of(Arguments(experiment=f"experiments.gpt {options}"))
    assert (own.batch, own.heads, own.kv_heads, own.dim, own.dtype, own.causal) == (3, 4, 2, 8, "bfloat16", True)
    assert attention_of(Arguments(experiment=f"experiments.gpt {options} --model.head-width 12")).dim == 12


@pytest.mark.parametrize(
    "experiment, message",
    [
        ("experiments.nothing", "there is no such module"),
        ("json", "it is no experiment"),
        ("experiments.gpt '", "in matching quotes"),
        (" ", "say a module and its options"),
        ("tests.run.sketches.line", "it has no attention"),
        ("experiments.gpt --model.layer 2", "did you mean --model.layers"),
    ],
)
def test_an_experiment_that_cannot_be_profiled_is_refused(experiment, message):
    with pytest.raises(ConfigError, match=message):
        configured(experiment)


@pytest.mark.slow
def test_an_experiment_as_a_whole(tmp_path):
    command = [sys.executable, "-m", "benchmarks.attention", "--output", str(tmp_path), "--lengths", "16", "32", "64"]
    command += ["--experiment", "experiments.gpt --model.layers 1 --model.dim 32 --batch-size 2", "--repeats", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "64: attention takes " in done.stdout


@pytest.mark.slow
def test_as_a_whole(tmp_path):
    command = [sys.executable, "-m", "benchmarks.attention", "--output", str(tmp_path), "--heads", "2", "--dim", "16"]
    command += ["--lengths", "37", "64", "128", "--implementations", "dense", "blockwise", "--kv-heads", "1"]
    command += ["--passes", "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "attention.json").read_text())
    assert len(content["records"]) == 36 and all(r["seconds"]["median"] > 0 for r in content["records"])
    assert len((tmp_path / "attention.csv").read_text().splitlines()) == 37
    for quantity in ("seconds", "bytes"):
        assert (tmp_path / f"attention-{quantity}.png").stat().st_size > 10_000
