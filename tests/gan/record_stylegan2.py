"""Makes the recorded values of test_stylegan2.py: what the paper's own published code gives for weights of ours.

    python tests/gan/record_stylegan2.py FOLDER

FOLDER is a copy of its repository (NVlabs/stylegan2-ada-pytorch), which is run, not read from: its licence excludes
more. Needs torch; the tests that read the files do not. One file a variant in tests/gan/stylegan2/: pictures of the
generator and logits of the discriminator, the gradients of R1 with respect to all of the discriminator's parameters,
and those of the path length penalty with respect to all of the generator's, by our names. Weights, latents and noise
are drawn by `drawn`, from a seed.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jaxarch.gan.stylegan2 import StyleGAN2Config, stylegan2

PLACE = Path(__file__).parent / "stylegan2"
# Groups divide the batch, and a bound of activations is one that some reach.
SMALL = {"latent_dim": 5, "style_dim": 7, "mapping_layers": 3, "channel_base": 96, "channel_max": 11, "group": 3}
# By name: what differs, height and width, and the number of classes.
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "skip_resnet": ({"generator": "skip", "discriminator": "resnet"}, 16, 0),
    "resnet_skip": ({"generator": "resnet", "discriminator": "skip", "clamp": 1.5, "group": 6}, 8, 3),
    "orig_orig": ({"generator": "orig", "discriminator": "orig", "mapping_rate": 0.1, "group": 2}, 8, 2),
}
BATCH, CHANNELS, MEAN_LENGTH = 6, 3, 0.7
KEY = jax.random.key(5)  # of the path length's noise


def networks(name: str) -> tuple[Any, Any]:
    options, size, classes = VARIANTS[name]
    return stylegan2(StyleGAN2Config(**SMALL | options), (size, size, CHANNELS), classes)


def labels(name: str) -> np.ndarray | None:
    classes = VARIANTS[name][2]
    return np.arange(BATCH, dtype=np.int32) % classes if classes else None


def drawn(name: str) -> dict[str, Any]:
    """Everything at random, so that no part is without effect: `latents`, `noise`, `samples`, and the parameters
    `generator`, `discriminator`.
    """
    generator, discriminator = networks(name)
    rng = np.random.default_rng(0)
    size = VARIANTS[name][1]

    def some(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    given = {"latents": some(BATCH, SMALL["latent_dim"]), "samples": some(BATCH, size, size, CHANNELS)}
    given["noise"] = {layer: some(*shape) for layer, shape in generator.noise_shapes().items()}
    key, asked = jax.random.key(0), labels(name)
    for player, network, x in (("generator", generator, "latents"), ("discriminator", discriminator, "samples")):
        shapes = jax.eval_shape(network.init, {"params": key, "noise": key}, given[x], asked)["params"]
        flat = {}
        for path, leaf in sorted(flatten_dict(dict(shapes), sep="/").items()):
            values = some(*leaf.shape)
            if "mapping_network/dense" in path:  # a hundred times as large, as at the start
                values = values / np.float32(network.config.mapping_rate)
            if path.endswith("affine/bias"):
                values = 1 + values / 4
            flat[path] = values.astype(np.float32)
        given[player] = unflatten_dict(flat, sep="/")
    return given


# --- the published code -------------------------------------------------------------------------


def published(name: str, folder: str) -> tuple[Any, Any]:
    """Both networks of that variant."""
    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.parse_version = lambda text: tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    sys.modules.setdefault("requests", types.ModuleType("requests"))
    sys.modules.setdefault("pkg_resources", stand_in)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from training import networks as theirs

    options, size, classes = VARIANTS[name]
    config = StyleGAN2Config(**SMALL | options)
    shared = {"channel_base": config.channel_base, "channel_max": config.channel_max, "num_fp16_res": 0}
    shared |= {"conv_clamp": config.clamp or None}
    mapping = {"num_layers": config.mapping_layers, "lr_multiplier": config.mapping_rate}
    generator = theirs.Generator(
        config.latent_dim,
        classes,
        config.style_dim,
        size,
        CHANNELS,
        mapping_kwargs=mapping,
        synthesis_kwargs=shared | {"architecture": config.generator},
    )
    discriminator = theirs.Discriminator(
        classes,
        size,
        CHANNELS,
        architecture=config.discriminator,
        mapping_kwargs=mapping,
        epilogue_kwargs={"mbstd_group_size": config.group},
        **shared,
    )
    return generator.train(), discriminator.train()


def their_name(path: str) -> str:
    """Of one of our parameters."""
    table = (
        (r"mapping_network/embedding/", "mapping.embed."),
        (r"mapping_network/dense_(\d+)/", r"mapping.fc\1."),
        (r"^constant$", "synthesis.b4.const"),
        (r"^convs_(\d+)_([01])/", r"synthesis.b\1.conv\2."),
        (r"^to_rgb_(\d+)/", r"synthesis.b\1.torgb."),
        (r"^skips_(\d+)/", r"synthesis.b\1.skip."),
        (r"^from_rgb_(\d+)/", r"b\1.fromrgb."),
        (r"^conv_(\d+)_([01])/", r"b\1.conv\2."),
        (r"^skip_(\d+)/", r"b\1.skip."),
        (r"^conv_4/", "b4.conv."),
        (r"^dense/", "b4.fc."),
        (r"^head/", "b4.out."),
        (r"kernel$", "weight"),
        (r"/", "."),
    )
    for pattern, replacement in table:
        path = re.sub(pattern, replacement, path)
    return path


def to_theirs(path: str, ours: np.ndarray) -> np.ndarray:
    """Kernels with outputs first; the head's picture is flattened with channels first."""
    if path == "dense/kernel":
        return ours.reshape(4, 4, -1, ours.shape[1]).transpose(3, 2, 0, 1).reshape(ours.shape[1], -1)
    return ours.transpose({0: (), 1: (0,), 2: (1, 0), 3: (2, 0, 1), 4: (3, 2, 0, 1)}[ours.ndim])


