"""One block in all its placements, with cross-attention, and stacks of blocks."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention.cache import Cache, empty_cache
from jaxarch.transformer.attention import PROJECTIONS, CrossAttention, SelfAttention
from jaxarch.transformer.blocks import Block, Context, Depth, attention_weights, stack, stack_layers
from jaxarch.transformer.layers import FeedForward, LayerNorm

RNG = np.random.default_rng(0)
BATCH, LENGTH, SOURCE, DIM, HEADS = 2, 5, 7, 8, 2
X = jnp.asarray(RNG.normal(size=(BATCH, LENGTH, DIM)), jnp.float32)
MEMORY = jnp.asarray(RNG.normal(size=(BATCH, SOURCE, 6)), jnp.float32)
POSITIONS = jnp.arange(LENGTH)[None]
NORM = partial(LayerNorm, use_bias=True)
SELF = partial(SelfAttention, HEADS, 1, 3, causal=False, biases=("query", "value"))
CROSS = partial(CrossAttention, HEADS, 5, biases=PROJECTIONS)
FORWARD = partial(FeedForward, 16)


class Stacked(nn.Module):
    blocks: tuple
    depth: Depth

    @nn.compact
    def __call__(self, x, context, cache=None, deterministic=True):
        x, cache = stack(self, self.blocks, self.depth, x, context, cache, deterministic)
        return x if cache is None else (x, cache)


def drawn(module, *inputs):
    """Parameters all of which matter: norms and biases too."""
    params = module.init(jax.random.key(0), *inputs)["params"]
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return shape.unflatten([leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


# --- the definition, in numpy -------------------------------------------------------------------


def normed(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ np.float64(p["kernel"]) + np.float64(p.get("bias", 0))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attended(x, others, p, kv_heads, dim, seen=None):
    q = dense(x, p["query"]).reshape(*x.shape[:2], HEADS, dim)
    k, v = (dense(others, p[name]).reshape(*others.shape[:2], kv_heads, dim) for name in ("key", "value"))
    k, v = (np.repeat(y, HEADS // kv_heads, axis=2) for y in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(dim)
    if seen is not None:
        logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1)
    return dense(out, p["out"]), weights


def block(x, p, placement, memory=None, seen=None):
    parts = [("attention", lambda x: attended(x, x, p["attention"], 1, 3, seen)[0])]
    if memory is not None:
        parts.append(("cross", lambda x: attended(x, memory, p["cross"], HEADS, 5)[0]))
    parts.append(("feed_forward", lambda x: dense(gelu(dense(x, p["feed_forward"]["up"])), p["feed_forward"]["down"])))
    for name, function in parts:
        norm = p[f"{name}_norm"]
        if placement == "pre":
            x = x + function(normed(x, norm))
        elif placement == "post":
            x = normed(x + function(x), norm)
        else:
            x = x + normed(function(normed(x, norm)), p[f"{name}_post_norm"])
    return x


@pytest.mark.parametrize("cross", [None, CROSS], ids=["alone", "cross"])
@pytest.mark.parametrize("placement", ["pre", "post", "both"])
def test_a_block_is_its_drawing(placement, cross):
    module = Block(NORM, SELF, FORWARD, cross, placement)
    context = Context(POSITIONS, memory=MEMORY if cross else None)
    params = drawn(module, X, context)
    actual, past, _ = module.apply({"params": params}, X, context)
    assert past is None
    plain = jax.tree.map(np.float64, params)
    expected = block(np.float64(X), plain, placement, np.float64(MEMORY) if cross else None)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_segments_part_sequences_and_hide_padding():
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])
    module = Block(NORM, SELF, FORWARD)
    params = drawn(module, X, Context(POSITIONS))
    actual, *_ = module.apply({"params": params}, X, Context(POSITIONS, segments=segments))
    seen = np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None, :]
    expected = block(np.float64(X), jax.tree.map(np.float64, params), "pre", seen=seen)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_hidden_memory_is_not_read():
    """By tokens without numbers of their own; with them, by those of the same number alone."""
    module = Block(NORM, SELF, FORWARD, CROSS)
    params = drawn(module, X, Context(POSITIONS, memory=MEMORY))

    def applied(memory, memory_segments, segments=None):
        context = Context(POSITIONS, segments=segments, memory=memory, memory_segments=memory_segments)
        return module.apply({"params": params}, X, context)[0]

    padded = jnp.array([[1] * 4 + [0] * 3] * 2)
    full = applied(MEMORY, padded)
    np.testing.assert_allclose(full, applied(MEMORY.at[:, 4:].set(9.0), padded), rtol=1e-6)
    np.testing.assert_allclose(full, applied(MEMORY[:, :4], None), rtol=1e-5, atol=1e-6)
    packed, own = jnp.array([[1] * 4 + [2] * 3] * 2), jnp.array([[1] * 3 + [2] * 2] * 2)
    changed = applied(MEMORY.at[:, 4:].add(1.0), packed, own) - applied(MEMORY, packed, own)
    assert np.all(changed[:, :3] == 0) and np.all(np.abs(changed[:, 3:]).max(-1) > 0)


@pytest.mark.parametrize("scan", [False, True])
def test_a_stack_with_a_cache_is_the_whole(scan):
    """Token by token, cross-attention's keys and values made in the first call alone."""
    causal = partial(Block, NORM, partial(SELF, causal=True), FORWARD, CROSS)
    whole = Context(POSITIONS, memory=MEMORY)
    model = Stacked((causal,), Depth(3))
    params = drawn(model, X, whole)
    expected = model.apply({"params": params}, X, whole)
    model = Stacked((causal,), Depth(3, scan=scan))
    params = stack_layers(params) if scan else params
    cache = empty_cache(3, LENGTH, 1, 3, jnp.float32, jnp.zeros(BATCH, jnp.int32), stacked=scan)
    for t in range(LENGTH):
        context = Context(POSITIONS[:, t : t + 1], cache.index, cache.start, memory=MEMORY if t == 0 else None)
        y, cache = model.apply({"params": params}, X[:, t : t + 1], context, cache)
        assert isinstance(cache, Cache) and cache.memory is not None and cache.index == t + 1
        np.testing.assert_allclose(y[:, 0], expected[:, t], rtol=1e-4, atol=1e-5)


