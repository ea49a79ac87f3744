"""How Transformers are cut over devices (Shoeybi et al. 2019, sec. 3): stated once, for all of them.

Heads and hidden features are cut by `tensor`: the first product of each pair by its columns, the second by its rows, so
that a layer sends its output alone, twice in each direction. The vocabulary is cut too. Activations between layers are
cut by their examples and positions, and parameters are made whole along `fsdp` where they are used.
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxarch.run.mesh import BATCH, current, gathered, pinned, present, size_of, written
from jaxarch.run.protocol import ConfigError, Layout

LAYOUT = Layout(
    axes=("data", "fsdp", "tensor", "context"),
    state=(
        (r"(query|key|value|up|gate)\.kernel$", (..., None, "tensor")),
        (r"(query|key|value|up|gate)\.bias$", (..., "tensor")),
        (r"\.(out|down)\.kernel$", (..., "tensor", None)),
        (r"(^|\.)embedding\.embedding$", ("tensor?", None)),
        (r"readout\.kernel$", (None, "tensor?")),
    ),
    batch=(BATCH, "context"),
)
# Where positions are not cut: a picture's axes are none, and a class token makes the number of patches odd; a text and
# its translation have lengths of their own.
UNCUT = LAYOUT._replace(axes=("data", "fsdp", "tensor"), batch=(BATCH,))
IN_LAYERS = r"(^|\.)layers(_\d+)?\."  # of a parameter that is used in a layer alone


def residual(x: Array) -> Array:
    """`[batch, length, ...]` between layers."""
    return pinned(x, BATCH, "context")


def scores(x: Array) -> Array:
    """Logits `[batch, length, vocab]`."""
    vocab = "tensor" if x.shape[-1] % size_of("tensor") == 0 else None
    return pinned(x, BATCH, "context", vocab)


def micro_batches(batch: PyTree, parts: int) -> PyTree:
    """`[parts, batch / parts, ...]`: every `parts`-th example, so that each device cuts its own and sends none.

    Raises ConfigError where the mesh does not divide a micro-batch.
    """
    mesh, devices = current(), size_of(BATCH)

    def one(leaf: Array) -> Array:
        examples = leaf.shape[0] // parts
        if mesh is not None and examples % devices:
            raise ConfigError(
                f"--mesh {written(present(BATCH, mesh), mesh)} does not divide the {examples} examples of a "
                f"micro-batch; --batch-size {max(examples // devices, 1) * devices * parts} would do."
            )
        apart = leaf.reshape(examples, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return pinned(apart, *(None, BATCH, "context")[: apart.ndim])

    return jax.tree.map(one, batch)


def used(params: PyTree, leave: str = "$^", dtype: DTypeLike | None = None) -> PyTree:
    """Parameters made whole along `fsdp`, but for those with `leave` in their path; kernels rounded to `dtype`."""
    return gathered(params, LAYOUT, leave, dtype)
