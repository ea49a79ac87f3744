"""Text from a decoder: prompts into the cache, then one token after another.

A sampler is a function `(key, logits) -> tokens`; `sampling` makes one of pure functions on logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxarch.attention.cache import Cache, grown
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder

Sampler = Callable[[Key[Array, ""], Float[Array, "batch vocab"]], Int[Array, "batch"]]

# --- choosing a token ---------------------------------------------------------------------------


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Keeps the k largest and what equals the least of them; the rest is -inf (Fan et al. 2018, sec. 5.1)."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Keeps the fewest tokens that together reach probability p (nucleus, Holtzman et al. 2020, eq. 2)."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Keeps tokens at least p times as probable as the most probable one (Nguyen et al. 2024, sec. 3)."""
    return jnp.where(logits >= logits.max(axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def greedy(key: Key[Array, ""], logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """The most probable token; of equals the first."""
    return jnp.argmax(logits, axis=-1)


@lru_cache  # equal arguments give the same function, and so the same compiled program
def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampler:
    """Divides the logits by the temperature, filters them in the order of the arguments, draws from the rest.

    Temperature 0 is `greedy`; top_k 0, top_p 1 and min_p 0 filter nothing. Raises ConfigError.
    """
    if temperature < 0:
        raise ConfigError(f"--temperature {temperature:g} is below 0; 1 is neutral, 0 is greedy.")
    if top_k < 0:
        raise ConfigError(f"--top-k {top_k} is below 0; 0 keeps all tokens.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p:g} is not in (0, 1]; 1 keeps all tokens.")
    if not 0 <= min_p <= 1:
        raise ConfigError(f"--min-p {min_p:g} is not in [0, 1]; 0 keeps all tokens.")
    if temperature == 0:
        return greedy

    def draw(key: Key[Array, ""], logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
        logits = logits / temperature
        if top_k:
            logits = keep_top_k(logits, top_k)
        if top_p < 1:
            logits = keep_top_p(logits, top_p)
        if min_p:
            logits = keep_min_p(logits, min_p)
        return jax.random.categorical(key, logits)

    return draw


# --- decoding -----------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """Prompts of unequal length, padded on the left."""

    tokens: Int[Array, "batch length"]
    lengths: Int[Array, "batch"]


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0) -> Prompts:
    """Lists of tokens as one array. Raises ConfigError where one is empty."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ConfigError("a prompt is empty; each needs one token at least.")
    tokens = np.full((len(prompts), max(lengths)), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) :] = prompt
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))


def prefill(
    model: Decoder, variables: PyTree, prompts: Prompts, slots: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits of each prompt's next token, and a cache of `slots` that holds the prompts.

    Raises ConfigError where learned positions are fewer than slots.
    """
    length = prompts.tokens.shape[1]
    _must_fit(model, length, slots - length)
    cache = model.empty_cache(slots, length - prompts.lengths)
    return step(model, variables, prompts.tokens, cache)


def _must_fit(model: Decoder, length: int, more: int) -> None:
    """Raises ConfigError where a prompt and `more` tokens after it are more than learned positions."""
    if model.config.positions == "learned" and length + more > model.length:
        room = f"{model.length - length} more" if length < model.length else "only a shorter prompt"
        raise ConfigError(
            f"a prompt of {length} tokens and {more} more do not fit the model's length {model.length}; {room} would."
        )


def step(
    model: Decoder, variables: PyTree, tokens: Int[Array, "batch length"], cache: Cache
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits of the token after `tokens`, and the cache with them in it.

    Pure: compile it, and donate the cache.
    """
    logits, cache = cast(Any, model.apply(variables, tokens, cache=cache))
    return logits[:, -1], cache


def generate(
    model: Decoder,
    variables: PyTree,
    prompts: Prompts,
    new_tokens: int,
    key: Key[Array, ""],
    sampler: Sampler = greedy,
    stop_token: int | None = None,
) -> Int[Array, "batch new_tokens"]:
    """Continues each prompt; the prompts themselves are not repeated.

    One compiled program, kept for the next call with the same model, count, sampler and shapes. After
    `stop_token` a row is done and holds that token to its end; when all are, decoding ends.
    Raises ConfigError where prompt and new tokens do not fit learned positions.
    """
    if new_tokens < 1:
        raise ConfigError(f"{new_tokens} new tokens are too few; ask for 1 at least.")
    _must_fit(model, prompts.tokens.shape[1], new_tokens - 1)
    # Linen modules do have a hash, by their fields, which their type does not tell.
    program = _program(model, new_tokens, sampler, stop_token)  # pyright: ignore[reportArgumentType]
    return program(variables, prompts, key)


MOST_STAGES, LEAST_STAGE = 4, 64  # each stage adds to the time of compilation; new tokens


@lru_cache(maxsize=8)
def _program(model: Decoder, new_tokens: int, sampler: Sampler, stop_token: int | None) -> Callable:
    def choose(key: Array, number: int | Array, logits: Array, done: Array) -> tuple[Array, Array]:
        tokens = sampler(jax.random.fold_in(key, number), logits)
        if stop_token is None:
            return tokens, done
        tokens = jnp.where(done, stop_token, tokens)
        return tokens, tokens == stop_token

    def run(variables: PyTree, prompts: Prompts, key: Array) -> Array:
        batch, length = prompts.tokens.shape
        # Attention reads the whole cache, so it grows on the way: each stage is a loop with a longer one.
        fed = new_tokens - 1  # the last one is chosen, but no longer read
        stages = max(1, min(MOST_STAGES, -(-fed // LEAST_STAGE)))
        ends = [fed * stage // stages for stage in range(1, stages + 1)]
        logits, cache = prefill(model, variables, prompts, length + ends[0])
        first, done = choose(key, 0, logits, jnp.zeros(batch, bool))
        chosen = jnp.full((batch, new_tokens), stop_token or 0, first.dtype).at[:, 0].set(first)

        def advance(carry: tuple) -> tuple:
            number, chosen, done, cache = carry
            last = jax.lax.dynamic_slice_in_dim(chosen, number - 1, 1, axis=1)
            logits, cache = step(model, variables, last, cache)
            tokens, done = choose(key, number, logits, done)
            chosen = jax.lax.dynamic_update_index_in_dim(chosen, tokens, number, axis=1)
            return number + 1, chosen, done, cache

        carry = (jnp.int32(1), chosen, done, cache)
        for end in ends:
            carry = (*carry[:3], grown(carry[3], length + end))
            carry = jax.lax.while_loop(lambda carry, end=end: (carry[0] <= end) & ~carry[2].all(), advance, carry)
        return carry[1]

    return jax.jit(run)
