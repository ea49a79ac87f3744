"""The compiled programs of a run: many steps a dispatch, many members at once.

A member is one seed at one point of the sweep. A run of several holds them along the leading axis of
every array of the state; batch and index are shared. So `vmap` sees an unbatched index, and a
`lax.cond` on it stays a conditional.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from jaxarch.run import backend, processes
from jaxarch.run import mesh as meshes
from jaxarch.run.operations import counted
from jaxarch.run.protocol import Axis, Batch, ConfigError, Experiment, Hypers, Mean, Metrics, State, field_of

NEVER = np.iinfo(np.int32).max
LARGE = 1 << 16  # bytes from which an array that a function closes over becomes an argument


class Member(NamedTuple):
    seed: int
    point: dict[str, float]  # the hypers that the sweep sets for it


class Sums(NamedTuple):
    """One metric, added up since the last log, and the first step at which it was not finite."""

    total: Float[Array, "*members"]
    weight: Float[Array, "*members"]
    bad: Int[Array, "*members"]


class Carry(NamedTuple):
    """All that goes from dispatch to dispatch, and into a checkpoint."""

    state: State
    sums: dict[str, Sums]


def members(
    hypers: Hypers,
    sweep: Sequence[str],
    seed: int,
    replicas: int,
    check: Callable[[Hypers], None] = lambda hypers: None,
) -> list[Member]:
    """The product of the sweep's axes (`field=a,b,c`) and the replicas' seeds.

    Raises ConfigError for a field that the experiment does not have, a value that is not a number, or one that the
    experiment's `check` refuses.
    """
    fields = getattr(hypers, "_fields", ())
    axes = []
    for axis in sweep:
        name, _, values = axis.partition("=")
        name = name.strip().lstrip("-").replace("-", "_").replace(".", "_")
        if name not in fields:
            known = ", ".join(field.replace("_", "-") for field in fields) or "none"
            raise ConfigError(f"--sweep {axis}: no such number; this experiment can vary: {known}.")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(f"--sweep {axis}: the values are not numbers; write it as --sweep {name}=1,2,3.")
        try:
            for number in numbers:
                check(hypers._replace(**{name: number}))
        except ConfigError as error:
            raise ConfigError(f"--sweep {axis}: {error}") from None
        axes.append([(name, number) for number in numbers])
    named = [axis[0][0] for axis in axes]
    for axis in axes:
        if len(set(axis)) < len(axis):
            name = axis[0][0].replace("_", "-")
            raise ConfigError(f"--sweep {name} has the same value twice; --replicas gives several seeds.")
    if len(set(named)) < len(named):
        raise ConfigError(f"--sweep names {max(named, key=named.count)} twice; give all its values at once.")
    points = [dict(point) for point in itertools.product(*axes)]
    return [Member(seed + replica, point) for point in points for replica in range(replicas)]


class Closed(NamedTuple):
    """A function of `(constants, *arguments)`, its constants, the shapes of its result, and its program."""

    pure: Callable[..., Any]
    constants: list[Array]
    shapes: PyTree
    jaxpr: Jaxpr


def closed(function: Callable, *arguments: PyTree) -> Closed:
    """`function` with the large arrays that it closes over made its first argument.

    Compiled as it stands, such an array (pretrained weights, a validation set) would be a constant of
    the program: copied into it and folded at compile time.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    large = [getattr(constant, "nbytes", 0) >= LARGE for constant in traced.consts]
    structure = jax.tree.structure(shapes)

    def pure(constants: list[Array], *arguments: PyTree) -> PyTree:
        given = iter(constants)
        all_constants = [next(given) if is_large else c for c, is_large in zip(traced.consts, large, strict=True)]
        outputs = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, all_constants))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(structure, outputs)

    constants = [jnp.asarray(c) for c, is_large in zip(traced.consts, large, strict=True) if is_large]
    return Closed(pure, constants, shapes, traced.jaxpr)


def add(sums: dict[str, Sums], metrics: Metrics, index: Int[Array, ""]) -> dict[str, Sums]:
    def one(sum_: Sums, metric: Mean | Array) -> Sums:
        total, weight = metric if isinstance(metric, Mean) else (metric, jnp.ones_like(metric))
        bad = jnp.where(jnp.isfinite(total) & jnp.isfinite(weight), NEVER, index)
        total, weight = total.astype(sum_.total.dtype), weight.astype(sum_.weight.dtype)
        return Sums(sum_.total + total, sum_.weight + weight, jnp.minimum(sum_.bad, bad))

    return {name: one(sums[name], metric) for name, metric in metrics.items()}


