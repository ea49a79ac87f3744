"""Plans against figures by hand, compiled programs, and what real runs are published to have reached."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.planning import (
    Job,
    Mesh,
    Model,
    Transfer,
    forward_flops,
    memory,
    meshes,
    predict,
    ranked,
    transfer_seconds,
    transfers,
)
from jaxarch.attention import attention
from jaxarch.run.collectives import collectives, totals
from jaxarch.run.machines import MACHINES, Machine
from jaxarch.transformer import decoder

TINY = Model(layers=2, dim=8, heads=4, kv_heads=2, head_dim=2, hidden=16, vocab=32)
JOB = Job(length=16, batch=8)  # 128 tokens
LLAMA_8B = Model(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Model(80, 8192, 64, 8, 128, 28672, 128256)


def test_parameters():
    """Of a layer: 64 + 32 + 32 + 64 and three of 8 x 16; two tables of 32 x 8; five norms of 8."""
    assert TINY.matrices == 2 * (192 + 384) + 512 and TINY.parameters == TINY.matrices + 40
    assert TINY._replace(tied=True, gated=False).matrices == 2 * (192 + 256) + 256
    # The model cards of Meta-Llama-3.1-8B, -70B and -405B on Hugging Face: 8.03, 70.6 and 406 billion.
    llama_405b = Model(126, 16384, 128, 8, 128, 53248, 128256)
    assert [model.parameters for model in (LLAMA_8B, LLAMA_70B, llama_405b)] == pytest.approx(
        [8.03e9, 70.6e9, 406e9], rel=1e-3
    )


def test_operations():
    """128 tokens, 1,152 + 256 parameters that multiply; 136 visible pairs of 8 x 4 rows, two products of width 2."""
    assert forward_flops(TINY, JOB) == 2 * 128 * (1152 + 256) + 2 * (8 * 4 * 136 * 2 * 4)
    ours = decoder.ModelConfig(layers=2, heads=4, dim=8, kv_heads=2, mlp="swiglu", mlp_dim=16, tied=False)
    assert forward_flops(TINY, JOB) == decoder.forward_flops(ours, vocab=32, batch=8, length=16)
    machine = Machine({"bfloat16": 1e6}, 1e9, 1e12, 1e12, 8, 1e12)
    without, again = (predict(TINY, JOB._replace(remat=remat), Mesh(fsdp=8), machine) for remat in ("none", "full"))
    assert without.seconds[0] == pytest.approx(3 * 430080 / 8 / 1e6) and without.mfu == pytest.approx(1)
    assert again.seconds[0] == pytest.approx((4 * 430080 - 2 * 128 * 256) / 8 / 1e6)  # the read-out only once
    assert again.mfu == pytest.approx(3 * 430080 / (4 * 430080 - 2 * 128 * 256))


def test_memory():
    """Two of each of data, fsdp and tensor: 32 tokens, a half of each matrix over `tensor`, of which fsdp halves."""
    mesh = Mesh(data=2, fsdp=2, tensor=2)
    found = memory(TINY, JOB, mesh)
    stored = 4 * (1664 / 2 + 40) / 2
    assert found[:3] == (stored, stored, 2 * stored)
    # Of a token: 4 x 8 whole; queries, keys, values and output 8 + 4 + 4 + 8, and 3 x 16, halved; 2 log-sum-exps.
    layer = 32 * (2 * (32 + 36) + 4 * 2)
    assert found.activations == 2 * layer
    assert found.logits == 32 * 16 * (2 + 4 + 2 + 4)
    assert found.gathered == 2 * (1664 / 2 + 40)  # in bfloat16
    assert found.total == sum(found)
    full = memory(TINY, JOB._replace(remat="full"), mesh)
    assert full.gathered == 2 * (2 * 576 / 2)  # two layers; a table is smaller
    assert full.activations == 2 * 32 * 8 * 2 + layer  # what enters each layer, and one layer
    cut = memory(TINY, JOB._replace(remat="full", sequence=True), mesh)
    assert cut.activations == 2 * 32 * 4 * 2 + 32 * (2 * (16 + 36) + 4 * 2)
    assert memory(TINY, JOB, Mesh(context=2)).activations == memory(TINY, JOB, Mesh(data=2)).activations
    assert memory(TINY, JOB, Mesh(data=8)).parameters == 4 * TINY.parameters
    assert memory(TINY, JOB, Mesh(data=8)).gathered == 2 * 1704  # as bfloat16
    assert memory(TINY, JOB._replace(compute=4), Mesh(data=8)).gathered == 0
    wide = memory(TINY._replace(vocab=1024), JOB._replace(remat="full"), mesh)
    assert wide.gathered == 2 * (1024 * 8 / 2)


def test_memory_at_the_fullest_moment_on_a_cpu():
    """Two devices over fsdp, 64 tokens each: of the layers' 1,152 and each table's 256 numbers one has a half."""
    stored, own = 4 * 1704 / 2, 4 * (1152 / 2 + 256)
    # Of a token: 8 x 8 and 4 of the norms; 8 + 8 + 4 + 4 + 8 of attention, 6 x 16, and 4 x (1 + (16 + 64) / 2) weights.
    layer, gathered = 4 * 64 * (68 + 32 + 96 + 164), 4 * 2 * 256
    # When the logits have gradients: the last norm's five arrays, the logits twice, all layers and a table once more.
    at_readout = 2 * layer + 4 * 64 * 5 * 8, 2 * 4 * 64 * 32, gathered + 4 * 1152 + 4 * 256
    assert memory(TINY, JOB, Mesh(fsdp=2), cpu=True) == (stored, own, 2 * stored, *at_readout)
    # When the last layer is made again: what enters each layer, that layer and three of 16 and five of 8 gradients.
    at_layer = 2 * 4 * 64 * 8 + layer + 4 * 64 * (3 * 16 + 5 * 8), 0, gathered + 4 * 576
    assert memory(TINY, JOB._replace(remat="full"), Mesh(fsdp=2), cpu=True) == (stored, own, 2 * stored, *at_layer)
    # With a single token: when the gradients are divided.
    assert memory(TINY, Job(1, 1), Mesh(), cpu=True) == (4 * 1704, 2 * 4 * 1704, 2 * 4 * 1704, 0, 0, 0)


def wire(mesh, **job):
    return predict(TINY, JOB._replace(**job), mesh, MACHINES["h100"]).sent()


def test_bytes_on_the_wire():
    """By axis, one at a time and all together; a ring of n sends (n - 1) / n of an array, a sum twice that."""
    assert wire(Mesh(data=8)) == {("data",): 2 * 7 / 8 * 4 * 1704}
    # ZeRO stage 3: two layers of 576 + 16 in bfloat16, the table and the last norm in float32, as the gradients are;
    # the layers again.
    once = 2 * 2 * 592 + 4 * (64 * 8 + 8) + 4 * 1704
    assert wire(Mesh(fsdp=4)) == {("fsdp",): 3 / 4 * once}
    assert wire(Mesh(fsdp=4), remat="full") == {("fsdp",): 3 / 4 * (once + 2 * 2 * 592)}
    # Megatron: four sums a layer of [128, 8] in bfloat16 and two at the ends; one more a layer where it is recomputed.
    # Of 128 tokens the target's logit, the largest and the sum.
    assert wire(Mesh(tensor=2)) == {("tensor",): 2 / 2 * ((2 * 4 + 2) * 128 * 8 * 2 + 3 * 128 * 4)}
    assert wire(Mesh(tensor=2), remat="full") == {("tensor",): 2 / 2 * ((2 * 5 + 2) * 128 * 8 * 2 + 3 * 128 * 4)}
    # A ring: keys and values of 64 tokens, 2 x 2 x 2 numbers each, two turns forward and two backward, then with
    # gradients in float32; zigzag: 8 + 4 + 4 + 8 numbers each way; and the gradients' sum.
    keys, dealt = 64 * 8, 64 * 24
    ring = 2 * (2 * keys * 2 + 2 * keys * (2 + 4) + 2 * dealt * 2)
    assert wire(Mesh(context=2)) == {("context",): ring + 2 / 2 * 4 * 1704}
    again = 2 * (2 * 2 * keys * 2 + 2 * keys * (2 + 4) + 3 * dealt * 2)
    assert wire(Mesh(context=2), remat="full") == {("context",): again + 2 / 2 * 4 * 1704}
    # Together: 128 / 8 tokens a device, half of each matrix.
    keys, dealt, uncut = 16 * 4, 16 * 12, 1664 / 2 + 40
    assert wire(Mesh(2, 2, 2, 2)) == {
        ("fsdp",): 1 / 2 * (2 * (uncut - 264) + 4 * 264 + 4 * uncut),  # 256 of the table, 8 of the last norm
        ("data", "context"): 2 * 3 / 4 * 4 * uncut / 2,
        ("tensor",): (2 * 4 + 2) * 16 * 8 * 2 + 3 * 16 * 4,
        ("context",): 2 * (2 * keys * 2 + 2 * keys * (2 + 4) + 2 * dealt * 2),
    }
    assert wire(Mesh()) == {}


@pytest.mark.devices(2)
def test_bytes_of_a_compiled_ring():
    """Forward and backward, in float32, which XLA:CPU sends as it is."""
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    part = P(None, "context")

    def own(q, k, v):
        return attention(q, k, v, causal=True, axis="context")

    def loss(q, k, v):
        return (jax.shard_map(own, mesh=mesh, in_specs=part, out_specs=part)(q, k, v) ** 2).sum()

    q, k = jnp.ones((2, 16, 4, 8)), jnp.ones((2, 16, 2, 8))
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower().compile().as_text()
    one = Model(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, hidden=1, vocab=1)
    planned = [each for each in transfers(one, Job(16, 2, compute=4), Mesh(context=2)) if each.axes == ("context",)]
    rings = sum(each.bytes * each.times for each in planned if each.kind == "collective-permute")
    assert totals(collectives(text)) == {"collective-permute": rings}


def test_seconds_within_and_between_nodes():
    """Four devices a node, which send 100 bytes a second to one another and 10 to others."""
    machine = Machine({"bfloat16": 1.0}, 1.0, 1.0, 100.0, 4, 10.0)

    def seconds(mesh, axes, kind="all-gather"):
        return transfer_seconds(Transfer("", kind, axes, 1200, 2), mesh, machine)

    assert seconds(Mesh(fsdp=4), ("fsdp",)) == pytest.approx(2 * 3 / 4 * 1200 / 100)
    assert seconds(Mesh(data=4, fsdp=4), ("fsdp",)) == pytest.approx(2 * 3 / 4 * 1200 / 100)
    assert seconds(Mesh(data=4, fsdp=4), ("data",)) == pytest.approx(2 * 3 / 4 * 1200 / 10)
    # Of 16 four are in a node, and send a quarter each to three other nodes: 2 * 3/4 * 300 / 10 > 2 * 3/4 * 1200 / 100.
    assert seconds(Mesh(fsdp=16), ("fsdp",)) == pytest.approx(2 * 3 / 4 * 300 / 10)
    assert seconds(Mesh(fsdp=16), ("fsdp",), "all-reduce") == pytest.approx(4 * 3 / 4 * 300 / 10)
    # Two of four in a node, with a gap (fsdp) or without.
    assert seconds(Mesh(data=2, fsdp=2, context=2), ("data", "context")) == pytest.approx(2 * 1 / 2 * 600 / 10)
    assert seconds(Mesh(fsdp=4, tensor=2), ("fsdp",)) == pytest.approx(2 * 1 / 2 * 600 / 10)
    # A neighbour in a ring has one device to send from.
    assert seconds(Mesh(context=4), ("context",), "collective-permute") == pytest.approx(2 * 1200 / 100)
    assert seconds(Mesh(context=8), ("context",), "collective-permute") == pytest.approx(2 * 1200 / 10)


def test_bounds():
    """Where the network is slow it bounds the step; the sum is never less than the largest."""
    slow = Machine({"bfloat16": 1e15}, 1e9, 1e15, 1.0, 8, 1.0)
    bound = predict(TINY, JOB, Mesh(data=8), slow)
    assert bound.overlapped == pytest.approx(2 * 7 / 8 * 4 * 1704) and bound.serial >= bound.overlapped
    assert bound.mfu == pytest.approx(3 * 430080 / 8 / 1e15 / bound.overlapped)
    read = predict(TINY, JOB, Mesh(), slow._replace(bandwidth=1.0))
    needed = memory(TINY, JOB, Mesh())
    assert read.overlapped == 2 * 2 * 1664 + 2 * (needed.activations + needed.logits) + 7 * 4 * 1704


def test_meshes_are_even_and_the_best_comes_first():
    every = [*meshes(TINY, JOB, 8)]
    assert len(every) == len(set(every)) and all(mesh.devices == 8 for mesh in every)
    # Two heads of keys, so 1 or 2 over `tensor`: ways to make 8 of three factors (10), and 4 of three (6).
    assert len(every) == 16
    assert not [*meshes(TINY, JOB._replace(batch=3, length=15), 8)]
    assert [*meshes(TINY, Job(8, 1), 8)] == [Mesh(context=4, tensor=2)]  # eight tokens are not two halves for each of 8
    machine = MACHINES["h100"]._replace(memory=40e3)
    found = ranked(TINY, JOB, machine, 8)
    assert {each.mesh for each in found} == set(every)
    fits = [each.memory.total <= 40e3 for each in found]
    assert fits == sorted(fits, reverse=True) and any(fits) and not all(fits)
    first = [each.overlapped for each in found if each.fits]
    assert first == sorted(first)


def scaled(scale):
    """MaxText's models by `global_parameter_scale`, as `get_individual_scales` of its configs/types.py derives them."""
    wide, heads, deep = {16: (1, 2, 1), 32: (2, 2, 1), 64: (2, 2, 2), 128: (2, 3, 2)}[scale]
    return Model(16 * 2**deep, 2048 * 2**wide, 16 * 2**heads, 16 * 2**heads, 128, 7168 * 2**heads, 32000)


