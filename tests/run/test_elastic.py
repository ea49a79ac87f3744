from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from jaxarch.run.__main__ import main as evaluate_main
from jaxarch.run.collectives import axes, collectives
from jaxarch.run.command import first_batch
from jaxarch.run.loop import batches
from jaxarch.run.mesh import make_mesh, parse
from jaxarch.run.metrics import divide
from jaxarch.run.program import Carry, Programs, members
from jaxarch.transformer.generate import main as generate_main
from tests.run.running import arrays, log, run
from tests.run.several import MESH, several
from tests.run.sketches import network

OFTEN = ("--eval-every", 4, "--checkpoint-every", 4)


def assert_close(one, other, tolerance=1e-5):
    """The same curve and the same end, up to the order of sums; said by which run differs."""
    curve, wanted = log(one), log(other)
    assert [line.keys() for line in curve] == [line.keys() for line in wanted]
    for line, expected in zip(curve, wanted, strict=True):
        for name in line:
            np.testing.assert_allclose(line[name], expected[name], rtol=tolerance, err_msg=f"{one} {name}")
    for name, leaf in arrays(one).items():
        np.testing.assert_allclose(leaf, arrays(other)[name], rtol=1e-4, atol=1e-6, err_msg=f"{one} {name}")


def cut(folder, name):
    """A copy of a finished run as it was at step 8; the options with which it is gone on with."""
    copy = folder.parents[1].parent / name / "network" / "a"
    shutil.copytree(folder, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "12")
    return copy, ("--resume",)


@pytest.mark.devices(8)
def test_saved_on_some_devices_gone_on_with_on_others(tmp_path):
    ended = several("--name", "a", "--runs", tmp_path / "2x4", *MESH, *OFTEN)
    assert [process.code for process in ended] == [0, 0], ended
    eight = run(network, tmp_path / "1x8", *MESH, *OFTEN)
    one = run(network, tmp_path / "1", *OFTEN)
    two = tmp_path / "2x4" / "network" / "a"
    assert_close(two, eight)  # not bit for bit: between processes sums are in another order
    assert_close(eight, one)

    for saved, mesh in [(two, MESH[1]), (two, ""), (eight, "fsdp=4")]:
        copy, resume = cut(saved, f"{saved.parents[1].name} on {mesh or 'one'}")
        run(network, copy.parents[1], *resume, *(["--mesh", mesh] if mesh else []))
        assert_close(copy, saved)
    copy, resume = cut(one, "1 on 2x4")
    ended = several("--name", "a", "--runs", copy.parents[1], *resume, *MESH)
    assert [process.code for process in ended] == [0, 0], ended
    assert "from step 8 to step 12" in ended[0].out
    assert_close(copy, one)


def after(mesh, which, steps):
    """The metrics of the members after some steps, and their parameters. On a mesh all but the first step are one
    dispatch; each device has its members alone, and tells the others no more of them than those metrics.
    """
    experiment = network.experiment(network.Config(batch_size=8))
    programs = Programs(experiment, which, make_mesh(parse(mesh)) if mesh else None)
    carry = Carry(programs.init(), programs.sums(first_batch(experiment)))
    for index, count in [(0, 1), (1, steps - 1)] if mesh else [(index, 1) for index in range(steps)]:
        carry = programs.steps(carry, programs.on_mesh(batches(experiment, index, count), 0), index)
    if mesh:
        cut, own = programs.mesh.shape, carry.state.params["a"].addressable_data(0).shape
        assert own == (len(which) // cut["replica"], 64 // cut.get("fsdp", 1), 64)
        found = collectives(programs.compiled_step(first_batch(experiment)).as_text())
        assert [one for one in found if "replica" in axes(one, cut) and one.bytes > 200] == []
    return divide(carry.sums)["train/loss"], np.asarray(carry.state.params["a"])


@pytest.mark.devices(8)
def test_members_over_devices_are_solo_runs():
    with jax.enable_x64(True):
        hypers = network.Hypers()
        eight, swept = members(hypers, (), 3, 8), members(hypers, ("learning_rate=0.05,0.2",), 3, 2)
        chosen = {7: eight, 1: swept, 2: swept}
        solo = {number: after("", [which[number]], 3) for number, which in chosen.items()}
        found = {"replica=8": eight, "replica=2,data=2,fsdp=2": swept}
        for mesh, which in found.items():
            losses, params = after(mesh, which, 3)
            assert params.dtype == np.float64
            for number in (number for number, among in chosen.items() if among is which):
                loss, own = solo[number]
                np.testing.assert_allclose(losses[number], loss[0], rtol=1e-9, err_msg=mesh)
                np.testing.assert_allclose(params[number], own, rtol=1e-9, atol=1e-12, err_msg=mesh)


def said_by(capsys, main, *arguments):
    """What a command prints."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["program", *map(str, arguments)])
        main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_gpt_of_two_processes_is_one_of_eight_devices_and_is_used_on_one(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{n} the quick brown fox jumps over the lazy dog" for n in range(1000)))
    model = ("--model.layers", 1, "--model.dim", 32, "--model.heads", 2)
    short = ("--steps", 10, "--batch-size", 16, "--length", 16, "--eval-tokens", 2000, "--eval-every", 5)
    gpt, mesh = ("-m", "experiments.gpt"), ("--mesh", "data=2,fsdp=4")
    folders = []
    for name, count, devices, cut in [("2x4", 2, 4, mesh), ("1x8", 1, 8, mesh), ("1", 1, 1, ())]:
        options = ("--name", name, "--runs", tmp_path, "--data", text, *short, *model, *cut)
        ended = several(*options, prefix=gpt, count=count, devices=devices)
        assert all(process.code == 0 for process in ended), ended
        folders.append(tmp_path / "gpt" / name)
    two, eight, one = map(log, folders)
    for other in (two, eight):
        for line, expected in zip(other, one, strict=True):
            for name in line:
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-5, err_msg=name)
    values = said_by(capsys, evaluate_main, "evaluate", folders[0])
    assert f"step 10  val/loss {two[-1]['val/loss']:.4g}" in values
    written = said_by(capsys, generate_main, folders[0], "--prompt", "the", "--tokens", 8)
    assert "the" in written