def zero_sums(metrics: dict[str, Any]) -> dict[str, Sums]:
    """Empty sums for metrics of these shapes."""

    def zero(metric: Any) -> Sums:
        first = jax.tree.leaves(metric)[0]
        shape, dtype = jnp.shape(first), jnp.promote_types(first.dtype, jnp.float32)
        return Sums(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(shape, NEVER, jnp.int32))

    return {name: zero(metric) for name, metric in metrics.items()}


def restart(sums: dict[str, Sums]) -> dict[str, Sums]:
    """Sums as they stand after a log: empty, but a step that was not finite is remembered."""
    return {name: Sums(jnp.zeros_like(s.total), jnp.zeros_like(s.weight), s.bad) for name, s in sums.items()}


def shape_of(tree: PyTree) -> PyTree:
    """Shapes, types and, of arrays that are cut over a mesh, how."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        cut = sharding if isinstance(sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=cut)

    return jax.tree.map(one, tree)


def check_fields(state: State, names: Sequence[str], who: str) -> None:
    lacking = []
    for name in names:
        try:
            field_of(state, name)
        except AttributeError:
            lacking.append(name)
    if lacking:
        raise ConfigError(f"{who} {', '.join(lacking)}, which its state has no field for.")


class Programs:
    """What a run calls: each function of the experiment, over all members, compiled once.

    Compiles when first called and keeps the seconds that it took in `compile_seconds`.

    mesh: the devices over which the state and the batches are cut (`jaxarch.run.mesh`); None: one.
    """

    def __init__(self, experiment: Experiment, members: list[Member], mesh: Mesh | None = None):
        self.experiment, self.members, self.mesh, self.compile_seconds = experiment, members, mesh, 0.0
        self.solo = len(members) == 1
        self.notes: set[str] = set()  # what was chosen on compiling, each a line for the run's log
        self._compiled: dict[Any, Any] = {}
        keys = [jax.random.key(member.seed) for member in members]
        hypers = [hypers_at(experiment.hypers, member.point) for member in members]
        self._keys = keys[0] if self.solo else jnp.stack(keys)
        self.keys = self._spread(self._keys)
        self.hypers = self._spread(hypers[0] if self.solo else jax.tree.map(lambda *h: jnp.stack(h), *hypers))
        self._init = self._closed(experiment.init, keys[0], hypers[0])
        self.member_shape = self._init.shapes
        check_fields(self.member_shape, experiment.weights, "the experiment's weights are called")
        check_fields(self.member_shape, experiment.newest_only, "what only the newest checkpoint keeps is called")
        self.state_shape = jax.eval_shape(self._over(self._init.pure, 2), self._init.constants, self.keys, self.hypers)
        self.shardings = None
        if mesh is not None:
            self.shardings = meshes.state_shardings(self.member_shape, experiment.layout, mesh, not self.solo)
            self.state_shape = jax.tree.map(
                lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                self.state_shape,
                self.shardings,
            )
        self._step: Closed | None = None
        self._evaluate: Closed | None = None
        self._unroll: bool | None = None

    def _over(self, pure: Callable, mapped: int, shared: int = 0) -> Callable:
        """Over the members: the constants are shared, then `mapped` arguments, then `shared` ones."""
        if self.solo:
            return pure
        return jax.vmap(pure, in_axes=(None, *[0] * mapped, *[None] * shared), spmd_axis_name=self._replica())

    def _replica(self) -> Axis:
        """What cuts the members, if anything does."""
        return None if self.mesh is None else meshes.present("replica", self.mesh)

    def _spread(self, tree: PyTree) -> PyTree:
        """What each member has of its own, or all share: whole on every device that has the member."""
        if self.mesh is None:
            return tree
        axis = None if self.solo else self._replica()
        sharding = NamedSharding(self.mesh, PartitionSpec(axis) if axis else PartitionSpec())
        return meshes.placed(tree, jax.tree.map(lambda _: sharding, tree))

    def _on_all(self) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def _within(self) -> contextlib.AbstractContextManager:
        """In which functions are traced, so that they know the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _closed(self, function: Callable, *arguments: PyTree) -> Closed:
        if self.mesh is None:
            return closed(function, *arguments)
        traced: list[Closed] = []

        def trace(number: Any) -> Any:
            traced.append(closed(function, *arguments))
            return number

        # What a gradient keeps of a shard_map is cut by all axes but those of the vmaps around it. So that of `_over`
        # must be there already, though its members are not.
        replica = self._replica()
        around = jax.vmap(trace, spmd_axis_name=replica) if replica else trace
        with self._within():
            around(np.arange(len(self.members)))
        (found,) = traced
        whole = self._on_all()
        return found._replace(constants=[meshes.placed(constant, whole) for constant in found.constants])

    def _call(
        self, name: Any, function: Callable, *arguments: PyTree, donate: tuple[int, ...] = (), results: PyTree = None
    ) -> PyTree:
        compiled = self._compile(name, function, *arguments, donate=donate, results=results)
        return compiled(*arguments)

    def _compile(
        self, name: Any, function: Callable, *arguments: PyTree, donate: tuple[int, ...] = (), results: PyTree = None
    ) -> jax.stages.Compiled:
        """arguments: or their shapes.
        results: how what it returns is cut over the mesh, if there is one; where None, it is whole everywhere.
        """
        if name not in self._compiled:
            start = time.perf_counter()
            spread: Any = {} if self.mesh is None else {"out_shardings": results or self._on_all()}
            with self._within():
                traced = jax.jit(function, donate_argnums=donate, **spread).trace(*arguments)
            compiled, options = backend.compiled(traced)
            self._compiled[name] = compiled
            # On CPU a program that begins to speak with the others waits for them half a minute alone.
            processes.largest(0)
            memory = compiled.memory_analysis()
            if memory and backend.make_room(memory.temp_size_in_bytes):
                self.notes.add(f"{memory.temp_size_in_bytes / 1e9:.1f} GB of temporaries are given back at each call")
            if options:
                self.notes.add("compiled with " + ", ".join(f"{key}={value}" for key, value in options.items()))
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[name]

    def init(self) -> State:
        """The first state. Compiled, so that what stands twice in it (an average that begins as the parameters) has
        two buffers, and both can be donated.
        """
        pure, constants, *_ = self._init
        return self._call("init", self._over(pure, 2), constants, self.keys, self.hypers, results=self.shardings)

    def place(self, state: PyTree) -> PyTree:
        """A state that was made or read elsewhere, where this run's lie."""
        return state if self.mesh is None else meshes.placed(state, self.shardings)

    def sums(self, batch: Batch) -> dict[str, Sums]:
        """Empty sums for the metrics of a step; `batch` is one step's."""
        step = self._traced_step(batch)
        shared = (shape_of(batch), jax.ShapeDtypeStruct((), jnp.int32))
        metrics = jax.eval_shape(self._over(step.pure, 1, 2), step.constants, self.state_shape, *shared)[1]
        sums = zero_sums(metrics)
        return sums if self.mesh is None else meshes.placed(sums, jax.tree.map(lambda _: self._on_all(), sums))

    def _traced_step(self, batch: Batch) -> Closed:
        if self._step is None:
            index = jax.ShapeDtypeStruct((), jnp.int32)
            if self.mesh is not None:  # refused before anything else is made of it
                meshes.batch_shardings(shape_of(batch), self.experiment.layout, self.mesh)
            self._step = self._closed(self.experiment.step, self.member_shape, shape_of(batch), index)
            state = self._step.shapes[0]
            if jax.tree.structure(state) != jax.tree.structure(self.member_shape):
                raise TypeError(f"step returns another structure of state than init: {state} != {self.member_shape}")
        return self._step

    def operations(self) -> dict[str, float]:
        """Floating-point operations of a step of all members by type, once it is traced; none where not known."""
        assert self._step is not None, "sums comes first"
        given = self.experiment.flops
        found = counted(self._step.jaxpr) if given is None else given
        return {dtype: float(len(self.members) * number) for dtype, number in (found or {}).items()}

    def steps(self, carry: Carry, batches: Batch, index: int) -> Carry:
        """Steps `index, index + 1, ...`, one for each of the leading axis of `batches`, in one dispatch.

        `carry` is donated. Where the state holds its own world, `batches` is the number of steps.
        """
        given = None if isinstance(batches, int) else batches
        compiled = self._steps(carry, batches)
        assert self._step is not None
        return compiled(self._step.constants, carry, given, np.int32(index))

    def compiled_step(self, batch: Batch) -> jax.stages.Compiled:
        """The program of one step, without anything made that it would need. batch: one step's, or its shapes."""
        sums = self.sums(batch)
        batches = 1
        if batch is not None:
            shapes = shape_of(batch)
            cut = None
            if self.mesh is not None:
                cut = meshes.stacked(meshes.batch_shardings(shapes, self.experiment.layout, self.mesh))
            batches = jax.tree.map(
                lambda leaf, *s: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype, sharding=s[0] if s else None),
                shapes,
                *([] if cut is None else [cut]),
            )
        return self._steps(Carry(self.state_shape, sums), batches)

    def _steps(self, carry: Carry, batches: Batch) -> jax.stages.Compiled:
        """The program of `steps`. carry, batches: or their shapes."""
        count = batches if isinstance(batches, int) else jax.tree.leaves(batches)[0].shape[0]
        batches = None if isinstance(batches, int) else batches
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
        pure, constants, *_ = self._traced_step(first)
        step = self._over(pure, 1, 2)
        unroll = count > 1 and self._unrolls(first)

        def dispatch(constants: list[Array], carry: Carry, batches: Batch, first: Int[Array, ""]) -> Carry:
            def body(carry: Carry, batch_and_index: tuple) -> tuple[Carry, None]:
                batch, index = batch_and_index
                state, metrics = step(constants, carry.state, batch, index)
                return Carry(state, add(carry.sums, metrics, index)), None

            indices = first + jnp.arange(count, dtype=jnp.int32)
            if count == 1 or unroll:
                for i in range(count):
                    carry, _ = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], (batches, indices)))
                return carry
            return jax.lax.scan(body, carry, (batches, indices))[0]

        if count > 1:
            self.notes.add(f"{count} steps a dispatch, {'unrolled' if unroll else 'as lax.scan'}")
        results = None
        if self.mesh is not None:
            results = Carry(self.shardings, jax.tree.map(lambda _: self._on_all(), carry.sums))
        arguments = constants, carry, batches, np.int32(0)
        return self._compile(("steps", count), dispatch, *arguments, donate=(1,), results=results)

    def on_mesh(self, batches: PyTree, first: int) -> PyTree:
        """Batches `[steps, examples, ...]` over all devices; this process read the examples from `first` on."""
        if self.mesh is None or not jax.tree.leaves(batches) or isinstance(batches, int):
            return batches
        size, layout = self.experiment.batch_size, self.experiment.layout
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[2:]), leaf.dtype), batches)
        return meshes.from_rows(batches, first, size, meshes.batch_shardings(one, layout, self.mesh))

    def _unrolls(self, batch: Batch) -> bool:
        """Whether many steps are written out one after another rather than scanned."""
        if self._unroll is None:
            program = str(self._traced_step(batch).jaxpr)
            self._unroll = backend.platform() == "cpu" and backend.slow_in_loops(program)
        return self._unroll

    def evaluate(self, state: State, index: int) -> Metrics:
        """The experiment's metrics of every member after `index` steps."""
        keys = self._spread(self.report_keys(index))
        if self._evaluate is None:
            self._evaluate = self._closed(self.experiment.evaluate, self.member_shape, jax.random.key(0))
        pure, constants, *_ = self._evaluate
        return self._call("evaluate", self._over(pure, 2), constants, state, keys)

    def report_keys(self, index: int) -> Array:
        """One key a member, apart from those of training: `fold_in` of the seed's key with -1 - index."""
        number = np.uint32(2**32 - 1 - index)
        fold = jax.random.fold_in if self.solo else jax.vmap(jax.random.fold_in, (0, None))
        return fold(self._keys, number)

    def finite(self, state: State) -> np.ndarray:
        """Which members' weights are all finite, as `[members]`."""

        def finite(state: State) -> Array:
            leaves = jax.tree.leaves([field_of(state, name) for name in self.experiment.weights])
            floats = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
            return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all() if floats else jnp.array(True)

        return np.atleast_1d(self._call("finite", finite if self.solo else jax.vmap(finite), state))

    def member(self, state: State, number: int) -> State:
        """One member's own state."""
        return state if self.solo else jax.tree.map(lambda leaf: leaf[number], state)

    def whole(self, tree: PyTree) -> PyTree:
        """In this host's memory, array by array: no device need have room for it. To be called by all processes.

        Without a mesh, as it is.
        """
        return tree if self.mesh is None else jax.tree.map(meshes.on_host, tree)


def hypers_at(defaults: Hypers, point: dict[str, float]) -> Hypers:
    if not point:
        return jax.tree.map(jnp.asarray, defaults)
    return jax.tree.map(jnp.asarray, defaults._replace(**point))