# MaxText, src/maxtext/configs/tpu/{v5e,v5p}/README.md and the scripts beside them: MFU, which counts attention's
# operations without the mask and so a few per cent more than here. Its "minimal" keeps all products, as "none" here.
REACHED = {
    "v5e-256, 16B": (scaled(16), Job(2048, 6 * 256, "full"), Mesh(fsdp=256), "v5e", 0.6110),
    "v5e-256, 32B": (scaled(32), Job(2048, 4 * 256, "full"), Mesh(fsdp=256), "v5e", 0.6686),
    "v5e-256, 64B": (scaled(64), Job(2048, 2 * 256, "full"), Mesh(fsdp=256), "v5e", 0.5990),
    "v5p-128, 32B": (scaled(32), Job(2048, 6 * 64), Mesh(fsdp=16, tensor=4), "v5p", 0.7147),
    "v5p-256, 128B": (scaled(128), Job(2048, 1 * 128), Mesh(fsdp=16, tensor=8), "v5p", 0.6868),
}


@pytest.mark.parametrize("run", REACHED)
def test_no_run_was_faster_than_its_bound(run):
    model, job, mesh, machine, reached = REACHED[run]
    bound = predict(model, job, mesh, MACHINES[machine])
    assert 0.55 < reached / bound.mfu < 1
    assert bound.fits or job.remat == "none"  # "minimal" keeps less than all


