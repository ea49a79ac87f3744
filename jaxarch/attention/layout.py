"""How implementations lay arrays out for their products, and back."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped


def split(
    x: Shaped[Array, "batch length heads *rest"], kv_heads: int
) -> Shaped[Array, "batch kv_heads group length *rest"]:
    """Heads before positions, so that products read arrays as they lie, and cut by the keys' heads that they share."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]), 1, 3)


def merged(x: Shaped[Array, "batch kv_heads group length *rest"]) -> Shaped[Array, "batch length heads *rest"]:
    """Back from `split`."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def filled(x: Shaped[Array, "..."], axis: int, block: int) -> Shaped[Array, "..."]:
    """With zeros up to whole blocks."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def grouped(
    x: Float[Array, "batch heads some others"], kv_heads: int, group: int
) -> Float[Array, "batch _ _ some others"]:
    """The axis of heads cut into those of the keys and their groups, where it is not 1."""
    return x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (kv_heads, group)), *x.shape[2:])


def products(
    x: Float[Array, "batch kv_heads group some inner"], y: Float[Array, "batch kv_heads others inner"], wide: DTypeLike
) -> Float[Array, "batch kv_heads group some others"]:
    """x y^T for each head. One axis of batch and heads, one of group and rows: more axes cost a fifth on CPU."""
    batch, kv_heads, group, some, inner = x.shape
    x, y = x.reshape(batch * kv_heads, group * some, inner), y.reshape(batch * kv_heads, -1, inner)
    out = jnp.einsum("hti,hsi->hts", x, y, preferred_element_type=wide)
    return out.reshape(batch, kv_heads, group, some, -1)
