"""What compiled programs send, against bytes by hand: eight devices as a mesh of `a` 2 by `b` 4."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxarch.run.collectives import Collective, axes, collectives, totals

SHAPE = {"a": 2, "b": 4}
ALONG_B = ((0, 1, 2, 3), (4, 5, 6, 7))
ALONG_A = ((0, 4), (1, 5), (2, 6), (3, 7))


def x(*shape, dtype="float32"):
    return jnp.ones(shape, dtype)


def text_of(function, *arguments, **options):
    return jax.jit(function, **options).trace(*arguments).lower().compile().as_text()


def on_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def split(function, inside, outside, *arguments):
        """The program's text, and what is found in it."""
        mapped = jax.shard_map(function, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=False)
        return text_of(mapped, *arguments)

    return split, lambda *spec: NamedSharding(mesh, P(*spec))


def only(text) -> Collective:
    (one,) = collectives(text)
    return one


def check_each_kind():
    """An array of [8, 16] in float32: 64 bytes a row."""
    split, _ = on_mesh()

    one = only(split(lambda x: jax.lax.psum(x, "b"), P("a", "b"), P("a"), x(8, 16)))  # [4, 4] a device
    assert one[:4] == ("all-reduce", (("f32", 64),), ALONG_B, 1) and one.wire_bytes == 2 * 3 / 4 * 64
    assert "psum" in one.name and axes(one, SHAPE) == ("b",)

    both = only(split(lambda x: jax.lax.psum(x, ("a", "b")), P("a", "b"), P(), x(8, 16)))
    assert both.bytes == 64 and both.wire_bytes == 2 * 7 / 8 * 64 and axes(both, SHAPE) == ("a", "b")

    one = only(split(partial(jax.lax.all_gather, axis_name="b", tiled=True), P("b"), P(), x(8, 16)))
    assert one[:4] == ("all-gather", (("f32", 128),), ALONG_B, 1)
    assert (one.operand_bytes, one.result_bytes, one.bytes, one.wire_bytes) == (128, 512, 512, 3 * 128)

    one = only(split(partial(jax.lax.psum_scatter, axis_name="a", tiled=True), P(), P("a"), x(8, 16)))
    assert one[:4] == ("reduce-scatter", (("f32", 512),), ALONG_A, 1) and axes(one, SHAPE) == ("a",)
    assert (one.operand_bytes, one.result_bytes, one.bytes, one.wire_bytes) == (512, 256, 512, 256)

    swap = partial(jax.lax.all_to_all, axis_name="b", split_axis=0, concat_axis=0, tiled=True)
    one = only(split(swap, P(None, "b"), P(None, "b"), x(8, 16)))  # [8, 4]: a quarter stays
    assert one.kind == "all-to-all" and one.groups == ALONG_B and (one.bytes, one.wire_bytes) == (128, 96)


def check_types():
    """Sums of integers and of float32 in one program; the compiler may join those of one type, or not."""
    split, _ = on_mesh()
    found = collectives(split(lambda *x: jax.lax.psum(x, "b"), (P("a"), P(), P()), (P("a"), P(), P()),
                              x(8, 16), x(3), x(5, dtype="int16")))  # fmt: skip
    bytes_ = sorted(operand for one in found for operand in one.operands)
    assert bytes_[:2] == [("f32", 12), ("f32", 256)]
    assert bytes_[2] in (("s16", 10), ("s32", 20))  # widened, or not
    assert totals(found) == {"all-reduce": 268 + bytes_[2][1]}


