"""A sequence cut over 1, 2, 3, 4 and 8 devices against the whole on one, in float64: output, log-sum-exp, gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxarch.attention import attention, chosen
from jaxarch.attention.options import Options
from jaxarch.attention.ring import collect, deal, ring_attention
from tests.attention.comparing import Case, assert_is_dense


def mesh_of(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def over(mesh):
    """Ring attention on whole arrays, with blocks of 2."""
    part, rows = P(None, "ring"), P()

    def whole(q, k, v, options: Options):
        arrays = options.mask.q_segments, options.mask.kv_segments, options.sinks

        def own(q, k, v, q_segments, kv_segments, sinks):
            mask = options.mask._replace(q_segments=q_segments, kv_segments=kv_segments)
            inside = options._replace(mask=mask, sinks=sinks, axis="ring")
            return ring_attention(q, k, v, inside, block_queries=2, block_keys=2)

        specs = (part, part, part, part, part, rows)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=part)(q, k, v, *arrays)

    return whole


OPTIONS = {
    "causal": Case(causal=True),
    "all see all": Case(),
    "a window": Case(causal=True, window=5, kv_heads=2),
    "a window around": Case(window=3),
    "packed": Case(causal=True, batch=2, on=frozenset({"segments"})),
    "everything": Case(
        causal=True, window=7, batch=2, kv_heads=2, group=2, width=3, on=frozenset({"segments", "sinks", "soft_cap"})
    ),
}


@pytest.mark.devices(8)
@pytest.mark.parametrize("devices", [(1, 3), (2, 4, 8)])
def test_ring_is_single(devices: tuple[int, ...]):
    """Every case on 3 and 8 devices, the richest on 1, 2 and 4 as well."""
    for size in devices:
        for name in OPTIONS if size in (3, 8) else ("everything",):
            length = size * (6 if size < 8 else 2)  # halves of 3: a block and a half; and of 1
            assert_is_dense(over(mesh_of(ring=size)), OPTIONS[name]._replace(length=length, keys=length))


@pytest.mark.devices(8)
def test_halves_are_dealt_as_a_zigzag_and_collected_again():
    for devices in (1, 2, 3, 8):
        part = P(None, "ring")
        split = partial(jax.shard_map, mesh=mesh_of(ring=devices), in_specs=part)
        numbers = jnp.arange(2 * devices)[None]
        early, late = split(lambda x: deal(x, "ring"), out_specs=(part, part))(numbers)
        assert list(early[0]) == list(range(devices)) and list(late[0]) == list(range(2 * devices - 1, devices - 1, -1))
        back = split(lambda x: collect(deal(x, "ring"), "ring"), out_specs=part)(numbers)
        assert list(back[0]) == list(numbers[0])


@pytest.mark.devices(8)
def test_through_the_entry_beside_an_axis_of_data():
    """With remat and in bfloat16, on a mesh of 2 x 4; no device holds the whole sequence, or its weights."""
    mesh, length = mesh_of(data=2, ring=4), 64
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 2, 8), jnp.bfloat16) for i in range(3))
    assert chosen(16, 16, {"causal", "axis"}) == "ring"

    @jax.checkpoint
    def ring(q, k, v):
        own = jax.shard_map(
            partial(attention, causal=True, axis="ring"),
            mesh=mesh, in_specs=(P("data", "ring"),) * 3, out_specs=P("data", "ring"),
        )  # fmt: skip
        return own(q, k, v)

    def gradients(function):
        loss = lambda *qkv: jnp.square(function(*qkv).astype(jnp.float32)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    own, expected = (
        gradients(ring)(q, k, v),
        gradients(partial(attention, causal=True, implementation="dense"))(q, k, v),
    )
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05, atol=0.05)
    text = gradients(ring).lower(q, k, v).compile().as_text()
    assert "64,64" not in text and "all-gather" not in text


@pytest.mark.devices(8)
def test_parts_are_put_together_in_float32():
    """The mean of 256 on one device and 1/2 on seven is 32.44, in bfloat16 32.5; rounded at each part 32 or 32.25."""
    x = jnp.zeros((1, 16, 1, 2), jnp.bfloat16)
    v = x.at[:, :2].set(256).at[:, 2:].set(0.5)
    part = P(None, "ring")
    ring = jax.shard_map(partial(attention, axis="ring"), mesh=mesh_of(ring=8), in_specs=part, out_specs=part)
    out, pullback = jax.vjp(ring, x, x, v)
    assert (out == 32.5).all() and (pullback(v)[2] == 32.5).all()


@pytest.mark.devices(8)
def test_what_a_ring_cannot_do_is_said():
    mesh = mesh_of(ring=2)

    def ring(length, **options):
        x = jnp.ones((1, length, 2, 4))
        own = partial(attention, axis="ring", **options)
        jax.shard_map(lambda x: own(x, x, x), mesh=mesh, in_specs=P(None, "ring"), out_specs=P(None, "ring"))(x)

    with pytest.raises(ValueError, match="an even part of a causal sequence, not 3; pad it"):
        ring(6, causal=True)
    ring(6)  # where all see all nothing is halved
    mesh = mesh_of(ring=1)
    ring(3, causal=True)
    mesh = mesh_of(ring=2)
    with pytest.raises(ValueError, match="ring lacks bias"):
        ring(4, bias=jnp.zeros((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="blockwise lacks axis; ring is for an axis"):
        ring(4, implementation="blockwise")
    x = jnp.ones((1, 4, 2, 4))
    with pytest.raises(ValueError, match="ring needs axis"):
        attention(x, x, x, implementation="ring")
