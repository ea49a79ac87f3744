"""Meshes: what is said of them, and how arrays are cut. Rules need no devices, only a mesh's shape."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import gpt
from jaxarch.attention import attention
from jaxarch.gan import layout as gan
from jaxarch.gan.game import latents_of
from jaxarch.gan.minibatch import minibatch_deviation
from jaxarch.gan.normalization import batch_norm
from jaxarch.rl import layout as rl
from jaxarch.run import ConfigError, Experiment
from jaxarch.run.collectives import axes, collectives
from jaxarch.run.command import Options, first_batch
from jaxarch.run.explain import explained
from jaxarch.run.mesh import (
    BATCH,
    batch_shardings,
    check_axes,
    gathered,
    make_mesh,
    over_members,
    parse,
    pinned,
    placed,
    present,
    size_of,
    spec_of,
    stacked,
    state_shardings,
)
from jaxarch.run.program import Programs, members
from jaxarch.run.protocol import Layout
from jaxarch.transformer import layout as transformer
from jaxarch.transformer.attention import spread
from jaxarch.transformer.layout import IN_LAYERS
from tests.run.running import exit_code
from tests.run.sketches import network

LAYOUT = Layout(
    axes=("data", "fsdp", "tensor", "context"),
    state=(
        (r"\.kernel$", (..., None, "tensor")),
        (r"^table", ("tensor?", None)),
        (r"^whole\.", ()),
        (r"^own", ("fsdp",)),
    ),
    batch=(BATCH, "context"),
)


def of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_how_it_is_written():
    assert list(parse("tensor=4, data=2").items()) == [("data", 2), ("tensor", 4)]
    for text, message in {
        "data=2,rows=2": "there is no axis 'rows'; there are replica, data, fsdp, context, tensor.",
        "data=2,data=4": "data stands twice.",
        "data=0": "data is not a number of devices; write it as --mesh data=2.",
        "data=-2": "data is not a number",
        "data=²": "data is not a number",
        "data": "data is not a number",
    }.items():
        with pytest.raises(ConfigError, match=f"^--mesh {text}: {message}"):
            parse(text)
    with pytest.raises(ConfigError, match="there is no axis 'rows'"):  # before there is an experiment
        Options(mesh="rows=2")


def test_an_axis_that_is_of_no_use_is_refused():
    rows = Layout(axes=("data", "fsdp"))
    check_axes(rows, {"replica": 2, "data": 4, "tensor": 1}, 6)
    check_axes(None, {"replica": 2}, 2)
    with pytest.raises(ConfigError, match=r"^--mesh tensor=2: .* cannot use tensor; it can replica, data, fsdp\.$"):
        check_axes(rows, {"data": 2, "tensor": 2}, 1)
    with pytest.raises(ConfigError, match=r"cannot use data; it can replica\.$"):
        check_axes(None, {"data": 2}, 1)
    with pytest.raises(ConfigError, match=r"^--mesh replica=2 spreads members, .* --replicas 2\.$"):
        check_axes(rows, {"replica": 2}, 1)
    own = Layout(axes=("replica",))
    check_axes(own, {"replica": 4}, 1)
    check_axes(own, {"replica": 1}, 3)
    with pytest.raises(ConfigError, match=r"^--mesh replica=2: .* members of its own to spread; run the 4 members one"):
        check_axes(own, {"replica": 2}, 4)
    with pytest.raises(ConfigError, match=r"^--mesh replica=4 does not divide the 6 members .*; 1, 2, 3, 6 would\.$"):
        check_axes(rows, {"replica": 4}, 6)


@dataclass(frozen=True)
class Device:
    """One of a host that is not here."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@dataclass(frozen=True)
