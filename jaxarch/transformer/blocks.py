"""One layer of a Transformer, composed of parts that it is handed, and a stack of such layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxarch.attention.cache import Cache, KeyValues
from jaxarch.transformer.layout import residual, used

MakeModule = Callable[..., nn.Module]  # a module's class, its fields filled in, called as `make(name=...)`


class Context(NamedTuple):
    """What all layers of a stack are given alike.

    positions: of the tokens.
    index, start: where the tokens begin in a cache's slots, and the first slot of each row that counts.
    segments: numbers of packed sequences: a token sees those of its own number. Padding has one of its own, 0.
    bias: on the logits of self-attention, as T5 shares one.
    memory, memory_segments: an encoder's output, for cross-attention, and the numbers of its sequences; a token
        without a number of its own is of sequence 1.
    """

    positions: Int[Array, "#batch length"]
    index: int | Int[Array, ""] = 0
    start: Int[Array, "batch"] | None = None
    segments: Int[Array, "batch length"] | None = None
    bias: Float[Array, "#batch #heads length keys"] | None = None
    memory: Float[Array, "batch source features"] | None = None
    memory_segments: Int[Array, "batch source"] | None = None


class Block(nn.Module):
    """Self-attention, cross-attention where there is any, and a feed-forward layer, each added to the residual stream.

    placement: of the norms. pre: x + f(norm(x)) (Xiong et al. 2020, fig. 1b). post: norm(x + f(x)) (Vaswani et al.
        2017, sec. 3.1). both: x + norm(f(norm(x))) (Gemma 2, 2024, sec. 2).
    """

    norm: MakeModule
    attention: MakeModule
    feed_forward: MakeModule
    cross: MakeModule | None = None
    placement: Literal["pre", "post", "both"] = "pre"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        context: Context,
        past: KeyValues | None = None,
        memory: KeyValues | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length dim"], KeyValues | None, KeyValues | None]:
        """The output, `past` with these tokens in it, and what cross-attention reads of the encoder's output.

        memory: that of an earlier call; None where it is to be made of `context.memory`.
        """

        def add(name: str, function: Callable[[Array], tuple[Array, Any]]) -> tuple[Array, Any]:
            y, kept = function(x if self.placement == "post" else self.norm(name=f"{name}_norm")(x))
            if self.placement == "both":
                y = self.norm(name=f"{name}_post_norm")(y)
            y = x + nn.Dropout(self.dropout)(y, deterministic)
            return self.norm(name=f"{name}_norm")(y) if self.placement == "post" else y, kept

        attention, feed_forward = self.attention(name="attention"), self.feed_forward(name="feed_forward")
        x, past = add("attention", lambda x: attention(x, context, past))
        if self.cross is not None:
            cross = self.cross(name="cross")
            x, memory = add("cross", lambda x: cross(x, context, memory))
        x, _ = add("feed_forward", lambda x: (feed_forward(x), None))
        return x, past, memory


class Depth(NamedTuple):
    """How many layers, and how they are compiled.

    remat: recompute each layer in the backward pass. scan: compile one layer and loop over it.
    """

    layers: int
    remat: bool = False
    scan: bool = False


def stack(
    module: nn.Module,
    blocks: Sequence[MakeModule],
    depth: Depth,
    x: Float[Array, "batch length dim"],
    context: Context,
    cache: Cache | None = None,
    deterministic: bool = True,
) -> tuple[Float[Array, "batch length dim"], Cache | None]:
    """The layers of `module`, one after another, and the cache with these tokens in it. For its compact method.

    Each layer is a pure function of its own parameters. They stand under `layers_0`, `layers_1` ... or, scanned,
    stacked under `layers`; the numbers are the same, and `stack_layers` and `unstack_layers` convert.

    blocks: the kinds of layer, taken in turn; one alone where they are scanned.
    """
    kinds = [make(parent=None) for make in blocks]
    if depth.scan and len(kinds) > 1:
        raise ValueError(f"layers of {len(kinds)} kinds cannot be scanned.")
    dropout_key = module.make_rng("dropout") if not deterministic and module.has_rng("dropout") else None
    asked = module.is_mutable_collection("intermediates")

    def layer(number: int | Array, kind: nn.Module, params: PyTree, x: Array, past: PyTree, memory: PyTree) -> Any:
        rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, number)}
        given = {"params": used(params, dtype=x.dtype)}, residual(x), context, past, memory, deterministic
        (x, past, memory), seen = cast(Any, kind.apply(*given, rngs=rngs, mutable=["intermediates"] if asked else []))
        return residual(x), (seen, *((past, memory) if cache is not None else (None, None)))

    if depth.remat:
        layer = jax.checkpoint(layer, prevent_cse=not depth.scan, static_argnums=1)
    pasts, memories = (None, None) if cache is None else (cache.layers, cache.memory)
    params = _params(module, kinds, depth, x, context)
    if depth.scan:
        each = jnp.arange(depth.layers), params, pasts, memories
        x, (seen, pasts, memories) = jax.lax.scan(lambda x, own: layer(own[0], kinds[0], own[1], x, *own[2:]), x, each)
        names = {"layers": seen}
    else:
        kept = []
        for number, own in enumerate(params):
            past, memory = (each and each[number] for each in (pasts, memories))
            x, more = layer(number, kinds[number % len(kinds)], own, x, past, memory)
            kept.append(more)
        every_seen, pasts, memories = zip(*kept, strict=True)
        names = {f"layers_{number}": seen for number, seen in enumerate(every_seen)}
    for name, seen in names.items():
        if asked:
            module.put_variable("intermediates", name, seen["intermediates"])
    if cache is None:
        return x, None
    has_memory = jax.tree.leaves(memories)
    return x, cache._replace(layers=pasts, memory=memories if has_memory else None, index=cache.index + x.shape[1])


def _params(module: nn.Module, kinds: Sequence[nn.Module], depth: Depth, x: Array, context: Context) -> PyTree:
    """The stacked parameters of all layers, or a list of each one's."""
    layers_key: Any = module.make_rng("params") if module.is_initializing() else None

    def init(number: int) -> PyTree:
        memory = None if context.memory is None else jnp.zeros_like(context.memory[:1, :1])
        example = Context(jnp.zeros((1, 1), jnp.int32), memory=memory)
        key = jax.random.fold_in(layers_key, number)
        return kinds[number % len(kinds)].init(key, jnp.zeros_like(x[:1, :1]), example)["params"]

    def init_all() -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(init, range(depth.layers)))

    if depth.scan:
        return module.variable("params", "layers", init_all).value
    return [module.variable("params", f"layers_{i}", init, i).value for i in range(depth.layers)]


