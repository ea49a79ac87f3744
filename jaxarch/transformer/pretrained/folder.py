"""A folder of published weights: read into a model, and written from one.

config.json          what the model is
model.safetensors    its tensors; or model.safetensors.index.json and the shards that it names
tokenizer.json       its tokeniser, where there is one
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import unstack_layers
from jaxarch.transformer.decoder import Decoder, ModelConfig, decoder
from jaxarch.transformer.pretrained import tokenizer as tokenizers
from jaxarch.transformer.pretrained.family import Family, Settings
from jaxarch.transformer.pretrained.gpt2 import GPT2
from jaxarch.transformer.pretrained.llama import LLAMA
from jaxarch.transformer.pretrained.tensors import FILE, FLOATS, INDEX, Tensors, read_json, write, write_json

FAMILIES = (GPT2, LLAMA)
CONFIG = "config.json"
HEAD = "lm_head.weight"
SHARD_BYTES = 5 * 10**9


class Pretrained(NamedTuple):
    """`model.apply({"params": params}, tokens)` gives logits. config: the folder's config.json."""

    model: Decoder
    params: PyTree
    tokenizer: Tokenizer | None
    config: dict[str, Any]


Shapes = dict[str, tuple[int, ...]]  # of parameters, by names as layers_0.attention.query.kernel


class Part(NamedTuple):
    """Where a parameter lies in its tensor: from `start` on along its last axis, `transposed` as a whole or not."""

    tensor: str
    start: int
    transposed: bool


class Layout(NamedTuple):
    """Of a model in a folder: the shape of each tensor, the parts of it, and the part that each parameter is."""

    shapes: Shapes
    params: dict[str, tuple[str, ...]]
    parts: dict[str, Part]


# --- in -----------------------------------------------------------------------------------------


def load_pretrained(
    folder: str | Path,
    dtype: DTypeLike = jnp.float32,
    sharding: Sharding | Callable[[str], Sharding] | None = None,
) -> Pretrained:
    """The model of a folder that `transformers` has written, with its parameters and its tokeniser.

    dtype: of the parameters and of the computation.
    sharding: of all parameters, or of each by its name, as layers_0.attention.query.kernel; None puts them on the
        default device. A device reads its own part of the file alone, and the host holds one such part at a time.
    Dropout is off; it belongs to the training, not to the weights.
    Raises ConfigError for a folder that is not there or damaged, an architecture or an option that is not supported,
    and tensors that are missing, misshapen or without a place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder} has no {CONFIG}; name a folder that transformers has saved.")
    settings = read_json(folder / CONFIG)
    try:
        family = family_of(settings)
        described = family.described(settings)
        if min(described.vocab, described.length) < 1:
            raise ConfigError(f"a vocabulary of {described.vocab} and a length of {described.length} are no model.")
        model = decoder(*described, dtype)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    shapes = shapes_of(model)
    layout = layout_of(family, shapes)
    tensors = Tensors(folder)
    named = checked(tensors, layout, family, folder, settings["architectures"][0])
    params = {}
    for name, shape in shapes.items():
        read = partial(_read, tensors, layout.parts[name], named, shape, np.dtype(dtype))
        if sharding is None:
            params[name] = jnp.asarray(read((slice(None),) * len(shape)))
        else:
            where = sharding if isinstance(sharding, Sharding) else sharding(name)
            params[name] = jax.make_array_from_callback(shape, where, read)
    return Pretrained(model, traverse_util.unflatten_dict(params, sep="."), tokenizers.load(folder), settings)


def family_of(settings: Settings) -> Family:
    """Raises ConfigError for an architecture that none of them is, or quantised weights."""
    supported = [name for family in FAMILIES for name in family.architectures]
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = next((family for family in FAMILIES if name in family.architectures), None)
    if family is None:
        said = "no architecture is named" if name is None else f"the architecture {name} is not supported"
        raise ConfigError(f"{said}; these are: {', '.join(supported)}.")
    kind = settings.get("model_type")
    if isinstance(kind, str) and not str(name).lower().startswith(kind):
        raise ConfigError(f"the architecture {name} is not of the model_type {kind}.")
    if settings.get("quantization_config"):
        raise ConfigError("quantization_config cannot be expressed here, only weights as floats.")
    return family


def shapes_of(model: Decoder) -> Shapes:
    """Of the parameters of a model whose layers are not stacked."""
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {name: leaf.shape for name, leaf in flat(tree).items()}


def flat(tree: PyTree) -> dict[str, Any]:
    return cast(dict[str, Any], traverse_util.flatten_dict(tree, sep="."))


def layout_of(family: Family, params: Shapes) -> Layout:
    """The family's table, written out for each layer and cut down to the parameters that there are."""
    layers = sum(bool(re.fullmatch(r"layers_\d+\.attention_norm\.scale", name)) for name in params)
    layout = Layout({}, {}, {})
    for pattern, ours in family.names.items():
        for number in range(layers) if "#" in pattern else (0,):
            tensor = pattern.replace("#", str(number))
            names = [name.replace("#", str(number)) for name in ((ours,) if isinstance(ours, str) else ours)]
            transposed = names[0].endswith(".T")
            names = [name.removesuffix(".T") for name in names]
            if names[0] not in params:
                continue
            start = 0
            for name in names:
                layout.parts[name] = Part(tensor, start, transposed)
                start += params[name][-1]
            shape = (*params[names[0]][:-1], start)
            layout.shapes[tensor] = shape[::-1] if transposed else shape
            layout.params[tensor] = tuple(names)
    return layout


