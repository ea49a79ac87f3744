"""How a run is spread over devices: a mesh of named axes, and which of them cuts which array.

    replica   members of the run (seeds, points of a sweep)
    data      examples of a batch, environments
    fsdp      examples as well, and every array of the state, so that each device keeps a part of them
              (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et al. 2023)
    context   positions of a sequence, by ring attention (Liu et al. 2023)
    tensor    heads, hidden features and the vocabulary (Shoeybi et al. 2019, Megatron-LM)

A family states in its `Layout` which of them it can use and how its arrays are cut. All else is the compiler's: the
program is the one of a single device, and where the arrays lie decides what is sent (jax.sharding). So a run is the
same run on any mesh, up to the order in which numbers are added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxarch.run.protocol import Axis, ConfigError, Cut, Layout

AXES = ("replica", "data", "fsdp", "context", "tensor")  # from the slowest connection to the fastest
BATCH: Axis = ("data", "fsdp")  # what cuts the examples of a batch
WHOLE = 1 << 12  # numbers of an array that is too small to be worth cutting by `fsdp`


def parse(text: str) -> dict[str, int]:
    """`data=2,tensor=4` as sizes by axis, in the order of `AXES`. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ConfigError(f"--mesh {text}: there is no axis {name!r}; there are {', '.join(AXES)}.")
        if name in sizes:
            raise ConfigError(f"--mesh {text}: {name} stands twice.")
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"--mesh {text}: {name} is not a number of devices; write it as --mesh {name}=2.")
        sizes[name] = int(number)
    return {name: sizes[name] for name in AXES if name in sizes}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes, laid out by the devices' connections; over hosts or slices the first axis that can be
    is cut, whose devices speak least.

    Raises ConfigError where there are not as many devices.
    """
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else devices
    needed, shape = math.prod(sizes.values()), tuple(sizes.values())
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        all_of = "" if jax.process_count() == 1 else ", and several processes take all of them"
        raise ConfigError(f"--mesh {text} is of {needed} devices; there are {len(devices)}{all_of}.")
    some, devices = needed < len(devices), devices[:needed]
    granules = {getattr(device, "slice_index", device.process_index) for device in devices}
    outer = [1] * len(shape)
    outside = len(granules)
    for i, size in enumerate(shape):
        outer[i] = math.gcd(size, outside)
        outside //= outer[i]
    if len(granules) > 1 and outside == 1:
        by_process = not hasattr(devices[0], "slice_index")
        inner = [size // cut for size, cut in zip(shape, outer, strict=True)]
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    elif some:  # of one host's, which lie in no torus
        grid = np.array(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def check_axes(layout: Layout | None, sizes: Mapping[str, int], replicas: int) -> None:
    """Raises ConfigError for an axis that the experiment cannot use, or one that does not divide the members."""
    axes = layout.axes if layout else ()
    usable = ("replica", *(name for name in axes if name != "replica"))
    for name, size in sizes.items():
        if name not in usable and size > 1:
            raise ConfigError(f"--mesh {name}={size}: this experiment cannot use {name}; it can {', '.join(usable)}.")
    replica = sizes.get("replica", 1)
    if "replica" in axes and replica > 1:
        if replicas > 1:
            raise ConfigError(
                f"--mesh replica={replica}: this experiment has members of its own to spread; run the {replicas} "
                "members one by one."
            )
    elif replicas == 1 < replica:
        raise ConfigError(f"--mesh replica={replica} spreads members, and this run is one; give --replicas {replica}.")
    elif replicas % replica:
        raise ConfigError(
            f"--mesh replica={replica} does not divide the {replicas} members of the run; {divisors(replicas)} would."
        )


def written(axis: Axis, mesh: Mesh | AbstractMesh) -> str:
    """An axis as it stands on the command line."""
    return ",".join(f"{name}={mesh.shape[name]}" for name in names_of(axis))


def divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


# --- inside a step --------------------------------------------------------------------------------


def current() -> AbstractMesh | None:
    """The mesh that what is being traced will run on; None: one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def size_of(axis: Axis) -> int:
    """Over how many devices an axis, or several together, cuts. 1 where there is no mesh."""
    mesh = current()
    return 1 if mesh is None else parts_of(axis, mesh)