def check_loops():
    """The same by what the compiler noted and, where it noted nothing, by the counter."""
    split, _ = on_mesh()
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def turn(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: 2 * jax.lax.ppermute(x, "b", ring), x)

    def nested(x):
        def inner(x, _):
            return 0.5 * jax.lax.psum(x, "b"), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, None, length=3)
            return jax.lax.all_gather(x, "a", tiled=True)[:4], None

        return jax.lax.scan(outer, x, None, length=7)[0]

    def strided(x):
        """4, 7 and 10 are below 11."""

        def body(carry):
            return carry[0] + 3, jax.lax.psum(carry[1], "b")

        return jax.lax.while_loop(lambda carry: carry[0] < 11, body, (4, x))[1]

    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.lax.psum(x, "b"), x)

    noted = {function: split(function, P("a"), P("a"), x(8, 16)) for function in (nested, strided, until)}
    noted[turn] = split(turn, P("b"), P("b"), x(8, 16))
    bare = {name: re.sub(r", backend_config=.*", "", text) for name, text in noted.items()}
    assert "known_trip_count" in noted[nested] and "known_trip_count" not in bare[nested]
    for texts in (noted, bare):
        one = only(texts[turn])
        assert (one.kind, one.times, one.bytes, one.wire_bytes) == ("collective-permute", 5, 128, 128)
        assert one.groups == tuple((i, i - i % 4 + (i + 1) % 4) for i in range(8)) and axes(one, SHAPE) == ("b",)
        found = collectives(texts[nested])
        assert sorted((one.kind, one.times) for one in found) == [("all-gather", 7), ("all-reduce", 21)]
        assert totals(found) == {"all-reduce": 21 * 256, "all-gather": 7 * 512}
        assert totals(found, wire=True) == {"all-reduce": 21 * 1.5 * 256, "all-gather": 7 * 256}
        assert only(texts[strided]).times == 3
        assert only(texts[until]).times is None
        with pytest.raises(ValueError, match=r"all-reduce .*psum is in a loop whose turns"):
            totals(collectives(texts[until]))
        assert totals(collectives(texts[until]), turns=2) == {"all-reduce": 2 * only(texts[until]).bytes}


def check_conditionals():
    """Of two branches the one that sends more."""
    split, _ = on_mesh()

    def either(x, number):
        return jax.lax.cond(number > 0, lambda x: jax.lax.psum(x, "b"), lambda x: jax.lax.psum(x[:1], "b") + x, x)

    one = only(split(either, (P("a"), P()), P("a"), x(8, 16), jnp.int32(1)))
    assert (one.kind, one.bytes, one.times) == ("all-reduce", 256, 1)


def check_products_that_are_cut():
    """[16, 32] times [32, 24] with the contracted axis over `b`, then over all: a sum of [16, 24]."""
    _, sharding = on_mesh()
    for axis, expected in (("b", ("b",)), (("a", "b"), ("a", "b")), ("a", ("a",))):
        given = {"in_shardings": (sharding(None, axis), sharding(axis)), "out_shardings": sharding()}
        one = only(text_of(jnp.matmul, x(16, 32), x(32, 24), **given))
        assert (one.kind, one.bytes, axes(one, SHAPE)) == ("all-reduce", 16 * 24 * 4, expected)
    given = {"in_shardings": (sharding("a"), sharding(None, "b")), "out_shardings": sharding("a", "b")}
    assert collectives(text_of(jnp.matmul, x(16, 32), x(32, 24), **given)) == []


@pytest.mark.devices(8)
def test_compiled_programs():
    """One process for all of them, since its start takes longer than they do."""
    for check in (check_each_kind, check_types, check_loops, check_conditionals, check_products_that_are_cut):
        check()


