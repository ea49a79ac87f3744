"""Makes the recorded values of test_inception.py and test_weights.py.

    python tests/gan/record_inception.py

Features and logits of random weights by pytorch-fid's own network, and small files of torch's two formats, all in
tests/gan/recorded/. Needs torch, torchvision and pytorch-fid; the tests that read the files do not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PLACE = Path(__file__).parent / "recorded"
SIZE = 139  # the last maps are 3 x 3: they have an edge and a middle


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Every tensor drawn, none at 0 or 1, so that each is of effect and the signal neither dies nor explodes."""
    rng, found = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        numbers = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            numbers *= np.float32((2 / np.prod(shape[1:])) ** 0.5 * (1 if len(shape) == 4 else 0.1))
        elif name.endswith(("bn.weight", "running_var")):
            numbers = np.exp(np.float32(0.3) * numbers)
        else:
            numbers *= np.float32(0.2)
        found[name] = numbers
    return found


def pictures() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)


def published(pixels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Its random weights, and the features and logits that it has with them."""
    import torch
    from pytorch_fid import inception

    class Loaded(Exception):
        pass

    weights: dict[str, np.ndarray] = {}
    load = torch.nn.Module.load_state_dict

    def random(module: torch.nn.Module, *_: object, **__: object) -> None:
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items() if "num_batches" not in name}
        weights.update(random_weights(shapes))
        load(module, {name: torch.tensor(array) for name, array in weights.items()}, strict=False)

    inception.load_state_dict_from_url = lambda *_, **__: {}
    torch.nn.Module.load_state_dict = random
    try:
        network = inception.fid_inception_v3().eval()
        wrapped = inception.InceptionV3([3], resize_input=False).eval()
    finally:
        torch.nn.Module.load_state_dict = load
    inputs = torch.tensor(pixels.transpose(0, 3, 1, 2)) / 255
    with torch.no_grad():
        features, logits = wrapped(inputs)[0][:, :, 0, 0].numpy(), network(2 * inputs - 1).numpy()
    return weights, features, logits


def tensors() -> dict[str, np.ndarray]:
    """What the small files hold; `view`, `turned` and `whole` share their numbers there."""
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        "whole": whole,
        "view": whole[1, 1:],
        "turned": whole.transpose(2, 1, 0),
        "parameter": np.float32([0.5, -0.5]),
        "half": np.float16([1, 2, 3]),
        "number": np.int64(7),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }


def main() -> None:
    import torch

    PLACE.mkdir(exist_ok=True)
    _, features, logits = published(pictures())
    save_file({"features": features, "logits": logits}, PLACE / "inception.safetensors")
    arrays = tensors()
    whole = torch.tensor(arrays["whole"])
    content = {name: torch.tensor(array) for name, array in arrays.items()}
    content |= {"whole": whole, "view": whole[1, 1:], "turned": whole.permute(2, 1, 0)}
    content["parameter"] = torch.nn.Parameter(content["parameter"])
    torch.save(content, PLACE / "zipped.pth")
    torch.save(content, PLACE / "in_sequence.pth", _use_new_zipfile_serialization=False)
    for file in sorted(PLACE.iterdir()):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
