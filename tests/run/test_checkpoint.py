from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.run.checkpoint import Checkpoints, Damaged, reason


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
