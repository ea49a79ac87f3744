"""Inception v3 (Szegedy et al. 2016, fig. 5 to 7, table 1) as the Frechet Inception distance uses it.

The weights are those of TensorFlow's model of 2015-12-05, in the file `pt_inception-2015-12-05-6726825d.pth` of
pytorch-fid, whose names of tensors are the names here. It is another network than torchvision's: 1,008 classes, average
pools that leave the padding out, and a maximum where the last block has an average.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PyTree

from jaxarch.data.images import scaled
from jaxarch.gan.features import Extractor
from jaxarch.gan.weights import read_tensors
from jaxarch.run.protocol import ConfigError

SIZE, CLASSES = 299, 1008
FILE = "pt_inception-2015-12-05-6726825d.pth"


class Unit(NamedTuple):
    """A convolution of so many features; of stride 1 it is padded, of 2 not."""

    features: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1


class Convolution(nn.Module):
    """Convolution, batch normalisation by the running statistics, ReLU."""

    unit: Unit
    padding: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ features"]:
        features, window, stride = self.unit
        padding = self.padding or ("SAME" if stride == 1 else "VALID")
        x = nn.Conv(features, window, (stride, stride), padding, use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


Branch = tuple[str, tuple[Unit | tuple[Unit, Unit], ...]]


class Mixed(nn.Module):
    """Branches side by side, the last one a pool.

    branches: names and units, in turn; two units in one place both read what is before them.
    pool: "average" or "max". pooled: the features of the convolution after the pool; 0: there is none, and the strides
        of the block are 2.
    """

    branches: tuple[Branch, ...]
    pool: str
    pooled: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ features"]:
        found = []
        for name, units in self.branches:
            branch = x
            for number, unit in enumerate(units, 1):
                label = name if len(units) == 1 else f"{name}_{number}"
                if isinstance(unit, Unit):
                    branch = Convolution(unit, name=label)(branch)
                else:
                    pair = [Convolution(one, name=label + letter)(branch) for one, letter in zip(unit, "ab")]
                    branch = jnp.concatenate(pair, axis=-1)
            found.append(branch)
        found.append(self.pooling(x))
        return jnp.concatenate(found, axis=-1)

    def pooling(self, x: Array) -> Array:
        if not self.pooled:
            return nn.max_pool(x, (3, 3), (2, 2))
        if self.pool == "max":
            x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        else:
            x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        return Convolution(Unit(self.pooled), name="branch_pool")(x)


def block_a(pooled: int, name: str) -> Mixed:
    branches = (
        ("branch1x1", (Unit(64),)),
        ("branch5x5", (Unit(48), Unit(64, (5, 5)))),
        ("branch3x3dbl", (Unit(64), Unit(96, (3, 3)), Unit(96, (3, 3)))),
    )
    return Mixed(branches, "average", pooled, name=name)


def block_b(name: str) -> Mixed:
    branches = (
        ("branch3x3", (Unit(384, (3, 3), 2),)),
        ("branch3x3dbl", (Unit(64), Unit(96, (3, 3)), Unit(96, (3, 3), 2))),
    )
    return Mixed(branches, "max", 0, name=name)


def block_c(inner: int, name: str) -> Mixed:
    row, column = (1, 7), (7, 1)
    twice = (Unit(inner), Unit(inner, column), Unit(inner, row), Unit(inner, column), Unit(192, row))
    branches = (
        ("branch1x1", (Unit(192),)),
        ("branch7x7", (Unit(inner), Unit(inner, row), Unit(192, column))),
        ("branch7x7dbl", twice),
    )
    return Mixed(branches, "average", 192, name=name)


def block_d(name: str) -> Mixed:
    branches = (
        ("branch3x3", (Unit(192), Unit(320, (3, 3), 2))),
        ("branch7x7x3", (Unit(192), Unit(192, (1, 7)), Unit(192, (7, 1)), Unit(192, (3, 3), 2))),
    )
    return Mixed(branches, "max", 0, name=name)


def block_e(pool: str, name: str) -> Mixed:
    fork = Unit(384, (1, 3)), Unit(384, (3, 1))
    branches = (
        ("branch1x1", (Unit(320),)),
        ("branch3x3", (Unit(384), fork)),
        ("branch3x3dbl", (Unit(448), Unit(384, (3, 3)), fork)),
    )
    return Mixed(branches, pool, 192, name=name)


class Inception(nn.Module):
    """Pictures in [-1, 1], of 75 x 75 at least, to the 2,048 means of the last feature maps (pool3) and logits."""

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch 2048"], Float[Array, "batch 1008"]]:
        x = Convolution(Unit(32, (3, 3), 2), name="Conv2d_1a_3x3")(pictures)
        x = Convolution(Unit(32, (3, 3)), "VALID", name="Conv2d_2a_3x3")(x)
        x = Convolution(Unit(64, (3, 3)), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Convolution(Unit(80), name="Conv2d_3b_1x1")(x)
        x = Convolution(Unit(192, (3, 3)), "VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for pooled, letter in zip((32, 64, 64), "bcd", strict=True):
            x = block_a(pooled, f"Mixed_5{letter}")(x)
        x = block_b("Mixed_6a")(x)
        for inner, letter in zip((128, 160, 160, 192), "bcde", strict=True):
            x = block_c(inner, f"Mixed_6{letter}")(x)
        x = block_d("Mixed_7a")(x)
        x = block_e("average", "Mixed_7b")(x)
        x = block_e("max", "Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(CLASSES, name="fc")(features)


# --- weights ------------------------------------------------------------------------------------

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def expected() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the network needs, as torch has them."""
    return {name: tuple(shape[axis] for axis in axes) for name, shape, axes, _ in _places()}


