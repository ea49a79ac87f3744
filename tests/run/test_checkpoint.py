from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run.checkpoint import DROPPED, Checkpoints, Damaged, drop, reason


def tree(seed: int = 0):
    key = jax.random.key(seed)
    return {"w": jax.random.normal(key, (300, 40)), "half": jnp.ones(3, jnp.bfloat16), "key": key, "n": jnp.arange(4)}


def shapes():
    return jax.eval_shape(tree)


def files(folder):
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back(tmp_path):
    Checkpoints(tmp_path).save(7, tree(3), {"seconds": 1.5}, None)
    step, back, info = Checkpoints(tmp_path).newest(shapes(), print)
    assert step == 7 and info["seconds"] == 1.5
    jax.tree.map(np.testing.assert_array_equal, back | {"key": 0}, tree(3) | {"key": 0})
    assert (jax.random.key_data(back["key"]) == jax.random.key_data(tree(3)["key"])).all()


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "emptied"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(harm, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(step), {}, 1.0 / step)
    largest = files(tmp_path / "2")[-1]
    content = bytearray(largest.read_bytes())
    if harm == "cut":
        largest.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif harm == "emptied":  # as all files may be when the power fails
        for path in files(tmp_path / "2"):
            path.write_bytes(b"")
    else:
        largest.unlink()
    said = []
    step, back, _ = Checkpoints(tmp_path).newest(shapes(), said.append)
    assert step == 1
    np.testing.assert_array_equal(back["w"], tree(1)["w"])
    assert len(said) == 1 and said[0].startswith("the checkpoint of step 2 is damaged (")
    with pytest.raises(Damaged):
        Checkpoints(tmp_path).restore(2, shapes())


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, loss in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None), (6, None)]:
        checkpoints.save(step, tree(), {}, loss)
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2


def test_without_metrics_the_newest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() is None
    for step in (1, 2, 3):
        checkpoints.save(step, tree(), {}, None)
    assert checkpoints.steps() == [2, 3] and checkpoints.best() == 3


def test_raw_needs_no_shapes(tmp_path):
    Checkpoints(tmp_path).save(1, {"state": {"params": tree(1)}}, {}, None)
    back = Checkpoints(tmp_path, read_only=True).raw(1)
    np.testing.assert_array_equal(back["state"]["params"]["w"], tree(1)["w"])


def test_reasons_are_one_short_line():
    assert reason(OSError(28, "No space left on device", "/x/y")) == "No space left on device"
    assert "\n" not in reason(ValueError("a\nb" * 400)) and len(reason(ValueError("a\nb" * 400))) < 120


# --- what only the newest keeps -------------------------------------------------------------------


class Game(NamedTuple):
    params: Any
    replay: Any


class Kept(NamedTuple):
    state: Any


def playing(seed: int = 0):
    return Kept(
        {
            "learner": Game(
                jnp.arange(3.0) + seed,
                {"seen": jax.random.normal(jax.random.key(seed), (200, 50)), "key": jax.random.key(seed)},
            )
        }
    )


def assert_same(one, other):
    one, other = (tree._replace(state=plain(tree.state["learner"])) for tree in (one, other))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def plain(game):
    return game._replace(replay={**game.replay, "key": jax.random.key_data(game.replay["key"])})


def own(folder, **others):
    return Checkpoints(folder, newest_only=("learner.replay",), **others)


def test_the_newest_alone_keeps_what_only_it_needs(tmp_path):
    checkpoints = own(tmp_path)
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]:
        checkpoints.save(step, playing(step), {}, loss)
    sizes = {step: sum(path.stat().st_size for path in files(tmp_path / str(step))) for step in checkpoints.steps()}
    assert sizes.keys() == {1, 3, 4} and max(sizes[1], sizes[3]) < 200 * 50 < sizes[4]
    shapes = jax.eval_shape(playing)
    step, back, _ = own(tmp_path).newest(shapes, print)
    assert step == 4
    assert_same(back, playing(4))
    # Of the best the rest is that of a beginning, where that will do.
    back, _ = own(tmp_path, read_only=True).restore(1, shapes, lambda: playing(9))
    assert_same(back, Kept({"learner": Game(playing(1).state["learner"].params, playing(9).state["learner"].replay)}))
    np.testing.assert_array_equal(own(tmp_path).raw(1)["state"]["learner"]["params"], [1, 2, 3])
    with pytest.raises(Damaged, match="only the newest keeps learner.replay"):
        own(tmp_path).restore(1, shapes)


def test_without_the_newest_nothing_can_go_on(tmp_path):
    """What is left of the others is whole all the same."""
    checkpoints = own(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, playing(step), {}, None)
    files(tmp_path / "2" / "newest")[-1].write_bytes(b"")
    said = []
    assert own(tmp_path).newest(jax.eval_shape(playing), said.append) is None
    assert said == [
        f"the checkpoint of step 2 is damaged ({said[0].split('(')[1].split(')')[0]}); trying the one before it",
        "the run cannot go on from the checkpoint of step 1 (only the newest keeps learner.replay)",
    ]
    step, back, _ = own(tmp_path).newest(jax.eval_shape(playing), print, playing)
    assert step == 1 and float(back.state["learner"].params[0]) == 1


def test_all_may_keep_what_only_the_newest_needs(tmp_path):
    checkpoints = own(tmp_path, in_all=True)
    for step in (1, 2):
        checkpoints.save(step, playing(step), {}, None)
    files(tmp_path / "2" / "newest")[-1].write_bytes(b"")
    step, back, _ = own(tmp_path).newest(jax.eval_shape(playing), print)
    assert step == 1
    assert_same(back, playing(1))


@pytest.mark.parametrize("at", ["before", "renamed", "half"])
def test_killed_while_it_was_dropped(at, tmp_path, monkeypatch):
    checkpoints = own(tmp_path)
    checkpoints.save(1, playing(1), {}, None)
    with monkeypatch.context() as patch:
        if at == "before":
            patch.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            drop(tmp_path / "1")
    if at == "half":
        files(tmp_path / "1" / DROPPED)[0].unlink()
    back, _ = own(tmp_path).restore(1, jax.eval_shape(playing), lambda: playing(9))
    seen = playing(1 if at == "before" else 9).state["learner"].replay["seen"]
    np.testing.assert_array_equal(back.state["learner"].replay["seen"], seen)
    checkpoints.save(2, playing(2), {}, None)
    assert not (tmp_path / "1" / DROPPED).exists() and not (tmp_path / "1" / "newest").exists()