def test_layers_of_several_kinds_take_turns():
    """The second and the fourth see their own token alone, where a window of 1 is the second kind."""
    kinds = tuple(partial(Block, NORM, partial(SELF, causal=True, window=window), FORWARD) for window in (None, 1))
    model = Stacked(kinds, Depth(4))
    params = drawn(model, X, Context(POSITIONS))
    weights = attention_weights(model, {"params": params}, X, Context(POSITIONS))
    assert list(weights) == [f"layers_{i}.attention" for i in range(4)]
    alone = [bool(np.allclose(w, np.eye(LENGTH), atol=1e-6)) for w in weights.values()]
    assert alone == [False, True, False, True]
    with pytest.raises(ValueError, match="layers of 2 kinds cannot be scanned"):
        Stacked(kinds, Depth(4, scan=True)).init(jax.random.key(0), X, Context(POSITIONS))


@pytest.mark.parametrize("scan", [False, True])
def test_the_weights_of_attention_by_the_layers_names(scan):
    kind = partial(Block, NORM, SELF, FORWARD, CROSS)
    model = Stacked((kind,), Depth(2))
    context = Context(POSITIONS, memory=MEMORY)
    params = drawn(model, X, context)
    plain = jax.tree.map(np.float64, params)
    first, second = plain["layers_0"], plain["layers_1"]
    between = block(np.float64(X), first, "pre", np.float64(MEMORY))
    expected = [
        attended(*[normed(x, layer["attention_norm"])] * 2, layer["attention"], 1, 3)[1]
        for x, layer in ((np.float64(X), first), (between, second))
    ]
    if scan:
        model, params = Stacked((kind,), Depth(2, scan=True)), stack_layers(params)
    weights = attention_weights(model, {"params": params}, X, context)
    if scan:
        weights = {
            f"layers_{i}.{name}": weights[f"layers.{name}"][i] for i in range(2) for name in ("attention", "cross")
        }
    assert set(weights) == {f"layers_{i}.{name}" for i in range(2) for name in ("attention", "cross")}
    assert weights["layers_0.cross"].shape == (BATCH, HEADS, LENGTH, SOURCE)
    for i in range(2):
        np.testing.assert_allclose(weights[f"layers_{i}.attention"], expected[i], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(weights[f"layers_{i}.cross"].sum(-1), 1, rtol=1e-5)
