"""A folder of published weights: read into a model, and written from one.

config.json          what the model is
model.safetensors    its tensors; or model.safetensors.index.json and the shards that it names
tokenizer.json       its tokeniser, where there is one
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from jaxarch.data.tokenization import Tokenizer
from jaxarch.run.command import write_json
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import unstack_layers
from jaxarch.transformer.pretrained import tokenizer as tokenizers
from jaxarch.transformer.pretrained.bert import BERT
from jaxarch.transformer.pretrained.family import Family, Settings
from jaxarch.transformer.pretrained.gemma import GEMMA, GEMMA_2
from jaxarch.transformer.pretrained.gpt2 import GPT2
from jaxarch.transformer.pretrained.llama import LLAMA
from jaxarch.transformer.pretrained.t5 import T5, T5_ENCODER
from jaxarch.transformer.pretrained.tensors import FILE, FLOATS, INDEX, Tensors, read_json, write
from jaxarch.transformer.pretrained.vit import VIT
from jaxarch.transformer.pretrained.whisper import WHISPER

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, GEMMA, GEMMA_2, VIT, WHISPER, T5, T5_ENCODER, BERT)
CONFIG = "config.json"
SHARD_BYTES = 5 * 10**9

log = logging.getLogger(__name__)


class Pretrained(NamedTuple):
    """A model, its parameters for `model.apply({"params": params}, ...)`, and the folder's config.json."""

    model: Any
    params: PyTree
    tokenizer: Tokenizer | None
    config: dict[str, Any]


Shapes = dict[str, tuple[int, ...]]  # of parameters, by names as layers_0.attention.query.kernel


class Part(NamedTuple):
    """Where a parameter lies in its tensor: its axes in the tensor's terms, and where its last one begins."""

    tensor: str
    axes: tuple[int, ...]
    start: int


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
    architecture: str | None = None,
    overrides: Settings | None = None,
    key: Key[Array, ""] | None = None,
) -> Pretrained:
    """The model of a folder that `transformers` has written, with its parameters and its tokeniser.

    dtype: of the parameters and of the computation.
    sharding: of all parameters, or of each by its name, as layers_0.attention.query.kernel; None puts them on the
        default device. A device reads its own part of the file alone, and the host holds one such part at a time.
    architecture: another one of the family, as BertForSequenceClassification of a BertModel. A head that the folder
        lacks is new, drawn from `key` (0 where None); one that the architecture lacks is left out; the log says so.
    overrides: of the folder's config.json, as {"num_labels": 3}.
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
        family = family_of(settings, architecture)
        own = settings["architectures"][0]
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    tensors = Tensors(folder)
    try:
        settings = {**family.completed(settings, tensors), "architectures": [architecture or own], **(overrides or {})}
        model = family.model(settings, dtype)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    shapes = shapes_of(model)
    layout = layout_of(family, shapes)
    named = checked(
        tensors, layout, family, folder, settings["architectures"][0], other_head=architecture not in (None, own)
    )
    drawn = new(model, [name for name in shapes if layout.parts[name].tensor not in named], key)
    params = {}
    for name, shape in shapes.items():
        if name in drawn:
            read = partial(_cut, drawn[name].astype(dtype))
        else:
            read = partial(_read, tensors, layout.parts[name], named, shape, np.dtype(dtype))
        if sharding is None:
            params[name] = jnp.asarray(read((slice(None),) * len(shape)))
        else:
            where = sharding if isinstance(sharding, Sharding) else sharding(name)
            params[name] = jax.make_array_from_callback(shape, where, read)
    return Pretrained(model, traverse_util.unflatten_dict(params, sep="."), tokenizers.load(folder), settings)


def family_of(settings: Settings, architecture: str | None = None) -> Family:
    """The one that the settings and the architecture asked for are of.

    Raises ConfigError where there is none, and for quantised weights.
    """
    names = settings.get("architectures")
    own = names[0] if isinstance(names, list) and names else None
    wanted = architecture or own
    family = next((family for family in FAMILIES if wanted in family.architectures), None)
    if family is None:
        supported = ", ".join(name for family in FAMILIES for name in family.architectures)
        said = "no architecture is named" if wanted is None else f"the architecture {wanted} is not supported"
        within = [one for one in FAMILIES if own in one.bodies]
        if own == wanted and within:
            raise ConfigError(f"{own} has no head; ask for the architecture {' or '.join(within[0].architectures)}.")
        raise ConfigError(f"{said}; these are: {supported}.")
    if own not in (*family.architectures, *family.bodies):
        raise ConfigError(f"the architecture {own} is not of the family of {wanted}.")
    kind = settings.get("model_type")
    if isinstance(kind, str) and not str(own).lower().startswith(kind.replace("_", "")):
        raise ConfigError(f"the architecture {own} is not of the model_type {kind}.")
    if settings.get("quantization_config"):
        raise ConfigError("quantization_config cannot be expressed here, only weights as floats.")
    return family


def shapes_of(model: Any) -> Shapes:
    """Of the model's parameters, its layers not stacked."""

    def init() -> PyTree:
        return unstack_layers(model.init(jax.random.key(0), *model.inputs())["params"])

    return {name: leaf.shape for name, leaf in flat(jax.eval_shape(init)).items()}