def _places() -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[str, ...]]]:
    """Of each of our arrays: the tensor's name, our shape, its axes in the tensor's order, our path."""
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    places = []
    for path, leaf in cast(dict[tuple, Any], traverse_util.flatten_dict(shapes)).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))  # kernels have their inputs before their outputs
        places.append((".".join((*path[1:-1], LEAVES[path[-1]])), leaf.shape, axes, path))
    return places


def variables_of(tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Parameters and running statistics of the network. Raises ConfigError where a tensor is missing or misshapen."""
    found = {}
    for name, shape, axes, path in _places():
        if name not in tensors:
            raise ConfigError(f"the tensor {name} is missing")
        tensor, wanted = tensors[name], tuple(shape[axis] for axis in axes)
        if tensor.shape != wanted:
            raise ConfigError(f"the tensor {name} has the shape {tensor.shape}, not {wanted}")
        found[path] = jnp.asarray(tensor.transpose(np.argsort(axes)), jnp.float32)
    return traverse_util.unflatten_dict(found)


def extractor(path: str | Path) -> Extractor:
    """Features and class probabilities by the weights in a file, for metrics named as `val/fid[inception]`.

    Probabilities are without the read-out's bias, as in the code of Salimans et al. 2016, whose numbers are compared.
    Pictures are resized as all data here are, bicubic and antialiased (Parmar et al. 2022 on what else happens): by a
    small part other numbers than by the resizing in TensorFlow's graph.

    Raises ConfigError where the file is not there, damaged, or has other weights.
    """
    try:
        variables = variables_of(read_tensors(Path(path).expanduser()))
    except ConfigError as error:
        reason = str(error).removesuffix(".")
        raise ConfigError(f"--inception-weights {path}: {reason}; the file is {FILE}, of pytorch-fid.") from None

    @jax.jit
    def apply(variables: PyTree, pixels: Array) -> tuple[Array, Array]:
        features, logits = cast(tuple[Array, Array], Inception().apply(variables, scaled(pixels)))
        return features, jax.nn.softmax(logits - variables["params"]["fc"]["bias"])

    return Extractor("inception", SIZE, 3, lambda pixels: apply(variables, pixels), batch_size=32)