def test_the_largest_batch_that_was_run_is_the_largest_that_fits():
    """Six examples a chip for 16B on v5e; seven would not fit."""
    model, job, mesh, *_ = REACHED["v5e-256, 16B"]
    fits = [predict(model, job._replace(batch=n * 256), mesh, MACHINES["v5e"]).fits for n in (6, 7)]
    assert fits == [True, False]


def test_against_published_speed_and_memory_of_llama_3():
    """torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (H100 of 96 GB at 500 W).

    Memory there is what the allocator holds, so that gaps between arrays count.
    """
    h100 = MACHINES["h100"]
    # Table 1, FSDP on 8 with torch.compile: 6,667 tokens a second and GPU, some layers' parts recomputed.
    for remat in ("none", "full"):
        bound = predict(LLAMA_8B, Job(8192, 16, remat), Mesh(fsdp=8), h100)
        assert 0.3 < 6667 / (2 * 8192 / bound.overlapped) < 1
    # Table 2, FSDP 8, length 32,768, an example a device, all recomputed: 83.9 GiB.
    planned = memory(LLAMA_8B, Job(32768, 8, "full"), Mesh(fsdp=8)).total / 2**30
    assert 0.88 < planned / 83.9 < 1
    # Table 4, FSDP 32 by TP 8 with sequence parallelism, 16 examples for 8 devices, all recomputed: 67.6 GiB.
    planned = memory(LLAMA_70B, Job(8192, 512, "full", sequence=True), Mesh(fsdp=32, tensor=8)).total / 2**30
    assert 0.75 < planned / 67.6 < 1
