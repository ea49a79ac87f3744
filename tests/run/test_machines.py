"""The figures of one device against what the makers say of whole pods and nodes."""

from __future__ import annotations

import pytest

from jaxarch.run.machines import MACHINES

# docs.cloud.google.com/tpu/docs/{v4,v5e,v6e}: operations a second, and bytes that all chips send in an all-reduce.
PODS = {"v4": (1.1e18, 1.1e15), "v5e": (50.63e15, 51.2e12), "v6e": (234.9e15, 102.4e12)}
# The same pages: bytes a second that a pod sends to others.
NETWORKS = {"v5e": 6.4e12 / 8, "v6e": 25.6e12 / 8}


@pytest.mark.parametrize("name", PODS)
def test_pods_are_the_sum_of_their_chips(name):
    machine, (flops, reduced) = MACHINES[name], PODS[name]
    assert machine.devices * machine.flops["bfloat16"] == pytest.approx(flops, rel=0.03)
    assert machine.devices * machine.inside == pytest.approx(reduced, rel=0.01)
    if name in NETWORKS:
        assert machine.devices * machine.between == NETWORKS[name]


def test_nodes_of_gpus():
    """A DGX H100 is sold as 32 PFLOPS in FP8 with sparsity, four times the dense rate in BF16; both have 640 GB."""
    assert 8 * 4 * MACHINES["h100"].flops["bfloat16"] == pytest.approx(32e15, rel=0.02)
    assert [MACHINES[name].devices * MACHINES[name].memory for name in ("h100", "a100")] == [640e9, 640e9]


def test_networks_are_slower_than_links_and_links_than_memory():
    for machine in MACHINES.values():
        assert machine.between < machine.inside < machine.bandwidth < machine.flops["bfloat16"]
