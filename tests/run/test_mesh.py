"""Meshes of devices that are not here: chips of TPU slices, by where they lie."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxarch.run.mesh import make_mesh, parse
from jaxarch.run.protocol import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of a v5e: 16 of them are 4 x 4."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def chips(slices: int, count: int) -> list[Chip]:
    return [
        Chip(count * s + i, (i % 4, i // 4, 0), s, (count * s + i) // 4) for s in range(slices) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("mesh", "across"),
    [
        ("data=2,fsdp=16", "data"),
        ("fsdp=32", "fsdp"),
        ("data=2,fsdp=2,tensor=8", "data"),  # eight of 4 x 4 are a row and a part of the next
        ("replica=1,fsdp=4,tensor=8", "fsdp"),
    ],
)
def test_the_first_axis_goes_over_slices(mesh, across):
    made = make_mesh(parse(mesh), chips(2, 16))
    slices = np.vectorize(lambda chip: chip.slice_index)(made.devices)
    halves = np.split(slices, 2, axis=list(parse(mesh)).index(across))
    assert [set(half.ravel()) for half in halves] == [{0}, {1}]


@pytest.mark.parametrize("count", [3, 6, 8])
def test_a_part_of_the_devices_is_enough(count):
    """Also of a number that is no part of the torus."""
    made = make_mesh({"data": count}, chips(1, 8))
    assert made.size == count and len({chip.id for chip in made.devices.ravel()}) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data=8,", "there is no axis ''"),
        ("data=2,data=2", "data stands twice"),
        ("data=0", "data is not a number of devices; write it as --mesh data=2."),
        ("data=\u00b2", "data is not a number of devices"),  # a digit, and no number
        ("data=16", "--mesh data=16 is of 16 devices; there are 8."),
    ],
)
def test_what_is_no_mesh_is_said(text, said):
    with pytest.raises(ConfigError, match=said):
        make_mesh(parse(text), chips(1, 8))
