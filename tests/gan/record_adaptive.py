"""Makes the recorded values of test_adaptive.py: what the published augmentation makes of a picture.

    python tests/gan/record_adaptive.py PATH

PATH: a checkout of StyleGAN2-ADA for PyTorch (github.com/NVlabs/stylegan2-ada-pytorch). Needs torch, scipy; the tests
that read the file do not. Its transforms are each set to a percentile of their distribution, without randomness.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import save_file

FILE = Path(__file__).parent / "recorded" / "adaptive.safetensors"
SHAPE = (1, 22, 26, 3)  # not square; smaller ones are too small for the published filtering
PICTURES = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
# By our names, the published ones.
NAMES = {
    "x_flip": "xflip",
    "rotate90": "rotate90",
    "integer_translation": "xint",
    "isotropic_scaling": "scale",
    "rotation": "rotate",
    "anisotropic_scaling": "aniso",
    "fractional_translation": "xfrac",
    "brightness": "brightness",
    "contrast": "contrast",
    "luma_flip": "lumaflip",
    "hue": "hue",
    "saturation": "saturation",
    "filtering": "imgfilter",
    "cutout": "cutout",
}
CASES = {name: ([name], percentile) for name, percentile in zip(NAMES, np.linspace(0.55, 0.95, len(NAMES)))}
CASES |= {
    "position": (list(NAMES)[:7], 0.8),
    "position, other way": (list(NAMES)[:7], 0.35),
    "color": (list(NAMES)[7:12], 0.6),
    "all": (list(NAMES), 0.7),
}


def main(path: str) -> None:
    sys.path.insert(0, path)
    for name in ("requests", "pkg_resources"):  # imported there, not used here
        if find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
    import torch
    from training.augment import AugmentPipe  # pyright: ignore[reportMissingImports]

    pictures = torch.tensor(PICTURES.transpose(0, 3, 1, 2))
    grey = pictures[:, :1]
    found = {}
    for case, (names, percentile) in CASES.items():
        pipe = AugmentPipe(**{NAMES[name]: 1 for name in names})
        found[case] = pipe(pictures, debug_percentile=float(percentile)).numpy()
        if case in ("color", "all"):
            found[f"{case}, grey"] = pipe(grey, debug_percentile=float(percentile)).numpy()
    FILE.parent.mkdir(exist_ok=True)
    save_file({case: np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for case, array in found.items()}, FILE)
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1])
