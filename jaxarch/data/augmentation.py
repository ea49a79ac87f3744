"""Random changes of a batch of pictures that leave what they show: each is a pure function of its key.

All leave shapes and types as they are. Pictures are `[batch, height, width, channels]`; those that mix pictures mix the
targets, `[batch, classes]`, with them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num


def random_crop(
    key: Key[Array, ""], pictures: Num[Array, "batch height width channels"], padding: int, fill: float = 0.0
) -> Num[Array, "batch height width channels"]:
    """Each picture moved by up to `padding` pixels along both axes, all moves alike likely.

    fill: what comes in from outside. The random crop from a padded picture of He et al. 2016, sec. 4.2.
    """
    height, width = pictures.shape[1:3]
    around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    padded = jnp.pad(pictures, around, constant_values=fill)
    corners = jax.random.randint(key, (len(pictures), 2), 0, 2 * padding + 1)

    def cut(picture: Array, corner: Int[Array, "2"]) -> Array:
        return jax.lax.dynamic_slice(picture, (*corner, 0), (height, width, picture.shape[-1]))

    return jax.vmap(cut)(padded, corners)


def random_flip(
    key: Key[Array, ""], pictures: Num[Array, "batch height width channels"]
) -> Num[Array, "batch height width channels"]:
    """Each picture mirrored left to right, or not, with equal chances."""
    flipped = jax.random.bernoulli(key, 0.5, (len(pictures), 1, 1, 1))
    return jnp.where(flipped, pictures[:, :, ::-1], pictures)


def mixup(
    key: Key[Array, ""],
    pictures: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    alpha: float,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Each picture x, and its target, becomes lambda x + (1 - lambda) x', lambda ~ Beta(alpha, alpha).

    x' is another picture of the batch, or the same. Zhang et al. 2018, eq. 1, with a lambda for each pair.
    """
    order_key, share_key = jax.random.split(key)
    others = jax.random.permutation(order_key, len(pictures))
    share = jax.random.beta(share_key, alpha, alpha, (len(pictures),)).astype(pictures.dtype)

    def mixed(x: Array) -> Array:
        own = share.reshape(-1, *[1] * (x.ndim - 1))
        return own * x + (1 - own) * x[others]

    return mixed(pictures), mixed(targets)


def cutmix(
    key: Key[Array, ""],
    pictures: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    alpha: float,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """A box of each picture is replaced by that of another, and the targets are mixed by the pixels' share.

    The box has the picture's proportions and a share of 1 - lambda of its area, lambda ~ Beta(alpha, alpha); its centre
    lies anywhere, and what reaches beyond the edge is cut off (Yun et al. 2019, sec. 3.1 and eq. 2).
    """
    order_key, share_key, place_key = jax.random.split(key, 3)
    count, (height, width) = len(pictures), pictures.shape[1:3]
    others = jax.random.permutation(order_key, count)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, (count,)))
    centre = jax.random.uniform(place_key, (count, 2))

    def inside(size: int, centre: Float[Array, "batch"]) -> Array:
        """Which pixels of an axis lie in the box: those whose centre does."""
        pixels = (jnp.arange(size) + 0.5) / size
        return jnp.abs(pixels - centre[:, None]) < side[:, None] / 2

    box = inside(height, centre[:, 0])[:, :, None] & inside(width, centre[:, 1])[:, None, :]
    share = box.mean((1, 2)).astype(targets.dtype)[:, None]
    return jnp.where(box[..., None], pictures[others], pictures), (1 - share) * targets + share * targets[others]
