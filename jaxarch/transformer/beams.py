"""Beam search: the text with the best score of those that a beam's width of unfinished texts leads to.

As in `decoding`, `beam_search` is pure and takes any model's step; `search` compiles it for a `Decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxarch.attention.cache import Cache, take_rows
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.decoding import (
    Processor,
    Prompts,
    Step,
    Text,
    begun,
    check_length,
    in_stages,
    prefill,
    process,
    step,
)


@dataclass(frozen=True)
class Beams:
    """How a beam search goes. Raises ConfigError where the numbers have no meaning.

    A finished text's score is the sum of its tokens' log-probabilities, the stop token's among them and the prompt's
    not, over `their number ** length_penalty`: Hugging Face's meaning of the penalty, not that of Wu et al. 2016,
    eq. 14, which is `((5 + number) / 6) ** length_penalty`.
    """

    width: int = 4
    """unfinished texts that are followed at once, and finished ones that are kept"""
    returned: int = 1
    """of the finished ones, the best first"""
    length_penalty: float = 1.0
    """above 0 favours long texts, below 0 short ones; 0 compares bare sums"""
    early_stopping: bool | Literal["never"] = False
    """when a prompt's search is over: with as many finished texts as the width (True), or when no unfinished one could
    score better than the worst of those, were it to end at its present length (False), or at any length up to the
    longest (never: beam search in the strict sense)"""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"--beams {self.width} is below 1; 4 is usual.")
        if not 1 <= self.returned <= self.width:
            raise ConfigError(f"--beams {self.width} cannot return {self.returned} texts; 1 to {self.width} it can.")


class Found(NamedTuple):
    """The best texts of each prompt, the best first; -inf is the score of a text that there is not."""

    tokens: Int[Array, "batch returned new_tokens"]
    scores: Float[Array, "batch returned"]


class _Search(NamedTuple):
    """The beams are rows of text and cache, `width` for each prompt. Scores of beams are sums alone."""

    text: Text
    cache: Cache
    logits: Float[Array, "beams vocab"]
    sums: Float[Array, "batch width"]
    finished: Int[Array, "batch width slots"]
    scores: Float[Array, "batch width"]
    open: Bool[Array, "batch"]


def beam_search(
    step: Step,
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    prompts: Prompts,
    new_tokens: int,
    beams: Beams = Beams(),
    stop_token: int | None = None,
    processors: Sequence[Processor] = (),
) -> Found:
    """The best continuations of prompts that a cache holds, each up to its stop token, which fills its rest. Pure.

    Of each prompt's `width` texts all continuations are weighed: the best that do not end are followed, those among
    the best `width` that end are kept. At the longest length all end. Processors are given log-probabilities, as
    Hugging Face does, and their results are not normalised again.

    logits: after the prompts.
    """
    batch, prompt = prompts.tokens.shape
    width, vocab = beams.width, logits.shape[-1]
    longest = float(new_tokens) ** beams.length_penalty

    def grouped(rows: Array) -> Array:
        return rows.reshape(batch, width, *rows.shape[1:])

    def of_group(entries: Array, numbers: Array) -> Array:
        """Entries `[batch, many, ...]` by their numbers `[batch, some]`."""
        return jax.vmap(lambda entries, numbers: entries[numbers])(entries, numbers)

    def choose(search: _Search) -> tuple[_Search, Int[Array, "beams"]]:
        """The search one token further, but for the cache, and the beam that each beam goes on from."""
        text = search.text
        weighed = process(processors, text, jax.nn.log_softmax(search.logits))
        sums = (search.sums[..., None] + grouped(weighed)).reshape(batch, width * vocab)
        # Of twice as many at least the width do not end: one token alone stops.
        sums, numbers = jax.lax.top_k(sums, min(2 * width, width * vocab))
        parents, tokens = numbers // vocab, numbers % vocab
        written = of_group(grouped(text.tokens), parents)
        written = jax.lax.dynamic_update_index_in_dim(written, tokens, text.length, axis=2)
        length = text.length + 1 - prompt
        ends = jnp.full(tokens.shape, length == new_tokens)
        if stop_token is not None:
            ends |= tokens == stop_token

        penalty = jnp.float32(length) ** beams.length_penalty
        counts = ends & (jnp.arange(tokens.shape[1]) < width) & search.open[:, None]
        scores = jnp.concatenate([search.scores, jnp.where(counts, sums / penalty, -jnp.inf)], axis=1)
        scores, kept = jax.lax.top_k(scores, width)
        finished = of_group(jnp.concatenate([search.finished, written], axis=1), kept)

        sums, followed = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), width)
        written = of_group(written, followed).reshape(batch * width, -1)
        rows = (jnp.arange(batch)[:, None] * width + of_group(parents, followed)).reshape(-1)
        text = text._replace(tokens=written, length=text.length + 1)

        worst = scores[:, -1]
        if beams.early_stopping is True:
            hopeful = worst == -jnp.inf
        else:
            at_longest = beams.early_stopping == "never" and beams.length_penalty > 0
            hopeful = sums[:, 0] / (longest if at_longest else penalty) > worst
        return search._replace(text=text, sums=sums, finished=finished, scores=scores, open=search.open & hopeful), rows

    def advance(search: _Search) -> _Search:
        logits, cache = step(search.text.last, search.cache)
        search, rows = choose(search._replace(logits=logits[:, -1]))
        return search._replace(cache=take_rows(cache, rows))

    each = jnp.repeat(jnp.arange(batch), width)
    text = begun(take_rows(prompts, each), new_tokens, stop_token or 0)
    # Of a prompt's beams, which are equal at first, one alone is followed.
    sums = jnp.full((batch, width), -jnp.inf).at[:, 0].set(0.0)
    nothing = jnp.full((batch, width), -jnp.inf)
    search, _ = choose(_Search(text, cache, logits[each], sums, grouped(text.tokens), nothing, jnp.ones(batch, bool)))
    search = search._replace(cache=take_rows(cache, each))
    search = in_stages(advance, lambda search: search.open.any(), search, prompt, new_tokens)
    return Found(search.finished[:, : beams.returned, prompt:], search.scores[:, : beams.returned])


def search(
    model: Decoder,
    variables: PyTree,
    prompts: Prompts,
    new_tokens: int,
    beams: Beams = Beams(),
    stop_token: int | None = None,
    processors: tuple[Processor, ...] = (),
) -> Found:
    """Prefills and searches, as `beam_search` does: one compiled program, as of `generate`.

    Raises ConfigError where prompt and new tokens do not fit learned positions.
    """
    check_length(model, prompts, new_tokens)
    program = _program(model, new_tokens, beams, stop_token, processors)  # pyright: ignore[reportArgumentType]
    return program(variables, prompts)


@lru_cache(maxsize=8)
def _program(
    model: Decoder, new_tokens: int, beams: Beams, stop_token: int | None, processors: tuple[Processor, ...]
) -> jax.stages.Wrapped:
    @jax.jit
    def run(variables: PyTree, prompts: Prompts) -> Found:
        logits, cache = prefill(model, variables, prompts, prompts.tokens.shape[1])
        each = partial(step, model, variables)
        return beam_search(each, logits, cache, prompts, new_tokens, beams, stop_token, processors)

    return run
