"""Inception v3 against that of pytorch-fid: recorded by record_inception.py, and live where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from jaxarch.gan import inception
from jaxarch.run.protocol import ConfigError

HERE = Path(__file__).parent


def recording() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_inception", HERE / "record_inception.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = recording()


@pytest.fixture(scope="module")
def weights():
    return record.random_weights(inception.expected())


@pytest.fixture(scope="module")
def extractor(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(weights, file)
    return inception.extractor(file)


def test_features_and_probabilities_are_the_recorded_ones(extractor, weights):
    expected = load_file(HERE / "recorded" / "inception.safetensors")
    features, probabilities = extractor.apply(jnp.asarray(record.pictures()))
    assert (extractor.name, extractor.size, extractor.channels) == ("inception", 299, 3)
    assert expected["features"].std() > 0.1 and 0.3 < expected["logits"].std() < 3
    np.testing.assert_allclose(features, expected["features"], rtol=1e-4, atol=1e-4)
    without_bias = softmax(expected["logits"] - weights["fc.bias"], axis=1)
    np.testing.assert_allclose(probabilities, without_bias, rtol=1e-3)


def test_the_live_network_agrees_with_what_is_recorded(weights):
    pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    theirs, features, logits = record.published(record.pictures())
    assert {name: array.shape for name, array in theirs.items()} == inception.expected()
    assert all((theirs[name] == weights[name]).all() for name in weights)
    expected = load_file(HERE / "recorded" / "inception.safetensors")
    np.testing.assert_allclose(features, expected["features"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)


def test_other_weights(weights, tmp_path):
    torchvision = weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    with pytest.raises(ConfigError, match=r"the tensor fc.weight has the shape \(1000, 2048\), not \(1008, 2048\)"):
        inception.variables_of(torchvision)
    file = tmp_path / "other.npz"
    np.savez(file, a=np.zeros(3))
    with pytest.raises(
        ConfigError,
        match=r"^--inception-weights \S+other.npz: the tensor \S+ is missing; the file is pt_inception.*fid\.$",
    ):
        inception.extractor(file)
    with pytest.raises(ConfigError, match=r"cannot read .*none.pth: No such file or directory; the file is pt_inc"):
        inception.extractor(tmp_path / "none.pth")