class Chip(Device):
    """One of a TPU slice, by its place in the torus."""

    platform: str = "tpu"
    device_kind: str = "TPU v4"
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def test_over_hosts_the_first_axis_that_can_be_is_cut(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def hosts(each, **sizes):
        """Of each device of the mesh its host, of two with so many each."""
        mesh = make_mesh(sizes, [Device(number, number // each) for number in range(2 * each)])
        assert mesh.axis_names == tuple(sizes)
        return [[device.process_index for device in row] for row in mesh.devices]

    assert hosts(4, data=2, tensor=4) == [[0] * 4, [1] * 4]
    assert hosts(4, data=4, tensor=2) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert hosts(3, data=3, tensor=2) == [[0, 1]] * 3  # three do not go over two hosts
    # Two slices of 4 x 4 chips, four a host. Eight of `tensor` are a side of the torus and half of the other.
    chips = [Chip(i, i // 4, slice_index=i // 16, coords=(i % 4, i % 16 // 4, 0)) for i in range(32)]
    rows = make_mesh({"data": 4, "tensor": 8}, chips).devices
    assert [{chip.slice_index for chip in row} for row in rows] == [{0}, {0}, {1}, {1}]
    devices = [Device(number, number // 2) for number in range(4)]
    for size in (2, 8):  # of several processes none is left without a device
        with pytest.raises(ConfigError, match=f"^--mesh data={size} is of {size} .* 4, and several processes"):
            make_mesh({"data": size}, devices)


@pytest.mark.parametrize("count", [3, 6, 8])
def test_a_part_of_the_devices_is_enough(count):
    """Also of a number that is no part of the torus."""
    chips = [Chip(i, i // 4, device_kind="TPU v5 lite", coords=(i % 4, i // 4, 0)) for i in range(8)]
    made = make_mesh({"data": count}, chips)
    assert made.size == count and len({chip.id for chip in made.devices.ravel()}) == count


def test_how_a_state_is_cut():
    mesh = of(data=2, fsdp=4, tensor=2)
    for name, shape, cut in [
        ("a.kernel", (128, 64), P("fsdp", "tensor")),
        ("a.kernel", (2, 64, 64), P(None, "fsdp", "tensor")),  # of layers that are scanned
        ("b.bias", (8, 64, 128), P(None, None, "fsdp")),  # the largest
        ("b.bias", (64, 64), P("fsdp", None)),  # the first of the largest
        ("b.bias", (1026, 64), P(None, "fsdp")),  # the largest that it divides
        ("b.bias", (1026, 6), P(None, None)),
        ("b.bias", (63, 64), P(None, None)),  # below 4,096 numbers
        ("table", (98, 64), P("tensor", "fsdp")),
        ("table", (97, 64), P(None, "fsdp")),
        ("whole.table", (64, 64), P("fsdp", None)),
        ("own", (4, 4096), P("fsdp", None)),  # once
        ("step", (), P()),
    ]:
        assert spec_of(name, shape, LAYOUT, mesh) == cut, (name, shape)
    assert spec_of("a.kernel", (64, 33), LAYOUT, of(data=2)) == P(None, None)
    with pytest.raises(ConfigError, match=r"^--mesh tensor=2 .* the 33 of a\.kernel \[64, 33\]; 1, 3, 11, 33 would\.$"):
        spec_of("a.kernel", (64, 33), LAYOUT, mesh)

    shapes = {"a": {"kernel": jnp.zeros((64, 64))}, "step": jnp.int32(0)}
    mesh = of(replica=2, fsdp=2)
    for several, first in ((False, ()), (True, ("replica",))):
        found = state_shardings(shapes, LAYOUT, mesh, several)
        assert found["a"]["kernel"].spec == P(*first, "fsdp", None) and found["step"].spec == P(*first)
    assert state_shardings(shapes, None, mesh, True)["step"].spec == P("replica")  # without a layout as well
    with pytest.raises(ConfigError, match=r"^--mesh fsdp=3 divides no large array of the state; 1, 2, .* 64 would\.$"):
        state_shardings(shapes, LAYOUT, of(fsdp=3), False)
    state_shardings({"step": jnp.int32(0)}, LAYOUT, of(fsdp=3), False)  # nothing is large


def test_how_a_batch_is_cut():
    def cut(rows, length, **sizes):
        found = batch_shardings({"a": jax.ShapeDtypeStruct((rows, length), "float32")}, LAYOUT, of(**sizes))["a"]
        assert stacked(found).spec == P(None, *found.spec)
        return found.spec

    assert cut(8, 16, data=2, fsdp=2, context=2) == P(("data", "fsdp"), "context")
    assert cut(8, 15, data=2, tensor=2) == P("data", None)
    with pytest.raises(ConfigError, match=r"^--mesh data=2,fsdp=2 .* the 6 examples of a step; 4 or 8 would do\.$"):
        cut(6, 16, data=2, fsdp=2)
    with pytest.raises(ConfigError, match=r"^--mesh context=4 does not divide a length of 3; 8 or 16 would do\.$"):
        cut(8, 3, context=4)


def test_how_families_are_cut():
    """What none of their losses shows: on which device what lies."""
    mesh, batch = of(data=2, fsdp=2, tensor=2, context=2), {"a": jax.ShapeDtypeStruct((8, 16), "int32")}
    for layout, cut in (
        (transformer.LAYOUT, P(("data", "fsdp"), "context")),
        (transformer.UNCUT, P(("data", "fsdp"), None)),
        (gan.LAYOUT, P(("data", "fsdp"), None)),
    ):
        assert batch_shardings(batch, layout, mesh)["a"].spec == cut
    for layout, axis in ((transformer.UNCUT, "context"), (gan.LAYOUT, "tensor"), (rl.LAYOUT, "fsdp")):
        with pytest.raises(ConfigError, match=f"this experiment cannot use {axis}"):
            check_axes(layout, {axis: 2}, 1)
    for layout, name, shape, cut in [
        (transformer.LAYOUT, "params.layers_0.attention.key.bias", (6,), P("tensor")),
        (transformer.LAYOUT, "params.layers.feed_forward.gate.bias", (2, 6), P(None, "tensor")),
        (transformer.LAYOUT, "params.layers_0.attention.out.bias", (6,), P(None)),
        (transformer.LAYOUT, "opt_state.0.mu.layers_1.feed_forward.up.kernel", (64, 128), P("fsdp", "tensor")),
        (transformer.LAYOUT, "params.embedding.embedding", (65, 64), P(None, "fsdp")),
        (rl.LAYOUT, "world.state.position", (8, 2), P("data", None)),
        (rl.LAYOUT, "learner.under_way", (8,), P("data")),
        (rl.LAYOUT, "learner.replay.observation", (9, 8, 4), P(None, "data", None)),
        (rl.LAYOUT, "learner.replay.finals.observation", (8, 9, 4), P("data", None, None)),
        (rl.LAYOUT, "learner.replay.priorities", (64,), P(None)),
        (rl.LAYOUT, "learner.params.layers_0.kernel", (4, 8), P(None, None)),
    ]:
        assert spec_of(name, shape, layout, mesh) == cut, name


def check_what_is_explained_and_what_is_refused_leave_no_folder(tmp_path, capsys):
    """Four arrays of 64 x 64 numbers, two of them parameters, a quarter on each device."""

    def said(module, *arguments):
        code = exit_code(module, "--runs", tmp_path, "--name", "a", *arguments)
        assert not list(tmp_path.iterdir())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, text, _ = said(network, "--mesh", "data=2,fsdp=4", "--explain-mesh", 1)
    words = [line.split() for line in text.splitlines()]
    assert code == 0 and words[1] == ["params.a", "(64,", "64)", "fsdp,", "-", "4,096"]
    assert ["key", "()", "whole", "8"] in words and "on each of 8 device(s):" in text
    assert ["parameters", "8,192", "bytes,", "0.2500", "of", "all"] in words
    assert ["momentum", "8,192", "bytes,", "0.2500", "of", "all"] in words
    experiment = network.experiment(network.Config())
    programs = Programs(experiment, members(experiment.hypers, (), 0, 1), make_mesh(parse("data=2,fsdp=4")))
    plan = programs.compiled_step(first_batch(experiment)).memory_analysis()
    whole = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    state = 4 * 4096 + 8 + 4  # momentum and parameters, a key and a learning rate
    assert ["a", "step", f"{whole - state:,}", "bytes:"] in [line[:4] for line in words]
    assert words[-1] == ["together", f"{whole:,}", "bytes:", f"{whole / 1e9:.3g}", "GB", "fits", "1", "GB"]
    assert [*explained(programs, first_batch(experiment), 1e-5)][-1].endswith("GB does not fit 1e-05 GB")

    for module, mesh, line in [
        (network, "data=3", "does not divide the 16 examples of a step; 15 or 18 would do."),
        (network, "tensor=2", ": this experiment cannot use tensor; it can replica, data, fsdp."),
        (network, "data=16", " is of 16 devices; there are 8."),
        (gpt, "tensor=3", "does not divide the model's 4 heads; 1, 2, 4 would."),
    ]:
        code, _, text = said(module, "--mesh", mesh, *(("--model.dim", 96) if module is gpt else ()))
        assert code == 2 and text.count("\n") == 1 and f"--mesh {mesh}" in text and line in text, text


def check_pinned():
    """Without a mesh nothing is done; on one the result lies as it was told to."""

    def lies(function, given, *cut, like=()):
        """Whether the result of a compiled function is cut so. like: how what it is given is cut."""
        mesh = jax.sharding.get_mesh()
        given = jax.device_put(given, NamedSharding(mesh, P(*like)))
        found = jax.tree.leaves(jax.jit(function)(given))[0]
        return found.sharding.is_equivalent_to(NamedSharding(mesh, P(*cut)), found.ndim)

    x, of_two = jnp.ones((8, 4, 6)), ("data", "fsdp")
    assert pinned(x, BATCH) is x and gathered({"x": x}, LAYOUT)["x"] is x and size_of(BATCH) == 1
    with jax.set_mesh(make_mesh(parse("data=2,fsdp=2,context=2"))):
        assert lies(lambda x: pinned(2 * x, BATCH, None, "context"), x, of_two, None, "context")
        assert lies(lambda x: pinned(2 * x, None, "tensor"), x, like=(None, "context"))
        assert lies(lambda x: transformer.residual(2 * x), x, of_two, "context")
        assert lies(lambda x: transformer.residual(2 * x), x, of_two, "context", like=("data", None, "fsdp"))
        assert lies(lambda x: transformer.scores(2 * x), x, of_two, "context")
        assert lies(lambda x: gan.examples(2 * x), x, of_two)
        assert lies(gan.used, {"a": x}, like=("fsdp",))
    with jax.set_mesh(make_mesh(parse("fsdp=2,tensor=2"))):
        assert lies(lambda x: transformer.scores(2 * x), x, "fsdp", None, "tensor")
        assert lies(lambda x: transformer.scores(2 * x), x[..., :5], "fsdp")  # not a vocabulary that it does not divide
        kernel = {"layers_0": {"query": {"kernel": jnp.ones((4, 6))}}}
        assert lies(transformer.used, kernel, None, "tensor", like=("fsdp", "tensor"))
        assert lies(
            lambda tree: transformer.used(tree, IN_LAYERS),
            kernel,
            "fsdp",
            "tensor",
            like=("fsdp", "tensor"),
        )
        bias = {"layers_0": {"query": {"bias": jnp.ones(6)}}}
        assert lies(transformer.used, bias, "tensor", like=("fsdp",))


def check_placed():
    """Keys too, which are no arrays of numbers; what a key draws stays."""
    mesh = make_mesh(parse("data=4,fsdp=2"))
    tree = {"keys": jax.random.split(jax.random.key(3), 8), "numbers": jnp.arange(8.0)}
    found = placed(tree, jax.tree.map(lambda _: NamedSharding(mesh, P(("data", "fsdp"))), tree))
    for name, leaf in found.items():
        assert leaf.addressable_data(3).shape == (1,) and len(leaf.devices()) == 8
        draws = [jax.random.key_data(each) if name == "keys" else each for each in (leaf, tree[name])]
        np.testing.assert_array_equal(*draws)


class Drawn(nn.Module):
    latent_dim: int = 3


def check_statistics_are_over_the_whole_batch():
    """And what is drawn for it is another for each example, and the same whatever the mesh."""
    rng = np.random.default_rng(0)
    x = rng.normal(np.arange(8)[:, None, None, None], size=(8, 3, 3, 4)).astype(np.float32)
    latents = latents_of(Drawn(), jax.random.key(0), 8)

    def all_of_it(x):
        norm, of_batch = batch_norm(x, jnp.ones(4), jnp.zeros(4), 0.0), minibatch_deviation(x)
        return norm, of_batch, latents_of(Drawn(), jax.random.key(0), 8)

    for text in ("data=8", "data=2,fsdp=2"):
        mesh = make_mesh(parse(text))
        with jax.set_mesh(mesh):
            given = jax.device_put(x, NamedSharding(mesh, P(present(BATCH, mesh))))
            (normalized, mean, variance), of_batch, drawn = jax.jit(all_of_it)(given)
        np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(variance, x.var((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(normalized, (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), rtol=1e-4, atol=1e-5)
        deviation = np.sqrt(x.reshape(4, 2, 3, 3, 4).var(0) + 1e-8).mean(
            (1, 2, 3)
        )  # of examples 0, 2, 4, 6; the others
        np.testing.assert_allclose(of_batch[:, 0, 0, 4], np.tile(deviation, 4), rtol=1e-5)
        np.testing.assert_array_equal(drawn, latents)
    assert len(np.unique(latents)) == 24


def check_minibatches_are_of_groups():
    """Each has as many steps of each group, in the group's own order; nothing is sent where a device has its groups."""
    time, envs, minibatches = 4, 8, 2
    steps, rng = np.arange(time * envs * 2).reshape(time, envs, 2), np.random.default_rng(0)
    for groups, text in ((1, ""), (2, ""), (4, "data=4"), (8, "data=4")):
        order = np.stack([rng.permutation(time * envs // groups) for _ in range(groups)])
        own = [steps[:, envs_].reshape(-1, 2) for envs_ in np.split(np.arange(envs), groups)]
        apart = [np.split(few[turned], minibatches) for few, turned in zip(own, order, strict=True)]
        wanted = [np.concatenate([of_group[number] for of_group in apart]) for number in range(minibatches)]
        given: list = [steps, order]

        def formed(steps, order, groups=groups):
            return rl.shuffled(rl.grouped(steps, groups), order, minibatches)

        with jax.set_mesh(make_mesh(parse(text))) if text else contextlib.nullcontext():
            if text:
                mesh = jax.sharding.get_mesh()
                cuts = P(None, "data"), P("data")
                given = [jax.device_put(x, NamedSharding(mesh, cut)) for x, cut in zip(given, cuts, strict=True)]
            compiled = jax.jit(formed).trace(*given).lower().compile()
            np.testing.assert_array_equal(compiled(*given), wanted)
            assert not collectives(compiled.as_text())
            if text:
                assert compiled(*given).sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), 3)
                with pytest.raises(ConfigError, match="^--mesh data=4 does not divide --agent.groups 2; 4 would do.$"):
                    rl.grouped(steps, 2)


def check_attention_is_spread():
    """What one device makes of the same, whether the mesh cuts heads, positions and examples, or cannot."""
    rng = np.random.default_rng(0)
    q, k, v, of_heads, of_examples = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((4, 8, 4, 2), (4, 8, 2, 2), (4, 8, 2, 2), (1, 4, 8, 8), (4, 1, 8, 8))
    )
    segments, of_keys = (
        np.repeat([[0, 0, 1], [0, 1, 1], [0, 0, 0], [2, 1, 0]], lengths, axis=1).astype(np.int32)
        for lengths in ([3, 2, 3], [2, 4, 2])
    )
    packed, crossed = ({"q_segments": segments, "kv_segments": keys} for keys in (segments, of_keys))
    cases = {
        "data=2,tensor=2,context=2": ({"causal": True, **packed}, crossed),
        "data=2,fsdp=2,tensor=2": ({"bias": of_heads, **crossed}, {"causal": True, "bias": of_examples, **packed}),
    }
    dense = jax.jit(partial(attention, implementation="dense"), static_argnames="causal")

    def close(given, options):
        found = jax.jit(spread, static_argnames="causal")(*given, **options)
        np.testing.assert_allclose(found, dense(*given, **options), rtol=1e-4, atol=1e-5)

    for text, every in cases.items():
        with jax.set_mesh(make_mesh(parse(text))):
            for options in every:
                close((q, k, v), options)
            close((q[:3, :7], k[:3, :7], v[:3, :7]), {"causal": True})  # as in an evaluation
    for text, message, heads, length, bias in [
        ("tensor=4", r"tensor=4 does not divide the model's 2 heads of keys; 1, 2 would\.", 4, 8, None),
        ("tensor=4", r"tensor=4 does not divide the model's 6 heads; 1, 2, 3, 6 would\.", 6, 8, None),
        ("context=2", "context: ring attention takes no bias", 4, 8, of_heads),
        ("context=2", "context=2: .* an early and a late part .* 6 are not 4 equal parts", 4, 6, None),
    ]:
        given = np.ones((4, length, heads, 2), np.float32), k[:, :length], v[:, :length], None, None, bias
        with jax.set_mesh(make_mesh(parse(text))), pytest.raises(ConfigError, match=f"^--mesh {message}"):
            jax.eval_shape(partial(spread, causal=True), *given)


class Attending(NamedTuple):
    params: Any


def check_members_attend_by_themselves():
    """What a member's heads take, 1,024 bytes of an example, is not sent to another's devices."""

    def step(state, batch, index):
        out = spread(state.params, state.params, state.params, causal=True)
        return Attending(out), {"train/loss": out.mean()}

    experiment = Experiment(
        lambda key, hypers: Attending(jax.random.normal(key, (2, 16, 4, 8))),
        step,
        lambda state, key: {"val/loss": state.params.mean()},
        layout=Layout(axes=("data", "tensor"), state=((r"^params$", ("data", None, "tensor")),)),
    )
    mesh = make_mesh(parse("replica=2,data=2,tensor=2"))

    def told(experiment, count):
        text = Programs(experiment, members((), (), 0, count), mesh).compiled_step(None).as_text()
        return [one for one in collectives(text) if "replica" in axes(one, mesh.shape) and one.bytes > 100]

    assert told(experiment, 2) == []

    def of_its_own(state, batch, index):
        states, said = over_members(step, (0, None, None))(state, batch, index)
        return states, {"train/loss": said["train/loss"].mean()}

    own = experiment._replace(
        init=lambda key, hypers: Attending(jax.random.normal(key, (2, 2, 16, 4, 8))),
        step=of_its_own,
        layout=Layout(axes=("replica",), state=((r"^params$", ("replica", "data", None, "tensor")),)),
    )
    assert told(own, 1) == []


def check_batches_of_a_replay_are_divided():
    """Where the devices divide them."""
    mesh = make_mesh(parse("data=4"))
    with jax.set_mesh(mesh):
        for rows, cut in ((8, P(None, "data")), (6, P())):
            found = jax.jit(lambda x: rl.divided({"a": x}, 1)["a"])(np.ones((2, rows, 3), np.float32))
            assert found.sharding.is_equivalent_to(NamedSharding(mesh, cut), 3)


@pytest.mark.devices(8)
def test_on_eight_devices(tmp_path, capsys):
    """One process for all of them, since its start takes longer than they do."""
    check_what_is_explained_and_what_is_refused_leave_no_folder(tmp_path, capsys)
    check_pinned()
    check_placed()
    check_statistics_are_over_the_whole_batch()
    check_minibatches_are_of_groups()
    check_attention_is_spread()
    check_members_attend_by_themselves()
    check_batches_of_a_replay_are_divided()
