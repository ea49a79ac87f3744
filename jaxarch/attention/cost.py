"""What attention costs, by formula: pairs of query and key that the mask shows, products of floating-point numbers.

Nothing is compiled: the compiler's own count takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int

Pass = Literal["forward", "backward", "forward_backward"]


def visible_pairs(
    length: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    q_offset: int = 0,
    q_segments: Int[np.ndarray, "length"] | None = None,
    kv_segments: Int[np.ndarray, "keys"] | None = None,
) -> int:
    """How many pairs of query and key of one row and head the mask shows, exactly; the options as of `attention`."""
    q_segments = np.zeros(length, int) if q_segments is None else q_segments
    kv_segments = np.zeros(keys, int) if kv_segments is None else kv_segments
    pairs = 0
    for segment in np.unique(q_segments):
        queries = np.flatnonzero(q_segments == segment) + q_offset
        own = np.flatnonzero(kv_segments == segment)
        # The keys from `first` on, before `end`.
        first = np.full(len(queries), 0) if window is None else queries - window + 1
        end = np.full(len(queries), keys) if window is None else queries + window
        end = np.minimum(end, queries + 1) if causal else end
        seen = np.searchsorted(own, end) - np.searchsorted(own, first)
        pairs += int(np.maximum(seen, 0).sum())
    return pairs


def flops(
    pairs: int, batch: int, heads: int, dim: int, width: int, pass_: Pass = "forward", weights_kept: bool = False
) -> int:
    """Floating-point operations of the matrix products, two for each multiplication and addition.

    Forward there are two, q k^T and weights v. Backward there are the gradients of the values, of the weights, of the
    queries and of the keys, and q k^T once more unless the weights were kept: 2.5 times the forward pass where
    dim = width, or 2 times (Dao 2023, sec. 4.1).

    pairs: of one row and head (`visible_pairs`).
    dim, width: of a head's keys, and of its values.
    """
    forward = dim + width
    backward = 2 * dim + 2 * width + (0 if weights_kept else dim)
    products = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[pass_]
    return 2 * batch * heads * pairs * products


def projection_flops(batch: int, length: int, dim: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Of the four projections of a layer's attention, forward: queries, keys, values, and the output."""
    return 2 * batch * length * dim * head_dim * (2 * heads + 2 * kv_heads)


def crossover(dim: int, causal: bool) -> int:
    """The length from which on a layer's attention takes more operations than its projections.

    Where heads times their width is dim and all have keys of their own: 4 n^2 d = 8 n d^2, so n = 2 d; causal
    attention shows half of the pairs, so 4 d.
    """
    return 4 * dim if causal else 2 * dim
