"""Words taken out of a text, for an encoder to fill in (Devlin et al. 2019, sec. 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxarch.data.text import Tokens
from jaxarch.transformer.encoder import Encoder
from jaxarch.transformer.training import Objective, cross_entropy

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


def masked(
    key: Key[Array, ""],
    tokens: Int[Array | np.ndarray, "batch length"],
    candidates: Bool[Array | np.ndarray, "batch length"],
    rate: float,
    mask: int,
    vocab: int,
) -> Tokens:
    """Texts with some tokens hidden; what they were has weight 1, all else 0.

    Each candidate is chosen with probability `rate`. Of those chosen 80 % become `mask`, 10 % a token drawn from
    [0, vocab), 10 % stay, so that a model cannot trust any token that it sees.
    """
    choice_key, kind_key, token_key = jax.random.split(key, 3)
    tokens = jnp.asarray(tokens, jnp.int32)
    chosen = jax.random.bernoulli(choice_key, rate, tokens.shape) & candidates
    kind = jax.random.uniform(kind_key, tokens.shape)
    drawn = jax.random.randint(token_key, tokens.shape, 0, vocab)
    hidden = jnp.where(kind < MASKED, mask, jnp.where(kind < MASKED + REPLACED, drawn, tokens))
    return Tokens(jnp.where(chosen, hidden, tokens), tokens, chosen.astype(jnp.float32))


def masked_words(model: Encoder, rate: float, mask: int, vocab: int, end: int | None = None) -> Objective:
    """The cross-entropy of tokens that are hidden anew each time. Of `Tokens` it reads the targets and their weights.

    rate, mask, vocab: of `masked`. end: a token that is never hidden, as the one between documents.
    """

    def objective(params: PyTree, batch: Tokens, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        mask_key, dropout_key = jax.random.split(key)
        given = masked(mask_key, batch.targets, candidates(batch, end), rate, mask, vocab)
        logits = model.apply({"params": params}, given.inputs, deterministic=False, rngs={"dropout": dropout_key})
        return cross_entropy(logits, given.targets, given.weights), jnp.sum(given.weights)  # type: ignore[reportArgumentType]

    return objective


def candidates(batch: Tokens, end: int | None) -> Bool[Array, "batch length"]:
    """The tokens that may be hidden: those that count, but for the end of a document."""
    counted = jnp.asarray(batch.weights) > 0
    return counted if end is None else counted & (batch.targets != end)
