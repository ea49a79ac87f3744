"""Every experiment on the meshes that it can use: the curves of one device, in float64."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from experiments import finetune
from jaxarch.data.images import scaled
from jaxarch.gan import training as gan_training
from jaxarch.transformer import training as transformer_training
from jaxarch.transformer.encoder import EncoderConfig, encoder
from jaxarch.transformer.pretrained import save_pretrained
from tests.experiments.test_finetune import VOCAB, WORDS, drawn, wordpiece
from tests.run.running import wide
from tests.run.spread import assert_same_curve, curve

VALUES = {"starts": 32, "replay": 512, "batch_size": 16}
CRITICS = {"random_steps": 32, "capacity": 512, "batch_size": 16}
SMALL = {"layers": 2, "heads": 4, "dim": 32}
MIXED = "data=2,fsdp=2,tensor=2"
# What is changed in each one's configuration, how many steps it takes, and the meshes.
TRIED: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "gpt": (
        {"length": 16, "eval_tokens": 200, "model": {**SMALL, "dropout": 0.1}, "optim": {"accumulate": 2, "ema": 0.9}},
        20,
        ("data=8", "fsdp=8", "fsdp=2,tensor=2,context=2"),
    ),
    "masked_lm": ({"length": 32, "model": SMALL}, 20, ("data=8", MIXED, "context=4")),
    "translation": ({"model": SMALL}, 20, ("data=8", MIXED)),
    "vit": ({"model": SMALL}, 20, ("data=8", MIXED)),
    "dcgan": ({"model": {"features": 8}}, 20, ("data=8", "fsdp=4")),
    "conditional_gan": ({"model": {"features": 8}}, 20, ("data=8", "fsdp=4")),
    "gan_toy": ({}, 20, ("data=8", "fsdp=4")),
    "stylegan": (
        {"game": {"penalty_every": 2, "path_length": 2.0}, "model": {"mixing": 0.9, "channel_max": 16}},
        20,
        ("data=8", "fsdp=4"),
    ),
    "pix2pix": ({}, 20, ("data=8",)),
    "cyclegan": ({"game": {"history": 16}, "model": {"features": 8, "d_features": 8}}, 20, ("data=8", "fsdp=4")),
    "text_to_image": (
        {"size": 16, "features": 8, "matching_steps": 10, "model": {"layers": 1, "dim": 32}},
        20,
        ("data=8", "fsdp=4"),
    ),
    "ppo": ({"envs": 8, "length": 16, "episodes": 4, "agent": {"groups": 8}}, 20, ("data=4", "data=8")),
    "a2c": ({"envs": 8, "episodes": 4}, 20, ("data=8",)),
    "reinforce": ({"envs": 8, "length": 64, "episodes": 4}, 20, ("data=8",)),
    "pqn": ({"envs": 8, "length": 16, "episodes": 4, "agent": {"groups": 8, "minibatches": 4}}, 20, ("data=8",)),
    "dqn": ({"envs": 8, "episodes": 4, "agent": VALUES}, 20, ("data=8",)),
    "iqn": ({"envs": 8, "episodes": 4, "agent": VALUES}, 20, ("data=8",)),
    "sac": ({"envs": 8, "episodes": 4, "agent": CRITICS}, 20, ("data=8",)),
    "tabular": ({"envs": 8, "env_steps": 8 * 32 * 20}, 20, ("data=8",)),
    "memory": ({"envs": 8, "length": 16, "episodes": 4, "agent": {"minibatches": 2}}, 20, ("data=4",)),
    "rl_compare": (
        {"algorithms": ("ppo", "dqn"), "environments": ("CartPole-v1",), "seeds": 4, "env_steps": 4000, "steps": 2},
        2,
        ("replica=4",),
    ),
    "gan_failures": (
        {"treatments": ("relativistic", "relativistic_r1_r2"), "seeds": 7, "width": 16, "layers": 2},
        20,
        ("replica=8",),
    ),
    "td3": ({"envs": 8, "episodes": 4, "agent": CRITICS}, 20, ("data=8",)),
}
QUICK = ("gpt",)  # with the last mesh alone, which has most of the axes


def changed(config: Any, values: dict[str, Any]) -> Any:
    inner = {
        name: changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return dataclasses.replace(config, **inner)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "first"),
    [(name, -1) for name in QUICK] + [pytest.param(name, 0, marks=pytest.mark.slow) for name in TRIED],
)
def test_a_mesh_changes_nothing(name, first, monkeypatch):
    monkeypatch.setitem(transformer_training.PRECISIONS, "f32", jnp.float64)
    monkeypatch.setitem(gan_training.PRECISIONS, "f32", jnp.float64)
    # A penalty is summed in the pictures' type, and the texts of pictures are read in float32 whatever the players do.
    for place in ("experiments.dcgan", "jaxarch.gan.text_to_image"):
        monkeypatch.setattr(f"{place}.scaled", lambda pixels: scaled(pixels).astype(jnp.float64))
    monkeypatch.setattr("experiments.text_to_image.encoder", partial(encoder, dtype=jnp.float64))
    values, steps, meshes = TRIED[name]
    with jax.enable_x64(True):
        module = importlib.import_module(f"experiments.{name}")
        config = module.Config()
        config = changed(config, values if not hasattr(config, "batch_size") else {"batch_size": 16, **values})
        tried = wide(module.experiment(config))
        alone = curve(tried, "", steps)
        for mesh in meshes[first:]:
            assert_same_curve(curve(tried, mesh, steps), alone, 1e-9)


@pytest.mark.devices(8)
@pytest.mark.slow
def test_fine_tuning(tmp_path, monkeypatch):
    """Of a small BERT by low-rank adapters, a part of whose state is frozen."""
    monkeypatch.setitem(transformer_training.PRECISIONS, "f32", jnp.float64)
    model = encoder(EncoderConfig(2, 4, 32), len(VOCAB), 16, head="pooler")
    save_pretrained(tmp_path / "bert", model, drawn(model, 0), wordpiece())
    pairs = itertools.permutations(WORDS, 2)
    rows = "".join(f"{one} {other},{number % 2}\n" for number, (one, other) in enumerate(pairs))
    (tmp_path / "films.csv").write_text("text,label\n" + rows)
    config = finetune.Config(str(tmp_path / "bert"), tune="lora", data=str(tmp_path / "films.csv"), length=8)
    with jax.enable_x64(True):
        tried = wide(finetune.experiment(changed(config, {"batch_size": 16, "optim": {"warmup": 1}})))
        alone = curve(tried, "", 20)
        for mesh in ("data=8", MIXED, "context=2,fsdp=2"):
            assert_same_curve(curve(tried, mesh, 20), alone, 1e-9)


@pytest.mark.devices(8)
@pytest.mark.slow
def test_a_transformer_in_float32():
    module = importlib.import_module("experiments.gpt")
    config = changed(module.Config(), {**TRIED["gpt"][0], "batch_size": 16})
    alone = curve(module.experiment(config), "", 20)
    for mesh in ("data=8", MIXED, "context=4"):
        assert_same_curve(curve(module.experiment(config), mesh, 20), alone, 1e-5)