def stack_layers(params: PyTree) -> PyTree:
    """Parameters of unrolled layers as those of scanned layers, in each stack of a tree."""
    numbers = range(sum(name.startswith("layers_") for name in params))
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    rest = {name: stack_layers(value) if isinstance(value, dict) else value for name, value in rest.items()}
    if not numbers:
        return rest
    layers = [params[f"layers_{i}"] for i in numbers]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: PyTree) -> PyTree:
    """Parameters of scanned layers as those of unrolled layers, in each stack of a tree."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    rest = {name: unstack_layers(value) if isinstance(value, dict) else value for name, value in rest.items()}
    if "layers" not in params:
        return rest
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]
    return rest | {f"layers_{i}": layer for i, layer in enumerate(layers)}


def attention_weights(
    model: nn.Module, variables: PyTree, *inputs: Any, **options: Any
) -> dict[str, Float[Array, "..."]]:
    """What each query gave each key, `[batch, heads, length, keys]` by the layer's name, as `layers_0.attention`.

    inputs, options: of `model.apply`. Scanned layers are one entry with an axis of layers before the others.
    """
    _, seen = model.apply(variables, *inputs, mutable=["intermediates"], **options)
    found = {}
    for path, weights in jax.tree_util.tree_leaves_with_path(seen["intermediates"]):
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        found[".".join(names[:-1])] = weights
    return found
