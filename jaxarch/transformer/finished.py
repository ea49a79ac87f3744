"""A finished run of a Transformer, without its data: the model, its parameters, its tokeniser.

What the model is says the run's configuration, or the `config.json` among its assets, which is that of a folder of
published weights (`save_description`). A run that trained a part of a model has the other part in its state.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxarch.data.tokenization import Tokenizer, load_tokenizer
from jaxarch.run.command import from_json, write_json
from jaxarch.run.load import raw_state, saved_config
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import unstack_layers
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.lora import LoraConfig, merged
from jaxarch.transformer.pretrained.folder import CONFIG, family_for, family_of, flat, shapes_of
from jaxarch.transformer.pretrained.tensors import read_json
from jaxarch.transformer.training import PRECISIONS


class Finished(NamedTuple):
    """`model.apply({"params": params}, ...)`. tokenizer: None where the run has none."""

    model: Any
    params: PyTree
    tokenizer: Tokenizer | None


def save_description(folder: Path, model: nn.Module) -> None:
    """Writes the `config.json` of the model, from which `restored` composes it; none of a model of no published family.

    Without dropout, which is of the training: weights that were trained with another one mean the same.
    """
    try:
        settings = family_for(model).settings(model)
    except ConfigError:
        return
    write_json(folder / CONFIG, {name: value for name, value in settings.items() if "drop" not in name})


def restored(run: Path, step: str = "newest") -> Finished:
    """The model as it was saved, the average of its parameters where the run kept one.

    step: newest, best or a number.
    Raises ConfigError where there is no such run or checkpoint, where it is damaged, or holds several members.
    """
    config: dict[str, Any] = saved_config(run)["config"]
    assets = run / "assets"
    dtype = PRECISIONS[config.get("precision", "f32")]
    tokenizer = load_tokenizer(assets) if (assets / "tokenizer.json").exists() else None
    if (assets / CONFIG).exists():
        settings = read_json(assets / CONFIG)
        model = family_of(settings).model(settings, dtype)
    elif tokenizer is not None and "length" in config and of_decoder(config.get("model")):
        model = decoder(from_json(ModelConfig(), config["model"]), tokenizer.vocab, config["length"], dtype)
    else:
        raise ConfigError(
            f"{run} is the run neither of a decoder nor of a model of a published family; jaxarch.run.load takes any."
        )
    state = raw_state(run, step)
    params = state["ema"] or state["params"]
    if state.get("frozen"):
        params = merged(state["frozen"], params, from_json(LoraConfig(), config["lora"]).scale)
    params = jax.tree.map(jnp.asarray, params)
    if shapes_of(model) != {name: leaf.shape for name, leaf in flat(unstack_layers(params)).items()}:
        raise ConfigError(f"{run} holds several replicas or points of a sweep; name a run of one.")
    return Finished(model, params, tokenizer)


def of_decoder(saved: Any) -> bool:
    """Whether these are a decoder's options, some of which an older run may lack, and none of another model's."""
    return isinstance(saved, dict) and saved.keys() <= {field.name for field in dataclasses.fields(ModelConfig)}