def to_ours(path: str, theirs: np.ndarray) -> np.ndarray:
    if path == "dense/kernel":
        return theirs.reshape(len(theirs), -1, 4, 4).transpose(2, 3, 1, 0).reshape(-1, len(theirs))
    return theirs.transpose({0: (), 1: (0,), 2: (1, 0), 3: (1, 2, 0), 4: (2, 3, 1, 0)}[theirs.ndim])


def answers(name: str, folder: str) -> dict[str, np.ndarray]:
    """What is recorded, computed by the published code."""
    import torch

    # All in float64, which the code does not foresee: it names float32 where it means the usual type.
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float64
    given: Any = jax.tree.map(lambda leaf: leaf.astype(np.float64), drawn(name))
    generator, discriminator = (network.double() for network in published(name, folder))
    latents, asked = torch.tensor(given["latents"]), labels(name)
    condition = torch.zeros(BATCH, 0) if asked is None else torch.eye(VARIANTS[name][2])[asked]
    for player, network in (("generator", generator), ("discriminator", discriminator)):
        own = flatten_dict(given[player], sep="/")
        table = {their_name(path): torch.tensor(to_theirs(path, values)) for path, values in own.items()}
        for layer, values in given["noise"].items() if player == "generator" else ():
            size, number = layer.split("_")
            table[f"synthesis.b{size}.conv{number}.noise_const"] = torch.tensor(values[0, :, :, 0])
        missing, unexpected = network.load_state_dict(table, strict=False)
        assert not unexpected and all(re.search("resample_filter|w_avg", key) for key in missing), (missing, unexpected)

    def gradients(loss: Any, network: Any, player: str) -> dict[str, np.ndarray]:
        parameters = dict(network.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_name = dict(zip(parameters, grads, strict=True))
        found = {}
        for path, values in flatten_dict(given[player], sep="/").items():
            grad = by_name.pop(their_name(path))
            found[path] = np.zeros_like(values) if grad is None else to_ours(path, grad.numpy())
        assert not by_name
        return found

    styles = generator.mapping(latents, condition, skip_w_avg_update=True)
    pictures = generator.synthesis(styles, noise_mode="const", fused_modconv=False)
    samples = torch.tensor(given["samples"]).permute(0, 3, 1, 2).requires_grad_()
    logits = discriminator(samples, condition)
    (slopes,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    penalty = slopes.square().sum((1, 2, 3)).mean()

    ours = pictures.detach().numpy().transpose(0, 2, 3, 1)
    noise = np.asarray(jax.random.normal(KEY, ours.shape), np.float64) / (ours.shape[1] * ours.shape[2]) ** 0.5
    product = (pictures * torch.tensor(noise).permute(0, 3, 1, 2)).sum()
    (slopes,) = torch.autograd.grad(product, styles, create_graph=True)
    lengths = slopes.square().sum(2).mean(1).sqrt()
    lengthened = (lengths - MEAN_LENGTH).square().mean()

    found = {"pictures": ours, "logits": logits.detach().numpy()[:, 0]}
    found |= {"penalty": penalty.detach().numpy(), "lengths": lengths.detach().numpy()}
    for player, network, loss in (
        ("discriminator", discriminator, penalty),
        ("generator", generator, lengthened),
    ):
        found |= {f"{player}/{path}": grad for path, grad in gradients(loss, network, player).items()}
    return {key: np.ascontiguousarray(value, np.float32) for key, value in found.items()}


def main(folder: str) -> None:
    PLACE.mkdir(exist_ok=True)
    for name in VARIANTS:
        path = PLACE / f"{name}.safetensors"
        save_file(answers(name, folder), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
