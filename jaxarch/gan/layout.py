"""How GANs are cut over devices: examples by `data` and `fsdp`, and by `fsdp` every large array of the state.

What is computed over a batch (batch normalisation, the deviation over a minibatch, a penalty's mean) is so over the
whole of it, wherever its examples lie.
"""

from __future__ import annotations

import jax
from jaxtyping import PyTree

from jaxarch.run.mesh import BATCH, gathered, pinned
from jaxarch.run.protocol import Layout

LAYOUT = Layout(axes=("data", "fsdp"))


def examples(tree: PyTree) -> PyTree:
    """Samples, latents and what else has an axis of examples first."""
    return jax.tree.map(lambda leaf: pinned(leaf, BATCH), tree)


def used(params: PyTree) -> PyTree:
    """Parameters as a network is given them: whole."""
    return gathered(params, LAYOUT)
