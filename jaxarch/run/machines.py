"""What makers publish of their machines: rates, memory and networks, for plans of machines that are not here.

What a machine at hand really reaches is measured by `peaks`. No program reaches these figures, so a time reckoned with
them is a lower bound. All are of one device: a GPU, or a TPU chip.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """flops: operations a second by type, of dense products; only what is published.
    memory: bytes. bandwidth: bytes a second between memory and processor.
    inside: bytes a second that a device sends, over all its links, to others of its node or slice.
    devices: of a node or slice.
    between: bytes a second that a device sends, as its share of a host's network, to other nodes or slices.
    """

    flops: dict[str, float]
    memory: float
    bandwidth: float
    inside: float
    devices: int
    between: float


# Makers count what a link sends and receives at once: half of it is what it sends. Of a TPU that holds for all links
# together; a mesh axis that lies along one axis of the torus has two of the six, or of the four. A GPU's float32 is
# TF32, in which JAX multiplies there where nothing else is asked for (jax.lax.Precision.DEFAULT).
MACHINES = {
    # Data sheet "NVIDIA H100 Tensor Core GPU" (SXM): BF16 1,979 TFLOPS with sparsity and TF32 989, half of it dense;
    # 80 GB, 3.35 TB/s; NVLink 900 GB/s. Eight of them and eight ConnectX-7 of 400 Gb/s: docs.nvidia.com/dgx-basepod,
    # Core Components, "NVIDIA DGX H200 and H100 Systems".
    "h100": Machine({"bfloat16": 989.5e12, "float32": 494.5e12}, 80e9, 3.35e12, 450e9, 8, 50e9),
    # Data sheet "NVIDIA A100 Tensor Core GPU" (80 GB SXM): BF16 312 TFLOPS, TF32 156, 2,039 GB/s, NVLink 600 GB/s.
    # Eight of them and eight ConnectX-6 of 200 Gb/s: developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100.
    "a100": Machine({"bfloat16": 312e12, "float32": 156e12}, 80e9, 2.039e12, 300e9, 8, 25e9),
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPS, 32 GiB, 1,200 GB/s, 4,096 chips. Six links that send 45 GB/s each,
    # 25 GB/s for a host of four chips: Austin et al. 2025, How to Scale Your Model, ch. 2, "TPU Specs".
    "v4": Machine({"bfloat16": 275e12}, 32 * 2**30, 1.2e12, 270e9, 4096, 6.25e9),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPS, 16 GB, 819 GB/s (some editions: 800), interconnect 400 GB/s both
    # ways, 256 chips, two cards of 100 Gb/s for a host of eight chips.
    "v5e": Machine({"bfloat16": 197e12}, 16e9, 819e9, 200e9, 256, 3.125e9),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPS, 95 GiB, 2,765 GB/s, interconnect 1,200 GB/s both ways, jobs of up
    # to 6,144 chips in a pod, 50 Gb/s a chip between pods.
    "v5p": Machine({"bfloat16": 459e12}, 95 * 2**30, 2.765e12, 600e9, 6144, 6.25e9),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPS, 32 GB, 1,640 GB/s (some editions: 1,600), interconnect 800 GB/s
    # both ways, 256 chips, four cards of 200 Gb/s for a host of eight chips.
    "v6e": Machine({"bfloat16": 918e12}, 32e9, 1.64e12, 400e9, 256, 12.5e9),
}