def flat(tree: PyTree) -> dict[str, Any]:
    return cast(dict[str, Any], traverse_util.flatten_dict(tree, sep="."))


def layout_of(family: Family, params: Shapes) -> Layout:
    """The family's table, written out for each layer and cut down to the parameters that there are."""
    layout = Layout({}, {}, {})
    numbered = re.compile(r"layers_(\d+)\.")
    layers = 1 + max((int(found[1]) for name in params if (found := numbered.search(name))), default=-1)
    table = family.names(params) if callable(family.names) else family.names
    for pattern, ours in table.items():
        for number in map(str, range(layers) if "#" in pattern else (0,)):
            tensor = pattern.replace("#", number)
            names: list[str] = []
            axes: tuple[int, ...] = ()
            for name in (ours,) if isinstance(ours, str) else ours:
                name, order = _order(name.replace("#", number))
                if name in params:
                    names.append(name)
                    axes = tuple(range(len(params[name]))) if order is None else order
            if not names:
                continue
            start = 0
            for name in names:
                layout.parts[name] = Part(tensor, axes, start)
                start += params[name][-1]
            shape = (*params[names[0]][:-1], start)
            layout.shapes[tensor] = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
            layout.params[tensor] = tuple(names)
    return layout


def _order(name: str) -> tuple[str, tuple[int, ...] | None]:
    """A parameter's name in a table, and which axis of the tensor each of its own is, where that is said."""
    if name.endswith(".T"):
        return name.removesuffix(".T"), (1, 0)
    name, _, axes = name.partition("@")
    return name, tuple(map(int, axes)) or None


