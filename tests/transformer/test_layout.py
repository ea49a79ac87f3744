"""What a GPT's training step sends and holds on a mesh, read from the compiled program, against a closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from benchmarks.plan import compiled, named, sent
from benchmarks.planning import Job, Mesh, Model, transfers
from jaxarch.run.collectives import collectives
from jaxarch.run.explain import held
from jaxarch.run.mesh import make_mesh, ruled
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.layout import LAYOUT, micro_batches

GELU = Model(layers=2, dim=128, heads=4, kv_heads=4, head_dim=32, hidden=256, vocab=256, gated=False, tied=True)
SWIGLU = Model(layers=2, dim=128, heads=4, kv_heads=4, head_dim=32, hidden=384, vocab=256)
JOB = Job(length=64, batch=16, compute=4)


def check_sent(model, job, mesh):
    """All that is sent has a name, and is as many bytes; in a compiled program of `model`, which is returned."""
    programs, step = compiled(model, job, mesh)
    found, wanted = sent(step.as_text(), mesh), named(transfers(model, job, mesh, cpu=True))
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, rel=0.05)
    return programs, step


def check_held(programs, step, parts):
    """Parameters and optimiser, by their shardings and by what the program takes (the batch among it)."""
    arrays = held(programs.state_shape)
    own, whole = sum(array.own for array in arrays), sum(array.whole for array in arrays)
    assert own <= whole * (1 / parts + 0.02)
    batch = 3 * 4 * JOB.batch * JOB.length / parts
    assert step.memory_analysis().argument_size_in_bytes - batch <= whole * (1 / parts + 0.02)


@pytest.mark.devices(8)
def test_what_is_sent_has_a_name():
    check_sent(GELU, JOB, Mesh(data=8))
    check_held(*check_sent(SWIGLU, JOB._replace(remat="full"), Mesh(fsdp=8)), 8)
    check_sent(GELU, JOB, Mesh(tensor=4))
    check_sent(SWIGLU, JOB._replace(remat="full"), Mesh(tensor=4))
    check_sent(SWIGLU._replace(kv_heads=2), JOB._replace(compute=2), Mesh(context=4))
    check_sent(GELU, JOB._replace(compute=2), Mesh(data=2, fsdp=2, tensor=2))
    check_sent(SWIGLU, JOB, Mesh(data=2, context=2, tensor=2))


@pytest.mark.devices(8)
def test_a_long_sequence_is_a_sixth_of_its_memory_on_eight_devices():
    """65,536 positions: a device has an eighth, and keys and values of another besides."""
    job = Job(length=65536, batch=1, remat="full", compute=4)
    temporaries = [
        compiled(GELU, job, mesh)[1].memory_analysis().temp_size_in_bytes for mesh in (Mesh(), Mesh(context=8))
    ]
    assert temporaries[1] <= temporaries[0] / 6


@pytest.mark.devices(8)
def test_micro_batches_are_cut_where_they_lie():
    mesh = make_mesh({"fsdp": 4, "context": 2})
    lies = jax.NamedSharding(mesh, jax.P("fsdp", "context"))
    tokens, labels = jnp.arange(128).reshape(16, 8), jnp.arange(16)
    with jax.set_mesh(mesh):
        given = jax.device_put(tokens, lies), jax.device_put(labels, jax.NamedSharding(mesh, jax.P("fsdp")))
        step = jax.jit(lambda batch: micro_batches(batch, 2)).lower(given).compile()
        found = step(given)
        with pytest.raises(ConfigError, match="--mesh fsdp=4 does not divide the 6 examples .* --batch-size 8 would"):
            jax.eval_shape(lambda batch: micro_batches(batch, 2), jnp.zeros(12))
    assert collectives(step.as_text()) == []
    assert found[0].sharding.shard_shape(found[0].shape) == (2, 2, 4)
    assert sorted(found[1].ravel().tolist()) == labels.tolist()
    assert (found[0][:, :, 0] == 8 * found[1]).all()


def test_the_readout_is_cut_by_the_vocabulary():
    """Not by its rows, as what is called `out` is: the logits would be added and gathered."""
    mesh = AbstractMesh((4,), ("tensor",))
    assert ruled("params.readout.kernel", (8, 32), LAYOUT, mesh) == [None, "tensor"]
    assert ruled("params.layers_0.attention.out.kernel", (8, 8), LAYOUT, mesh) == ["tensor", None]
    assert ruled("params.layers.feed_forward.down.kernel", (2, 8, 8), LAYOUT, mesh) == [None, "tensor", None]