def parts_of(axis: Axis, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape.get(name, 1) for name in names_of(axis))


def names_of(axis: Axis) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


def present(axis: Axis, mesh: Mesh | AbstractMesh) -> Axis:
    """What of an axis the mesh has."""
    found = tuple(name for name in names_of(axis) if mesh.shape.get(name, 1) > 1)
    return found[0] if len(found) == 1 else found or None


def pinned(x: Array, *cut: Axis) -> Array:
    """`x` with its first dimensions cut by these axes, and the others whole. Without a mesh, `x`.

    What the compiler would do with an activation by itself depends on its size; pinned, it is known.
    """
    mesh = current()
    if mesh is None:
        return x
    spec = PartitionSpec(*(present(axis, mesh) for axis in cut))
    return jax.lax.with_sharding_constraint(x, spec)


def gathered(tree: PyTree, layout: Layout, leave: str = "$^", dtype: DTypeLike | None = None) -> PyTree:
    """Parameters as they are used: whole along `fsdp`, cut as the layout's rules say. Without a mesh, the tree.

    leave: those whose path has this in it stay as they are.
    dtype: that in which kernels are multiplied. They are rounded to it before they are sent, not after.
    """
    mesh = current()
    if mesh is None:
        return tree

    def one(path: tuple, leaf: Array) -> Array:
        name = path_name(path)
        if re.search(leave, name):
            return leaf
        axes = ruled(name, leaf.shape, layout, mesh)
        if dtype not in (None, leaf.dtype) and name.endswith("kernel"):
            # Pinned as it lies, or the compiler would send it first.
            leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), spec_of(name, leaf.shape, layout, mesh))
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def of_members(field: str) -> Layout:
    """Of a state that holds members of its own: `replica` cuts the first axis of all in this field of it."""
    return Layout(axes=("replica",), state=((rf"^{field}\.", ("replica",)),))


def over_members(function: Callable, in_axes: Any = 0) -> Callable:
    """`jax.vmap` over members that a state holds in itself, which `replica` cuts."""
    mesh = current()
    return jax.vmap(function, in_axes, spmd_axis_name=None if mesh is None else present("replica", mesh))


# --- where arrays lie -----------------------------------------------------------------------------


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def ruled(name: str, shape: tuple[int, ...], layout: Layout, mesh: Mesh | AbstractMesh) -> list[Axis]:
    """What cuts each dimension by the first of the layout's rules that the array's path fits."""
    cut = next((cut for pattern, cut in layout.state if re.search(pattern, name)), ())
    axes = []
    for axis, size in zip(_spread(cut, len(shape)), shape, strict=True):
        sure = isinstance(axis, str) and axis.endswith("?")
        axis = present(axis.removesuffix("?") if isinstance(axis, str) else axis, mesh)
        axes.append(None if sure and size % parts_of(axis, mesh) else axis)
    return axes


def _spread(cut: Cut, ndim: int) -> list[Axis]:
    """A rule's axes on an array's dimensions: on the last ones where the rule begins with an ellipsis."""
    if cut and cut[0] is Ellipsis:
        last = list(cut[1:])[-ndim:] if ndim else []
        return [None] * (ndim - len(last)) + last  # type: ignore[list-item]
    return (list(cut) + [None] * ndim)[:ndim]  # type: ignore[return-value]