def checked(tensors: Tensors, layout: Layout, family: Family, folder: Path, architecture: str) -> dict[str, str]:
    """The name that each tensor of the layout has in the folder. Raises ConfigError where they do not fit."""
    there = {}
    for name in tensors.names():
        full = name if name.startswith((family.prefix, HEAD)) else family.prefix + name
        there[full] = name
    wrong = [f"the tensor {name} is missing" for name in layout.shapes if name not in there]
    for full, name in there.items():
        found, wanted = tensors.shape(name), layout.shapes.get(full)
        if wanted is not None and found != wanted:
            wrong.append(f"the tensor {name} is {list(found)}, not {list(wanted)}")
        elif wanted is not None and tensors.kind(name) not in FLOATS:
            wrong.append(f"the tensor {name} is of type {tensors.kind(name)}, not one of {', '.join(FLOATS)}")
        elif wanted is None and full != HEAD and not re.fullmatch(family.ignored, full):
            wrong.append(f"the tensor {name} has no place in a {architecture}")
    if HEAD in there and HEAD not in layout.shapes and not wrong:
        embedding = there[layout.parts["embedding.embedding"].tensor]
        whole = (slice(None), slice(None))
        if not np.array_equal(tensors.read(HEAD, whole), tensors.read(embedding, whole)):
            wrong.append(
                f"the tensors {HEAD} and {embedding} differ, though tie_word_embeddings says that they are one"
            )
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(f"{folder}: {'; '.join(wrong[:4])}{more}.")
    return there


def _read(
    tensors: Tensors,
    part: Part,
    named: dict[str, str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: Any,
) -> np.ndarray:
    """The part `index`, a slice for each axis, of a parameter of that shape."""
    bounds = [slice(*piece.indices(size)[:2]) for piece, size in zip(index, shape, strict=True)]
    bounds[-1] = slice(bounds[-1].start + part.start, bounds[-1].stop + part.start)
    piece = tensors.read(named[part.tensor], tuple(bounds[::-1] if part.transposed else bounds))
    return np.ascontiguousarray(piece.T if part.transposed else piece).astype(dtype, copy=False)


# --- out ----------------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path,
    model: Decoder,
    params: PyTree,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` reads, in the parameters' own types; `load_pretrained` is its inverse.

    params: as `load_pretrained` gives them, or stacked by `scan_layers`.
    shard_bytes: the most that one file of tensors holds, where no single tensor is larger.
    A GPT-2 without biases is written with biases of 0. config.json comes last, so that half a folder is none.
    Raises ConfigError where the model is of no supported family, which says what stands against each, where the
    parameters are not this model's, and where the folder already holds a model.
    """
    folder = Path(folder)
    family = family_for(model.config)
    settings = family.settings(model)
    present = [name for name in (CONFIG, FILE, INDEX) if (folder / name).exists()]
    if present:
        raise ConfigError(f"{folder} already holds {present[0]}; name a new folder.")
    if model.config.scan_layers and "layers" in params:
        params = unstack_layers(params)
    leaves = flat(params)
    shapes = shapes_of(decoder(*family.described(settings)))
    for name, shape in shapes.items():
        if name not in leaves and name.endswith(".bias") and not model.config.bias:
            leaves[name] = np.zeros(shape, leaves["embedding.embedding"].dtype)
    _check_params(leaves, shapes)
    layout = layout_of(family, shapes)
    sizes = {name: sum(leaves[ours].nbytes for ours in layout.params[name]) for name in layout.shapes}

    def tensor(name: str) -> np.ndarray:
        joined = [np.asarray(leaves[ours]) for ours in layout.params[name]]
        whole = joined[0] if len(joined) == 1 else np.concatenate(joined, axis=-1)
        return whole.T if layout.parts[layout.params[name][0]].transposed else whole

    folder.mkdir(parents=True, exist_ok=True)
    write(folder, sizes, tensor, shard_bytes)
    if tokenizer is not None:
        tokenizers.save(folder, tokenizer)
    end = None if tokenizer is None else tokenizer.end
    dtype = leaves["embedding.embedding"].dtype
    write_json(folder / CONFIG, {**settings, "bos_token_id": end, "eos_token_id": end, "torch_dtype": str(dtype)})


def family_for(config: ModelConfig) -> Family:
    """The family of which the configuration is one. Raises ConfigError."""
    against = {family.title: family.obstacles(config) for family in FAMILIES}
    for family in FAMILIES:
        if not against[family.title]:
            return family
    said = "; ".join(f"against {title} stands {', '.join(options)}" for title, options in against.items())
    raise ConfigError(f"this model cannot be written for transformers: {said}.")


def _check_params(leaves: dict[str, Any], shapes: Shapes) -> None:
    def wrong() -> Iterable[str]:
        yield from (f"{name} is missing" for name in shapes if name not in leaves)
        for name, leaf in leaves.items():
            if name not in shapes:
                yield f"{name} has no place"
            elif tuple(leaf.shape) != shapes[name]:
                yield f"{name} is {list(leaf.shape)}, not {list(shapes[name])}"

    first = next(iter(wrong()), None)
    if first is not None:
        raise ConfigError(f"the parameters are not this model's: {first}.")
