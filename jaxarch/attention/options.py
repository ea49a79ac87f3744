"""What every implementation is given beside queries, keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Key, PyTree

from jaxarch.attention.mask import Mask


class Options(NamedTuple):
    """As of `jaxarch.attention.attention`; what is None or 0 is off.

    An implementation is a function `(q, k, v, options) -> (out, lse)`, or `-> out` where it lacks `return_lse`. What
    `kv_start` and `kv_length` leave out has been made finite, and a dropout of 0 has no key.
    """

    mask: Mask
    scale: float
    bias: Float[Array, "#batch #heads #length #keys"] | None = None
    soft_cap: float | None = None
    sinks: Float[Array, "heads"] | None = None
    dropout: float = 0.0
    dropout_key: Key[Array, ""] | None = None
    axis: str | None = None

    @property
    def on(self) -> set[str]:
        """The names of those that an implementation may lack, as an error names them."""
        mask, offset = self.mask, self.mask.q_offset
        values = {
            "causal": mask.causal or None, "window": mask.window, "q_segments": mask.q_segments,
            "kv_start": mask.kv_start, "kv_length": mask.kv_length, "bias": self.bias, "soft_cap": self.soft_cap,
            "sinks": self.sinks, "dropout": self.dropout_key, "axis": self.axis,
            "q_offset": None if isinstance(offset, int) and offset == 0 else offset,
        }  # fmt: skip
        return {name for name, value in values.items() if value is not None}


def alike(tree: PyTree) -> PyTree:
    """All arrays as varying over the mesh axes over which any of them varies; outside a `jax.shard_map`, as they are.

    So that a gradient rule of ours may give each of them a gradient that varies, which is then summed for what did not.
    """

    def varying(x: Any) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying if isinstance(x, jax.Array) else frozenset()

    axes = frozenset().union(*map(varying, jax.tree.leaves(tree)))

    def one(x: Any) -> Any:
        lacking = tuple(axes - varying(x)) if isinstance(x, jax.Array) else ()
        return jax.lax.pcast(x, lacking, to="varying") if lacking else x

    return jax.tree.map(one, tree)