def checked(
    tensors: Tensors, layout: Layout, family: Family, folder: Path, architecture: str, other_head: bool
) -> dict[str, str]:
    """The name that each tensor of the layout has in the folder. Raises ConfigError where they do not fit.

    other_head: the architecture is not the folder's own: tensors of heads may be missing, or have no place.
    """
    there = {}
    for name in tensors.names():
        full = name if name.startswith((family.prefix, *family.heads)) else family.prefix + name
        for old, now in family.older.items():
            full = full.removesuffix(old) + now if full.endswith(old) else full
        there[full] = name
    for copy, name in family.copies.items():
        if copy in there and name not in there and copy not in layout.shapes:
            there[name] = there.pop(copy)
    missing = [name for name in layout.shapes if name not in there]
    without_place = [full for full in there if full not in (*layout.shapes, *family.copies)]
    without_place = [full for full in without_place if not re.fullmatch(family.ignored, full)]
    if other_head:
        fresh = [name for name in missing if name.startswith(family.heads)]
        left_out = [full for full in without_place if full.startswith(family.heads)]
        for said, names in ("are new", fresh), ("are left out", left_out):
            if names:
                log.warning("%s, read as a %s: %s %s.", folder, architecture, ", ".join(names), said)
        missing = [name for name in missing if name not in fresh]
        without_place = [full for full in without_place if full not in left_out]
    wrong = [f"the tensor {name} is missing" for name in missing]
    for full, name in there.items():
        found, wanted = tensors.shape(name), layout.shapes.get(full)
        if wanted is not None and found != wanted:
            wrong.append(f"the tensor {name} is {list(found)}, not {list(wanted)}")
        elif wanted is not None and tensors.kind(name) not in FLOATS:
            wrong.append(f"the tensor {name} is of type {tensors.kind(name)}, not one of {', '.join(FLOATS)}")
    wrong += [f"the tensor {there[full]} has no place in a {architecture}" for full in without_place]
    for copy, name in family.copies.items():
        if not wrong and copy in there and name in there and copy not in layout.shapes:
            one, other = (tensors.whole(there[each]) for each in (copy, name))
            if not np.array_equal(one, other):
                tie = "though tie_word_embeddings says that they are one"
                wrong.append(f"the tensors {there[copy]} and {there[name]} differ, {tie}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ConfigError(f"{folder}: {'; '.join(wrong[:4])}{more}.")
    return {full: name for full, name in there.items() if full in layout.shapes}


def new(model: Any, names: list[str], key: Key[Array, ""] | None) -> dict[str, np.ndarray]:
    """These parameters, drawn as the model draws them."""

    def init(key: Key[Array, ""]) -> dict[str, Array]:
        drawn = flat(unstack_layers(model.init(key, *model.inputs())["params"]))
        return {name: drawn[name] for name in names}

    return jax.device_get(jax.jit(init)(jax.random.key(0) if key is None else key)) if names else {}


def _cut(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


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
    piece = tensors.read(named[part.tensor], tuple(bounds[part.axes.index(axis)] for axis in range(len(shape))))
    return np.ascontiguousarray(piece.transpose(part.axes)).astype(dtype, copy=False)


# --- out ----------------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path,
    model: nn.Module,
    params: PyTree,
    tokenizer: Tokenizer | None = None,
    config: Settings | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` reads, in the parameters' own types; `load_pretrained` is its inverse.

    params: as `load_pretrained` gives them, or stacked by `scan_layers`.
    config: entries of config.json of which the model knows nothing, as the names of its labels; what it does know is
        its own to say. So what `load_pretrained` gives can be written as it is: `save_pretrained(folder, *found)`.
    shard_bytes: the most that one file of tensors holds, where no single tensor is larger.
    A GPT-2 without biases is written with biases of 0. config.json comes last, so that half a folder is none.
    Raises ConfigError where the model is of no supported family, which says what stands against each, where the
    parameters are not this model's, and where the folder already holds a model.
    """
    folder = Path(folder)
    family = family_for(model)
    settings = family.settings(model)
    present = [name for name in (CONFIG, FILE, INDEX) if (folder / name).exists()]
    if present:
        raise ConfigError(f"{folder} already holds {present[0]}; name a new folder.")
    leaves = flat(unstack_layers(params))
    _check_params(leaves, shapes_of(model))
    dtype = next(iter(leaves.values())).dtype
    shapes = shapes_of(family.model(settings, jnp.float32))
    leaves |= {name: np.zeros(shape, dtype) for name, shape in shapes.items() if name not in leaves}
    layout = layout_of(family, shapes)
    body = settings["architectures"][0] in family.bodies
    named = {name.removeprefix(family.prefix) if body else name: name for name in layout.shapes}
    sizes = {name: sum(leaves[ours].nbytes for ours in layout.params[full]) for name, full in named.items()}

    def tensor(name: str) -> np.ndarray:
        ours = list(layout.params[named[name]])
        parts = [np.asarray(leaves[one]) for one in ours]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return whole.transpose(np.argsort(layout.parts[ours[0]].axes))

    folder.mkdir(parents=True, exist_ok=True)
    write(folder, sizes, tensor, shard_bytes)
    if tokenizer is not None:
        tokenizers.save(folder, tokenizer)
    end = None if tokenizer is None else tokenizer.end
    known: Mapping[str, Any] = {"bos_token_id": end, "eos_token_id": end}
    write_json(folder / CONFIG, {**known, **(config or {}), **settings, "torch_dtype": str(dtype)})


def family_for(model: nn.Module) -> Family:
    """The family of which the model is one. Raises ConfigError."""
    against = [(family, family.obstacles(model)) for family in FAMILIES if isinstance(model, family.kind)]
    for family, options in against:
        if not options:
            return family
    said = "; ".join(f"against {family.title} stands {', '.join(options)}" for family, options in against)
    raise ConfigError(f"this model cannot be written for transformers: {said or 'no family has its kind'}.")


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
