"""What an encoder with a head says of texts: the class of each, the class of each token, the words that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree

from jaxarch.data.tokenization import MASK_NAMES, Framed, Subwords, Tokenizer
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.embedding import bucket
from jaxarch.transformer.encoder import Encoder


class Guess(NamedTuple):
    """A token and its probability."""

    token: str
    probability: float


class Tagged(NamedTuple):
    """A token, the class that is most probable for it, and how probable."""

    token: str
    label: str
    probability: float


def classify(
    model: Encoder,
    params: PyTree,
    tokenizer: Tokenizer | None,
    texts: Sequence[str | tuple[str, str]],
    batch_size: int = 32,
) -> Float32[np.ndarray, "texts classes"]:
    """The probability of each of `model.labels` for each text, or pair of texts.

    batch_size: texts a call of the model.
    Raises ConfigError where the model does not tell classes of texts apart, or it is not its tokeniser.
    """
    _, probabilities = _read(model, params, tokenizer, texts, "classes", batch_size)
    return probabilities


def tag(
    model: Encoder, params: PyTree, tokenizer: Tokenizer | None, texts: Sequence[str], batch_size: int = 32
) -> list[list[Tagged]]:
    """The tokens of each text, as they are in the vocabulary, each with its class. Raises ConfigError as `classify`."""
    framed, probabilities = _read(model, params, tokenizer, texts, "token_classes", batch_size)
    assert isinstance(tokenizer, Subwords)
    frame = tokenizer.frame([""], model.length).tokens[0]
    out = []
    for tokens, mask, rows in zip(framed.tokens, framed.mask, probabilities, strict=True):
        own = [place for place in np.flatnonzero(mask) if tokens[place] not in frame]
        best = [(tokenizer.decode([int(tokens[place])]), rows[place]) for place in own]
        out.append([Tagged(text, model.labels[row.argmax()], float(row.max())) for text, row in best])
    return out


def fill(
    model: Encoder,
    params: PyTree,
    tokenizer: Tokenizer | None,
    texts: Sequence[str],
    count: int = 5,
    batch_size: int = 32,
) -> list[list[list[Guess]]]:
    """For each text and each [MASK] in it, the most probable tokens there.

    count: how many.
    Raises ConfigError where the model is no masked language model, a text has nothing to fill in, or it is not the
    model's tokeniser.
    """
    framed, probabilities = _read(model, params, tokenizer, texts, "masked_lm", batch_size)
    assert tokenizer is not None
    if tokenizer.mask is None:
        raise ConfigError(f"this tokeniser has no token for a missing word, as {' or '.join(MASK_NAMES)}.")
    out = []
    for text, tokens, rows in zip(texts, framed.tokens, probabilities, strict=True):
        places = np.flatnonzero(tokens == tokenizer.mask)
        if not len(places):
            raise ConfigError(f"{text!r} has nothing to fill in; write [MASK] where a word is missing.")
        best = [np.argsort(-rows[place], kind="stable")[:count] for place in places]
        out.append(
            [
                [Guess(tokenizer.decode([int(token)]), float(rows[place, token])) for token in tokens]
                for place, tokens in zip(places, best, strict=True)
            ]
        )
    return out


def _read(
    model: Encoder,
    params: PyTree,
    tokenizer: Tokenizer | None,
    texts: Sequence[str | tuple[str, str]],
    head: str,
    batch_size: int,
) -> tuple[Framed, Float32[np.ndarray, "texts ..."]]:
    """The texts as tokens, and the probabilities that the head gives: of each text, or of each of its tokens."""
    if model.head != head:
        raise ConfigError(f"an encoder with the head {model.head} is asked for what one with the head {head} gives.")
    if not isinstance(tokenizer, Subwords):
        raise ConfigError("a text is read with the tokenizer.json that belongs to the weights; give its folder.")
    framed = tokenizer.frame(texts, model.length)
    rows, length = framed.tokens.shape
    columns = min(bucket(length), model.length)
    parts = []
    for start in range(0, rows, batch_size):
        own = [array[start : start + batch_size] for array in framed]
        missing = (0, batch_size - len(own[0])), (0, columns - length)
        parts.append(np.asarray(_probabilities(model, params, *(np.pad(array, missing) for array in own))))
    probabilities = np.concatenate(parts)[:rows] if parts else np.zeros((0, len(model.labels)), np.float32)
    return framed, probabilities[:, :length] if probabilities.ndim == 3 else probabilities


@partial(jax.jit, static_argnums=0)
def _probabilities(
    model: Encoder, params: PyTree, tokens: Array, types: Array, mask: Array
) -> Float[Array, "batch ..."]:
    return jax.nn.softmax(model.apply({"params": params}, tokens, types, mask))  # type: ignore[reportArgumentType]