# Asynchronous forms, tiled layouts and fewer notes, as GPU and TPU write them.
ASYNCHRONOUS = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%async (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[8]{0} reduce-scatter(%p), channel_id=4, replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (x: bf16[4,128], w: f32[64], u: s4[6]) -> f32[8] {
  %x = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[64]{0} parameter(1)
  %u = s4[6]{0:E(4)} parameter(2)
  %ag = (bf16[4,128]{1,0:T(8,128)}, bf16[16,128]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %ar = (f32[64]{0}, s4[6]{0}) all-reduce-start(f32[64] %w, s4[6] %u), \
replica_groups=[4,2]<=[8], to_apply=%add, metadata={op_name="psum"}
  %cp = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
  %rs = ((f32[64]{0}), f32[8]{0}, s32[]) async-start(%w), calls=%async
  %same = f32[64]{0} collective-permute(%w), source_target_pairs={{0,0},{1,1}}
  %alone = f32[64]{0} all-reduce(%w), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %ag-done = bf16[16,128]{1,0} all-gather-done(%ag)
  %ar-done = (f32[64]{0}, s4[6]{0}) all-reduce-done(%ar)
  %cp-done = f32[64]{0} collective-permute-done(%cp)
  ROOT %rs-done = f32[8]{0} async-done(%rs), calls=%async
}
"""


def test_asynchronous_forms():
    gather, reduce, permute, scatter, same, alone = collectives(ASYNCHRONOUS)
    assert gather[:3] == ("all-gather", (("bf16", 1024),), ((0, 2, 4, 6), (1, 3, 5, 7)))
    assert gather.bytes == 4096 and gather.wire_bytes == 3072
    assert reduce[:3] == ("all-reduce", (("f32", 256), ("s4", 3)), ((0, 1), (2, 3), (4, 5), (6, 7)))
    assert reduce.name == "psum" and reduce.bytes == reduce.wire_bytes == 259
    assert permute[:3] == ("collective-permute", (("f32", 256),), ((0, 1), (1, 0))) and permute.wire_bytes == 256
    assert scatter[:3] == ("reduce-scatter", (("f32", 256),), (tuple(range(8)),)) and scatter.wire_bytes == 224
    assert (same.bytes, same.wire_bytes, alone.bytes, alone.wire_bytes) == (256, 0, 256, 0)


LOOP = """\
HloModule jit_step, num_partitions=8

%test (c: pred[5]) -> pred[] {
  %c = pred[5]{0} parameter(0)
  %any = pred[5]{0} all-reduce(%c), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%or
  ROOT %go = pred[] custom-call(%any)
}

%turn (b: pred[5]) -> pred[5] {
  %b = pred[5]{0} parameter(0)
  ROOT %next = pred[5]{0} collective-permute(%b), source_target_pairs={{0,1},{1,5},{5,0}}
}

ENTRY %main (x: pred[5]) -> pred[5] {
  %x = pred[5]{0} parameter(0)
  ROOT %loop = pred[5]{0} while(%x), condition=%test, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_a_loop_is_tested_once_more_than_it_turns():
    """Of truth values, a byte each. What is sent from 0 to 1 goes along `b`, from 1 to 5 along `a`."""
    turn, test = collectives(LOOP)
    assert (turn.kind, turn.times, turn.operands) == ("collective-permute", 3, (("pred", 5),))
    assert (test.kind, test.times, test.operands) == ("all-reduce", 4, (("pred", 5),))
    assert axes(turn, SHAPE) == ("a", "b")


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ALONG_B),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ALONG_B),
        ("[4,2]<=[2,4]T(1,0)", ALONG_A),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ALONG_B),
        ("mesh['a'=2,'b'=4] {'a'}", ALONG_A),
        ("mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("mesh['i'=1,'j'=4,'k'=2], device_ids=([2,4]T(1,0)) {'j'}", ALONG_B),
        ("mesh['i'=2,'j'=2], device_ids=(0,2,1,3) {'j'}", ((0, 2), (1, 3))),
        ("mesh['b'=8] {'b':(1)2}", ALONG_A),  # the part of the axis that varies slowest
        ("mesh['b'=8] {'b':(2)4}", ALONG_B),
        ("mesh['b'=8] {'b':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ],
)
def test_groups_in_every_notation(written, groups):
    text = ASYNCHRONOUS.replace("replica_groups=[4,2]<=[8]", f"replica_groups={written}")
    assert collectives(text)[1].groups == groups
