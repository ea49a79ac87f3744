"""Texts as vectors: the mean of an encoder's token vectors (Reimers & Gurevych 2019, sec. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, PyTree

from jaxarch.data.tokenization import Subwords, Tokenizer
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.encoder import Encoder

SHORTEST = 16  # rows are padded to this many tokens, or twice, four times ... as many


def mean_pooled(
    hidden: Float[Array, "batch length dim"], mask: Int[Array | np.ndarray, "batch length"]
) -> Float[Array, "batch dim"]:
    """The mean over the tokens that are no padding, in float32; 0 where there are none."""
    weights = jnp.asarray(mask, jnp.promote_types(hidden.dtype, jnp.float32))[..., None]
    return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def normalized(vectors: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Of length 1; a product of two is then the cosine of their angle."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def embed(
    model: Encoder,
    params: PyTree,
    tokenizer: Tokenizer | None,
    texts: Sequence[str | tuple[str, str]],
    length: int | None = None,
    batch_size: int = 32,
) -> Float32[np.ndarray, "texts dim"]:
    """A vector of length 1 for each text, or pair of texts: the mean of its tokens' vectors.

    length: the most tokens of a text, special ones among them; None: the model's.
    batch_size: texts a call of the model. Texts of like length go together, padded to 16, 32, 64 ... tokens and to
        whole batches, so that there are as many programs as such lengths.
    Raises ConfigError where the tokeniser is not one of the `tokenizers` library, or the model has a head.
    """
    if model.head not in ("none", "pooler"):
        raise ConfigError(f"an encoder with the head {model.head} gives no vectors; load it as a BertModel.")
    if isinstance(texts, str):
        raise TypeError("texts is a single string; give a list of them.")
    if not isinstance(tokenizer, Subwords):
        raise ConfigError("texts are embedded with the tokenizer.json that belongs to the weights; give its folder.")
    length = model.length if length is None else min(length, model.length)
    if not texts:
        return np.zeros((0, model.config.dim), np.float32)
    framed = tokenizer.frame(texts, length)
    lengths = framed.mask.sum(1)
    order = np.argsort(lengths, kind="stable")
    vectors = np.zeros((len(texts), model.config.dim), np.float32)
    waiting = []  # the device works on a batch while the next is made ready
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        columns = min(bucket(int(lengths[rows].max())), length)
        cut = [_resized(array[rows], batch_size, columns) for array in framed]
        waiting.append((rows, _vectors(model, params, *cut)))
    for rows, batch in waiting:
        vectors[rows] = np.asarray(batch)[: len(rows)]
    return vectors


def bucket(length: int) -> int:
    """How long rows of that many tokens are made, so that few lengths are compiled."""
    return SHORTEST * 2 ** max(0, (-(-length // SHORTEST) - 1).bit_length())


def _resized(array: np.ndarray, rows: int, columns: int) -> np.ndarray:
    kept = array[:, :columns]
    return np.pad(kept, ((0, rows - kept.shape[0]), (0, columns - kept.shape[1])))


@partial(jax.jit, static_argnums=0)
def _vectors(model: Encoder, params: PyTree, tokens: Array, types: Array, mask: Array) -> Array:
    hidden = model.apply({"params": params}, tokens, types, mask).hidden  # type: ignore[reportAttributeAccessIssue]
    return normalized(mean_pooled(hidden, mask)).astype(jnp.float32)