def spec_of(name: str, shape: tuple[int, ...], layout: Layout, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array of the state is cut: by the layout's rule, and its largest dimension that is left by `fsdp`.

    Raises ConfigError where a rule's axis does not divide its dimension.
    """
    axes = ruled(name, shape, layout, mesh)
    for axis, dimension in zip(axes, shape, strict=True):
        if dimension % parts_of(axis, mesh):
            raise ConfigError(
                f"--mesh {written(axis, mesh)} does not divide the {dimension} of {name} {list(shape)}; "
                f"{divisors(dimension)} would."
            )
    fsdp = mesh.shape.get("fsdp", 1)
    taken = {n for axis in axes for n in names_of(axis)}
    if fsdp > 1 and "fsdp" not in taken and math.prod(shape) >= WHOLE:
        free = [(size, -i) for i, size in enumerate(shape) if axes[i] is None and size % fsdp == 0]
        if free:
            axes[-max(free)[1]] = "fsdp"
    return PartitionSpec(*axes)


def state_shardings(shapes: PyTree, layout: Layout | None, mesh: Mesh | AbstractMesh, several: bool) -> PyTree:
    """Of every array of the state of one member (`shapes`); with `several`, of all members together.

    Raises ConfigError where the mesh does not divide them: of `fsdp`, where it divides none of the large ones.
    """
    layout = layout or Layout()

    def one(path: tuple, leaf: Any) -> NamedSharding:
        spec = spec_of(path_name(path), tuple(leaf.shape), layout, mesh)
        return NamedSharding(mesh, PartitionSpec(present("replica", mesh), *spec) if several else spec)

    shardings = jax.tree_util.tree_map_with_path(one, shapes)
    largest = max((leaf.shape for leaf in jax.tree.leaves(shapes)), key=math.prod, default=())
    cut = {name for leaf in jax.tree.leaves(shardings) for axis in leaf.spec for name in names_of(axis)}
    if mesh.shape.get("fsdp", 1) > 1 and math.prod(largest) >= WHOLE and "fsdp" not in cut:
        raise ConfigError(
            f"--mesh {written('fsdp', mesh)} divides no large array of the state; {divisors(max(largest))} would."
        )
    return shardings


def batch_shardings(shapes: PyTree, layout: Layout | None, mesh: Mesh | AbstractMesh) -> PyTree:
    """Of the arrays of a batch. Raises ConfigError where the mesh does not divide them."""
    cut = (layout or Layout()).batch

    def one(path: tuple, leaf: Any) -> NamedSharding:
        axes = [present(axis, mesh) for axis in _spread(cut, len(leaf.shape))]
        for number, (axis, dimension) in enumerate(zip(axes, leaf.shape, strict=True)):
            parts = parts_of(axis, mesh)
            if dimension % parts:
                what = f"the {dimension} examples of a step" if number == 0 else f"a length of {dimension}"
                step = parts if number == 0 else 2 * parts  # under a causal mask each device takes two parts
                near = max(dimension // step, 1) * step
                raise ConfigError(
                    f"--mesh {written(axis, mesh)} does not divide {what}; {near} or {near + step} would do."
                )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, shapes)


def stacked(shardings: PyTree) -> PyTree:
    """Of arrays with one more axis before the others, which is whole."""
    return jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(None, *s.spec)), shardings)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """The same numbers, each array cut as its sharding says. Every process gives the whole of it."""

    def one(leaf: Any, sharding: NamedSharding) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.device_put(np.asarray(jax.random.key_data(leaf)), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(leaf if jax.process_count() == 1 else np.asarray(leaf), sharding)

    return jax.tree.map(one, tree, shardings)


def rows_here(batch_size: int, layout: Layout | None, mesh: Mesh) -> tuple[int, int]:
    """The first and one past the last example of a batch that this process's devices need."""
    axis = _spread((layout or Layout()).batch, 1)[0]
    sharding = NamedSharding(mesh, PartitionSpec(present(axis, mesh)))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    ranges = [part[0].indices(batch_size) for part in parts if part is not None]
    return min(start for start, *_ in ranges), max(stop for _, stop, _ in ranges)


def from_rows(rows: PyTree, first: int, batch_size: int, shardings: PyTree) -> PyTree:
    """Batches `[steps, batch, ...]` of which this process read the examples from `first` on, over all devices."""

    def one(own: np.ndarray, sharding: NamedSharding) -> Array:
        shape = (own.shape[0], batch_size, *own.shape[2:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(batch_size)
            return own[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, rows, stacked(shardings))


def on_host(array: Array) -> Any:
    """The whole of an array that is cut over devices, NumPy's (of keys, JAX's). To be called by all processes."""
    from jax.experimental import multihost_utils

    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(on_host(jax.random.key_data(array)), impl=jax.random.key_impl(array))
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return multihost_utils.process_allgather(array, tiled=True)
