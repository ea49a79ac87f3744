"""What attention costs, by formula: pairs of query and key that the mask shows, operations, bytes moved and held.

Nothing is compiled: the compiler's own count takes the body of a loop once, however often it runs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxarch.attention.blocks import starts
from jaxarch.attention.blockwise import KEYS, QUERIES
from jaxarch.attention.window import sizes

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


def linear_flops(batch: int, length: int, heads: int, kv_heads: int, dim: int, width: int, chunk: int) -> int:
    """Of gated linear attention, forward: each head's state takes k v^T and gives q S, and within a chunk its queries
    meet its keys and values as in attention, masked ones too (Yang et al. 2024, sec. 4). chunk 1: the recurrence.
    """
    state = (heads + kv_heads) * dim * width
    within = heads * chunk * (dim + width) if chunk > 1 else 0
    return 2 * batch * length * (state + within)


def projection_flops(batch: int, length: int, dim: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Of the four projections of a layer's attention, forward: queries, keys, values, and the output."""
    return 2 * batch * length * dim * head_dim * (2 * heads + 2 * kv_heads)


def crossover(dim: int, causal: bool) -> int:
    """The length from which on a layer's attention takes more operations than its projections.

    Where heads times their width is dim and all have keys of their own: 4 n^2 d = 8 n d^2, so n = 2 d; causal
    attention shows half of the pairs, so 4 d.
    """
    return 4 * dim if causal else 2 * dim


class Shape(NamedTuple):
    """Of self-attention over `length` positions. itemsize: bytes of a number of q, k, v and the output."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    width: int
    itemsize: int = 4

    @property
    def wide(self) -> int:
        """Bytes of a logit."""
        return max(self.itemsize, 4)

    @property
    def queries(self) -> int:
        """Bytes of q."""
        return self.batch * self.length * self.heads * self.dim * self.itemsize

    @property
    def keys_values(self) -> int:
        """Bytes of k and v."""
        return self.batch * self.length * self.kv_heads * (self.dim + self.width) * self.itemsize

    @property
    def out(self) -> int:
        return self.batch * self.length * self.heads * self.width * self.itemsize

    @property
    def rows(self) -> int:
        """Queries of all heads."""
        return self.batch * self.length * self.heads


def given_and_made(shape: Shape, pass_: Pass) -> int:
    """Bytes of the arguments and results: q, k, v and the output; with the gradients of q, k and v where there are."""
    inputs = shape.queries + shape.keys_values
    return {
        "forward": inputs + shape.out,
        "backward": 2 * inputs + 2 * shape.out,
        "forward_backward": 2 * inputs + shape.out,
    }[pass_]


def weights_held(implementation: str, shape: Shape, causal: bool = False, window: int | None = None) -> int:
    """Bytes of the weights that are in memory at once. Raises ValueError where there is no formula."""
    n = shape.length
    if implementation == "dense":
        weights = n * n
    elif implementation == "blocks":
        weights = sum((end - start) * end for start, end in starts(n))
    elif implementation == "window" and window is not None:
        block, before, after = sizes(window, n, causal)
        weights = block * block * (before + 1 + after)
    elif implementation == "blockwise":
        weights = min(QUERIES, n) * min(KEYS, n)
    else:
        raise ValueError(
            f"there is no formula for {implementation!r}; there are those of dense, blocks, blockwise, window."
        )
    return shape.batch * shape.heads * shape.wide * weights


def peak_bytes(
    implementation: str, shape: Shape, pass_: Pass = "forward", causal: bool = False, window: int | None = None
) -> int:
    """The most that is in memory at once: arguments, results, and what lies between.

    Weights twice, as logits and as weights, or as weights and what the backward pass makes of them; blocks keeps its
    weights for the backward pass as well. blockwise has a copy of the keys and values, backward of the queries and
    the output's gradient, beside the queries' gradient in float32. window has a copy of keys and values for each
    block that a window reaches, and of the queries and the output.

    Within a quarter of what the compiler plans for float32 on CPU. It may do better than dense by fusing, and has
    float32 copies there of what is bfloat16.
    """
    weights = weights_held(implementation, shape, causal, window)
    passes = 1 if pass_ == "forward" else 2
    between = 2 * weights * (passes if implementation == "blocks" else 1)
    if implementation == "blockwise":
        gradient = shape.rows * shape.dim * shape.wide
        between = (shape.keys_values + 3 * weights, shape.queries + shape.out + gradient + 5 * weights)[passes - 1]
    if implementation == "window" and window is not None:
        _, before, after = sizes(window, shape.length, causal)
        between += passes * (before + 1 + after) * shape.keys_values + shape.queries + shape.out
    return given_and_made(shape, pass_) + between


def bytes_moved(
    implementation: str,
    shape: Shape,
    pairs: int,
    pass_: Pass = "forward",
    causal: bool = False,
    window: int | None = None,
) -> int:
    """Bytes read from memory and written to it where blocks stay in the cache (Dao et al. 2022, sec. 3.2).

    dense and blocks write each logit and weight and read it again; backward the weights are read, and what is made of
    them twice is written and read. blockwise reads keys and values once for each block of queries that sees them;
    backward the queries, the output's gradient and the queries' own once for each block of keys, and writes the last.
    window reads for each block of queries the blocks of keys that it reaches, as they lie and as copies.

    pairs: of one row and head that the mask shows (`visible_pairs`).
    """
    once, weights = given_and_made(shape, pass_), weights_held(implementation, shape, causal, window)
    if implementation in ("dense", "blocks"):
        return once + {"forward": 4, "backward": 5, "forward_backward": 9}[pass_] * weights
    if implementation == "window" and window is not None:
        _, before, after = sizes(window, shape.length, causal)
        gathered = 3 * (before + 1 + after) * shape.keys_values  # copied, and the copy read
        return once + {"forward": 1, "backward": 2, "forward_backward": 3}[pass_] * gathered
    a_key = shape.batch * shape.kv_heads * (shape.dim + shape.width) * shape.itemsize
    a_query = shape.batch * shape.heads * ((shape.dim + shape.width) * shape.itemsize + 2 * shape.dim * shape.wide)
    forward, backward = pairs * a_key // QUERIES, pairs * a_query // KEYS
    return once + {"forward": forward, "backward": backward, "forward_backward": forward + backward}[pass_]
