"""Speculative decoding: a small model drafts tokens, the large one judges them all in one pass.

The text is distributed as the large model's own (Leviathan et al. 2023, app. A.1), whatever the draft. As in
`decoding`, `speculate` is pure and takes any models' steps; `generate_speculatively` compiles it for two `Decoder`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxarch.attention.cache import Cache
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.decoding import (
    Distribution,
    Processor,
    Prompts,
    Step,
    Text,
    begun,
    check_length,
    in_stages,
    only_greatest,
    prefill,
    process,
    step,
)


class Speculated(NamedTuple):
    """passes: of the large model after the prompts; without a draft there are new_tokens - 1."""

    tokens: Int[Array, "batch new_tokens"]
    passes: Int[Array, ""]


class _State(NamedTuple):
    """Both caches hold the text but for its last token, or more than that, which is forgotten."""

    text: Text
    cache: Cache
    draft_cache: Cache
    done: Bool[Array, "batch"]
    passes: Int[Array, ""]


def speculate(
    step: Step,
    draft_step: Step,
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    draft_cache: Cache,
    prompts: Prompts,
    new_tokens: int,
    key: Key[Array, ""],
    drafted: int = 4,
    distribution: Distribution = only_greatest,
    stop_token: int | None = None,
    processors: Sequence[Processor] = (),
) -> Speculated:
    """Continues prompts that both caches hold, as `decode` does with a draw from `distribution` (Alg. 1). Pure.

    A cache fills the same slot in every row, so all rows go on by as many tokens as the row that goes on least: what
    others had accepted beyond that is drafted anew. Batches gain less, therefore.

    logits: of the large model, after the prompts.
    drafted: tokens for each pass of the large model.
    """
    batch, prompt = prompts.tokens.shape
    places = jnp.arange(drafted + 1)

    def probabilities(text: Text, logits: Array) -> Array:
        return jax.nn.softmax(distribution(process(processors, text, logits)))

    def draw(key: Array, probabilities: Array) -> Array:
        return jax.random.categorical(key, jnp.log(probabilities))

    def rewound(cache: Cache, text: Text) -> Cache:
        """Holds all but the last token. What is in later slots is hidden by the causal mask, then overwritten."""
        return cache._replace(index=jnp.asarray(text.length - 1, jnp.int32))

    def stopped(tokens: Array, done: Array) -> tuple[Array, Array]:
        """The stop token from where a row is done, and whether each is at its end."""
        if stop_token is None:
            return tokens, done
        ended = done[:, None] | (jnp.cumsum(tokens == stop_token, axis=1) > 0)
        return jnp.where(ended, stop_token, tokens), ended[:, -1]

    def drafting(carry: tuple[Text, Cache], key: Array) -> tuple[tuple[Text, Cache], tuple[Array, Array]]:
        text, cache = carry
        logits, cache = draft_step(text.last, cache)
        q = probabilities(text, logits[:, -1])
        token = draw(key, q)
        return (text.followed_by(token), cache), (token, q)

    def advance(state: _State) -> _State:
        text = state.text
        draft_key, accept_key, last_key = jax.random.split(jax.random.fold_in(key, text.length), 3)
        # One token more than is judged, only so that the draft's cache holds the last of those that are.
        carry = text, rewound(state.draft_cache, text)
        (guessed, draft_cache), (tokens, q) = jax.lax.scan(drafting, carry, jax.random.split(draft_key, drafted + 1))
        tokens, q = tokens.T, q.swapaxes(0, 1)

        judged = jax.lax.dynamic_slice_in_dim(guessed.tokens, text.length - 1, drafted + 1, axis=1)
        logits, cache = step(judged, rewound(state.cache, text))

        def at(place: Array, logits: Array) -> Array:
            return probabilities(guessed._replace(length=text.length + place), logits)

        p = jax.vmap(at, (0, 1), 1)(places, logits)
        # The token after the last draft is drawn from p itself, as if after the refusal of a draft that has no chance.
        q = q.at[:, -1].set(0.0)
        p_of, q_of = (jnp.take_along_axis(each, tokens[..., None], axis=-1)[..., 0] for each in (p, q))
        accepted = jax.random.uniform(accept_key, tokens.shape) * q_of < p_of
        accepted &= places < drafted
        accepted |= state.done[:, None] & (places < drafted)  # what is done holds nobody up
        run = jnp.cumprod(accepted, axis=1).sum(axis=1)
        count = run.min()

        # Where a row's own run ends here, it draws of what p has more than q: norm(max(0, p - q)).
        p_here, q_here = (jax.lax.dynamic_index_in_dim(each, count, axis=1, keepdims=False) for each in (p, q))
        more = jnp.maximum(p_here - q_here, 0.0)
        more = jnp.where(more.sum(axis=-1, keepdims=True) > 0, more, p_here)  # else refused by rounding alone
        drafts_here = jax.lax.dynamic_index_in_dim(tokens, count, axis=1, keepdims=False)
        last = jnp.where(run > count, drafts_here, draw(last_key, more))
        tokens = jnp.where(places == count, last[:, None], tokens)
        # Later ones are no text and will be overwritten; a copy of the first cannot be an end that is not there.
        tokens = jnp.where(places > count, tokens[:, :1], tokens)
        tokens, done = stopped(tokens, state.done)
        written = jax.lax.dynamic_update_slice_in_dim(text.tokens, tokens, text.length, axis=1)
        text = text._replace(tokens=written, length=text.length + count + 1)
        return _State(text, cache, draft_cache, done, state.passes + 1)

    text = begun(prompts, new_tokens + drafted, stop_token or 0)
    first = draw(jax.random.fold_in(key, prompt), probabilities(text, logits))
    first, done = stopped(first[:, None], jnp.zeros(batch, bool))
    state = _State(text.followed_by(first[:, 0]), cache, draft_cache, done, jnp.int32(0))
    state = in_stages(advance, lambda state: ~state.done.all(), state, prompt, new_tokens, spare=drafted)
    return Speculated(state.text.tokens[:, prompt : prompt + new_tokens], state.passes)


def generate_speculatively(
    model: Decoder,
    variables: PyTree,
    draft: Decoder,
    draft_variables: PyTree,
    prompts: Prompts,
    new_tokens: int,
    key: Key[Array, ""],
    drafted: int = 4,
    distribution: Distribution = only_greatest,
    stop_token: int | None = None,
    processors: tuple[Processor, ...] = (),
) -> Speculated:
    """Prefills both models and speculates, as `speculate` does: one compiled program, as of `generate`.

    Raises ConfigError where prompt and new tokens do not fit the learned positions of both, where their vocabularies
    differ, and for rotary frequencies that follow the length, which tokens judged together would share.
    """
    for each in (model, draft):
        check_length(each, prompts, new_tokens)
    if model.vocab != draft.vocab:
        raise ConfigError(
            f"a draft of {draft.vocab} tokens cannot serve a model of {model.vocab}; they must be the same."
        )
    if drafted < 1:
        raise ConfigError(f"--drafted {drafted} is below 1; 4 is usual.")
    if "dynamic" in (model.config.rotary.scaling, draft.config.rotary.scaling):
        raise ConfigError("--model.rotary.scaling dynamic cannot be speculated with: it depends on the text's length.")
    made_of = (model, draft, new_tokens, drafted, distribution, stop_token, processors)
    return _program(*made_of)(variables, draft_variables, prompts, key)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=8)
def _program(
    model: Decoder,
    draft: Decoder,
    new_tokens: int,
    drafted: int,
    distribution: Distribution,
    stop_token: int | None,
    processors: tuple[Processor, ...],
) -> jax.stages.Wrapped:
    @jax.jit
    def run(variables: PyTree, draft_variables: PyTree, prompts: Prompts, key: Array) -> Speculated:
        length = prompts.tokens.shape[1]
        logits, cache = prefill(model, variables, prompts, length)
        _, draft_cache = prefill(draft, draft_variables, prompts, length)
        steps = partial(step, model, variables), partial(step, draft, draft_variables)
        choices = drafted, distribution, stop_token, processors
        return speculate(*steps, logits, cache, draft_cache, prompts, new_tokens, key, *choices)

    return run
