"""How reinforcement learning is cut over devices: environments by `data`, and what each has of its own with them.

The networks are small and stand whole on every device; gradients are means over all environments. Steps are shuffled
into minibatches within groups of environments (`--agent.groups`): where a group is not on one device, what is shuffled
is sent.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Int, PyTree

from jaxarch.run.mesh import divisors, pinned, size_of
from jaxarch.run.protocol import ConfigError, Layout

LAYOUT = Layout(
    axes=("data",),
    state=(
        (r"^world\.", ("data",)),
        (r"^learner\.(under_way|replay\.finals)", ("data",)),
        (r"^learner\.replay\.priorities", ()),
        (r"^learner\.replay\.", (None, "data")),
    ),
)


def check_envs(envs: int) -> None:
    """Raises ConfigError where the mesh does not divide the environments."""
    if envs % size_of("data"):
        raise ConfigError(f"--mesh data={size_of('data')} does not divide --envs {envs}; {divisors(envs)} would.")


def grouped(tree: PyTree, groups: int) -> PyTree:
    """Of `[time, envs, ...]` the steps of each group of environments, `[groups, steps, ...]`.

    Raises ConfigError where a mesh would cut a group.
    """
    devices = size_of("data")
    if groups % devices:
        near = -(-groups // devices) * devices
        raise ConfigError(f"--mesh data={devices} does not divide --agent.groups {groups}; {near} would do.")

    def one(leaf: Array) -> Array:
        time, envs = leaf.shape[:2]
        apart = leaf.reshape(time, groups, envs // groups, *leaf.shape[2:]).swapaxes(0, 1)
        return pinned(apart.reshape(groups, time * envs // groups, *leaf.shape[2:]), "data")

    return jax.tree.map(one, tree)


def divided(tree: PyTree, dimension: int = 0) -> PyTree:
    """Batches drawn from a replay, with the examples of this dimension over the devices, each of which then learns from
    its part. Where the devices do not divide them all learn from all.
    """
    nothing = (None,) * dimension

    def one(leaf: Array) -> Array:
        return leaf if leaf.shape[dimension] % size_of("data") else pinned(leaf, *nothing, "data")

    return jax.tree.map(one, tree)


def shuffled(tree: PyTree, order: Int[Array, "groups steps"], minibatches: int) -> PyTree:
    """Minibatches `[minibatches, steps, ...]` of the steps of groups `[groups, steps, ...]`, each group's in its order;
    every minibatch has as many of each group.
    """

    def one(leaf: Array) -> Array:
        groups, steps = order.shape
        if groups == 1:
            return leaf[0][order[0]].reshape(minibatches, -1, *leaf.shape[2:])
        own = pinned(jax.vmap(lambda leaf, order: leaf[order])(leaf, order), "data")
        apart = own.reshape(groups, minibatches, steps // minibatches, *leaf.shape[2:]).swapaxes(0, 1)
        return pinned(apart.reshape(minibatches, -1, *leaf.shape[2:]), None, "data")

    return jax.tree.map(one, tree)
