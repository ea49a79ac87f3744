"""Text from an autoregressive model: prompts into the cache, then one token after another.

Three functions carry all ways of decoding:
    a step `(tokens, cache) -> (logits, cache)` is the model, whichever it is;
    a processor `(text, logits) -> logits` changes what may come next by what has been written;
    a sampler `(key, logits) -> tokens` chooses.
`decode` puts them together and is pure; `generate` compiles it for a `Decoder`. Beams are in `beams`, drafts in
`speculation`, on the same step and processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxarch.attention.cache import Cache, grown
from jaxarch.run import backend
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.decoder import Decoder
from jaxarch.transformer.layers import transposed_kernels

# The logits after each of the tokens, and the cache with them in it.
Step = Callable[[Int[Array, "batch length"], Cache], tuple[Float[Array, "batch length vocab"], Cache]]
Distribution = Callable[[Float[Array, "batch vocab"]], Float[Array, "batch vocab"]]
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


def only_greatest(logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
    """All the probability on the token that `greedy` takes."""
    greatest = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.arange(logits.shape[-1]) == greatest, 0.0, -jnp.inf)


@lru_cache  # equal arguments give the same function, and so the same compiled program
def distribution(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Distribution:
    """The logits of what is drawn from: divided by the temperature, then filtered in the order of the arguments.

    Temperature 0 is `only_greatest`; top_k 0, top_p 1 and min_p 0 filter nothing. Raises ConfigError.
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
        return only_greatest

    def changed(logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        logits = logits / temperature
        if top_k:
            logits = keep_top_k(logits, top_k)
        if top_p < 1:
            logits = keep_top_p(logits, top_p)
        if min_p:
            logits = keep_min_p(logits, min_p)
        return logits

    return changed


@lru_cache
def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampler:
    """Draws from `distribution`, whose arguments it takes; temperature 0 is `greedy`. Raises ConfigError."""
    changed = distribution(temperature, top_k, top_p, min_p)
    if temperature == 0:
        return greedy
    return lambda key, logits: jax.random.categorical(key, changed(logits))


# --- what has been written, and what may follow ---------------------------------------------------


class Text(NamedTuple):
    """Prompts and what has been written after them, in slots as those of a cache.

    start: each row's first real slot.
    prompt: how many slots the prompts take.
    length: how many are filled; what stands in later ones means nothing.
    """

    tokens: Int[Array, "batch slots"]
    start: Int[Array, "batch"]
    prompt: int | Int[Array, ""]
    length: int | Int[Array, ""]

    @property
    def last(self) -> Int[Array, "batch 1"]:
        return jax.lax.dynamic_slice_in_dim(self.tokens, self.length - 1, 1, axis=1)

    def followed_by(self, tokens: Int[Array, "batch"]) -> Text:
        written = jax.lax.dynamic_update_index_in_dim(self.tokens, tokens, self.length, axis=1)
        return self._replace(tokens=written, length=self.length + 1)


Processor = Callable[[Text, Float[Array, "batch vocab"]], Float[Array, "batch vocab"]]


def process(
    processors: Sequence[Processor], text: Text, logits: Float[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """The logits after one processor and then the next."""
    for processor in processors:
        logits = processor(text, logits)
    return logits


@lru_cache
def repetition_penalty(penalty: float) -> Processor:
    """Divides positive logits of tokens that the text holds by the penalty and multiplies negative ones by it.

    Keskar et al. 2019, sec. 4.1, with the sign minded, as is usual since: their quotient would raise a negative logit.
    The prompt counts, its padding does not. 1 changes nothing. Raises ConfigError.
    """
    if penalty <= 0:
        raise ConfigError(f"--repetition-penalty {penalty:g} is not above 0; 1 is neutral, 1.2 is usual.")

    def processor(text: Text, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        slots = jnp.arange(text.tokens.shape[1])
        real = (slots >= text.start[:, None]) & (slots < text.length)
        rows, nowhere = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
        held = jnp.zeros(logits.shape, bool).at[rows, jnp.where(real, text.tokens, nowhere)].set(True, mode="drop")
        return jnp.where(held, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    return processor


@lru_cache
def forced(tokens: tuple[int | None, ...]) -> Processor:
    """Makes `tokens` the first new ones, with probability 1 each; None leaves the choice."""

    def processor(text: Text, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        table = jnp.array([-1 if token is None else token for token in tokens] + [-1])
        token = table[jnp.minimum(text.length - text.prompt, len(tokens))]
        only = jnp.where(jnp.arange(logits.shape[1]) == token, 0.0, -jnp.inf)
        return jnp.where(token < 0, logits, only)

    return processor


@lru_cache
def not_before(new_tokens: int, stop_token: int) -> Processor:
    """Rules the stop token out until there are so many new tokens before it."""

    def processor(text: Text, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        early = text.length - text.prompt < new_tokens
        return jnp.where(early & (jnp.arange(logits.shape[1]) == stop_token), -jnp.inf, logits)

    return processor


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


def right_aligned(
    tokens: Int[Array | np.ndarray, "batch length"], mask: Bool[Array | np.ndarray, "batch length"]
) -> Prompts:
    """A batch padded on the right, the left or both sides as `Prompts`; `mask` is true for real tokens.

    Raises ConfigError where a row has no real token, or padding between real ones.
    """
    mask, length = np.asarray(mask, bool), mask.shape[1]
    lengths, ends = mask.sum(axis=1), length - mask[:, ::-1].argmax(axis=1)
    if mask.size == 0 or lengths.min() == 0:
        raise ConfigError("a prompt is empty; each needs one token at least.")
    slots = np.arange(length)
    if (mask != ((slots < ends[:, None]) & (slots >= (ends - lengths)[:, None]))).any():
        raise ConfigError("a prompt has padding between its tokens; it may stand on either side of them only.")
    rolled = np.take_along_axis(np.asarray(tokens), (slots + ends[:, None]) % length, axis=1)
    return Prompts(jnp.asarray(rolled, jnp.int32), jnp.asarray(lengths, jnp.int32))


def prefill(
    model: Decoder, variables: PyTree, prompts: Prompts, slots: int
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits of each prompt's next token, and a cache of `slots` that holds the prompts.

    Raises ConfigError where learned positions are fewer than slots.
    """
    length = prompts.tokens.shape[1]
    _must_fit(model, length, slots - length)
    logits, cache = step(model, variables, prompts.tokens, model.empty_cache(slots, length - prompts.lengths))
    return logits[:, -1], cache


def _must_fit(model: Decoder, length: int, more: int) -> None:
    """Raises ConfigError where a prompt and `more` tokens after it are more than learned positions."""
    if model.config.positions == "learned" and length + more > model.length:
        room = f"{model.length - length} more" if length < model.length else "only a shorter prompt"
        raise ConfigError(
            f"a prompt of {length} tokens and {more} more do not fit the model's length {model.length}; {room} would."
        )


def step(
    model: Decoder, variables: PyTree, tokens: Int[Array, "batch length"], cache: Cache
) -> tuple[Float[Array, "batch length vocab"], Cache]:
    """The logits after each of the tokens, and the cache with them in it.

    Pure: compile it, and donate the cache.
    """
    return cast(Any, model.apply(variables, tokens, cache=cache))


MOST_STAGES, LEAST_STAGE = 4, 64  # each stage adds to the time of compilation; new tokens


Carry = TypeVar("Carry", bound=tuple)


def in_stages(
    advance: Callable[[Carry], Carry],
    unfinished: Callable[[Carry], Bool[Array, ""]],
    carry: Carry,
    prompt: int,
    new_tokens: int,
    spare: int = 0,
) -> Carry:
    """Advances until the text that the carry begins with holds so many new tokens, or all is finished.

    Attention reads whole caches, so those in the carry grow on the way: each stage is a loop with longer ones.

    spare: slots beyond the text that one advance may fill.
    """
    fed = new_tokens - 1  # the last one is chosen, but no longer read
    stages = max(1, min(MOST_STAGES, -(-fed // LEAST_STAGE)))

    def is_cache(leaf: Any) -> bool:
        return isinstance(leaf, Cache)

    for end in [prompt + fed * stage // stages for stage in range(1, stages + 1)]:
        carry = jax.tree.map(
            lambda leaf, end=end: grown(leaf, end + spare) if is_cache(leaf) else leaf, carry, is_leaf=is_cache
        )
        carry = jax.lax.while_loop(lambda carry, end=end: (carry[0].length <= end) & unfinished(carry), advance, carry)
    return carry


def begun(prompts: Prompts, room: int, fill: int) -> Text:
    """The text of the prompts alone, with room for more."""
    batch, length = prompts.tokens.shape
    rest = jnp.full((batch, room), fill, jnp.int32)
    tokens = jnp.concatenate([prompts.tokens.astype(jnp.int32), rest], axis=1)
    return Text(tokens, length - prompts.lengths, length, length)


def decode(
    step: Step,
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    prompts: Prompts,
    new_tokens: int,
    key: Key[Array, ""],
    sampler: Sampler = greedy,
    stop_token: int | None = None,
    processors: Sequence[Processor] = (),
) -> Int[Array, "batch new_tokens"]:
    """Continues the prompts that a cache holds; the prompts themselves are not repeated. Pure.

    After `stop_token` a row is done and holds that token to its end; when all are, decoding ends.

    logits: after the prompts.
    """

    def choose(text: Text, logits: Array, done: Array) -> tuple[Text, Array]:
        number = text.length - text.prompt
        tokens = sampler(jax.random.fold_in(key, number), process(processors, text, logits))
        if stop_token is not None:
            tokens = jnp.where(done, stop_token, tokens)
            done = tokens == stop_token
        return text.followed_by(tokens), done

    def advance(carry: tuple[Text, Cache, Array]) -> tuple[Text, Cache, Array]:
        text, cache, done = carry
        logits, cache = step(text.last, cache)
        text, done = choose(text, logits[:, -1], done)
        return text, cache, done

    batch, prompt = prompts.tokens.shape
    text, done = choose(begun(prompts, new_tokens, stop_token or 0), logits, jnp.zeros(batch, bool))
    text, *_ = in_stages(advance, lambda carry: ~carry[2].all(), (text, cache, done), prompt, new_tokens)
    return text.tokens[:, prompt:]


def generate(
    model: Decoder,
    variables: PyTree,
    prompts: Prompts,
    new_tokens: int,
    key: Key[Array, ""],
    sampler: Sampler = greedy,
    stop_token: int | None = None,
    processors: tuple[Processor, ...] = (),
) -> Int[Array, "batch new_tokens"]:
    """Prefills and decodes, as `decode` does.

    One compiled program, kept for the next call with the same model, count, functions and shapes.
    Raises ConfigError where prompt and new tokens do not fit learned positions.
    """
    check_length(model, prompts, new_tokens)
    # Linen modules do have a hash, by their fields, which their type does not tell.
    program = _program(model, new_tokens, sampler, stop_token, processors)  # pyright: ignore[reportArgumentType]
    return program(variables, prompts, key)


def check_length(model: Decoder, prompts: Prompts, new_tokens: int) -> None:
    """Raises ConfigError where there is no new token, or where learned positions are too few for them."""
    if new_tokens < 1:
        raise ConfigError(f"{new_tokens} new tokens are too few; ask for 1 at least.")
    _must_fit(model, prompts.tokens.shape[1], new_tokens - 1)


@lru_cache(maxsize=8)
def _program(
    model: Decoder,
    new_tokens: int,
    sampler: Sampler,
    stop_token: int | None,
    processors: tuple[Processor, ...],
) -> Callable:
    @jax.jit
    def run(variables: PyTree, prompts: Prompts, key: Array) -> Array:
        logits, cache = prefill(model, variables, prompts, prompts.tokens.shape[1])
        read = variables
        one_row = prompts.tokens.shape[0] == 1 and new_tokens >= LEAST_STAGE
        if one_row and model.dtype == jnp.bfloat16 and backend.converts_in_products():
            read = jax.lax.optimization_barrier(transposed_kernels(variables, model.dtype))  # a copy, made once
        each = partial(step, model, read)
        return decode(each, logits, cache, prompts, new_tokens, key, sampler, stop_token, processors)

    return run
