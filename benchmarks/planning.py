"""What a training step of a decoder-only Transformer needs at the least, by formula, on a mesh that is not here.

Memory, operations and bytes sent, of one device: the batch is cut over `data` and `fsdp`, the tokens of an example over
`context`, each matrix over `fsdp` and `tensor`. Two bounds of a step's time follow: the largest of the times for
operations, memory and network if they overlap fully, their sum if they do not (Austin et al. 2025, How to Scale Your
Model, ch. 1). Devices are numbered with `data` outermost and `tensor` innermost, so `tensor` stays within a node.

Sources: Narayanan et al. 2021 (operations, 3.2 and app.), Korthikanti et al. 2022 (activations, sec. 4), Shoeybi et al.
2019 (tensor, sec. 3), Rajbhandari et al. 2020 (fsdp, ZeRO stage 3, sec. 7), Liu et al. 2023 (context).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxarch.attention.blocks import BLOCK
from jaxarch.attention.choice import BLOCKS_LENGTH
from jaxarch.attention.cost import flops, projection_flops, visible_pairs
from jaxarch.run.collectives import ring_bytes
from jaxarch.run.machines import Machine

AXES = ("data", "fsdp", "context", "tensor")  # from the outermost on
MOMENTS = 2  # of Adam, in the parameters' type


class Model(NamedTuple):
    """head_dim: width of a head. hidden: of a feed-forward layer. gated: three matrices in it, not two."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    gated: bool = True
    tied: bool = False

    @property
    def tables(self) -> int:
        """Parameters of the embedding and the read-out."""
        return self.vocab * self.dim * (1 if self.tied else 2)

    @property
    def matrices(self) -> int:
        """Parameters in matrices, the tables' among them; all are cut over `tensor`."""
        attention = self.dim * self.head_dim * 2 * (self.heads + self.kv_heads)
        feed_forward = self.dim * self.hidden * (3 if self.gated else 2)
        return self.layers * (attention + feed_forward) + self.tables

    @property
    def scales(self) -> int:
        """Parameters of the norms, which `tensor` does not cut."""
        return (2 * self.layers + 1) * self.dim

    @property
    def parameters(self) -> int:
        return self.matrices + self.scales


class Job(NamedTuple):
    """batch: examples a step, of all devices. remat: what the backward pass recomputes, nothing or each layer.
    sequence: the residual stream and the norms are cut over `tensor` too (Korthikanti et al. 2022, sec. 4.2.2): each
    all-reduce is then a reduce-scatter and an all-gather, which send as much.
    compute, stored: bytes of a number in products and what they exchange, and of a parameter and its gradient.
    """

    length: int
    batch: int
    remat: Literal["none", "full"] = "none"
    sequence: bool = False
    compute: int = 2
    stored: int = 4

    @property
    def dtype(self) -> str:
        return {2: "bfloat16", 4: "float32"}[self.compute]


class Mesh(NamedTuple):
    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return math.prod(self)


class Memory(NamedTuple):
    """Bytes of a device.

    activations: what the forward pass keeps for the backward pass, and what is recomputed at one time.
    logits: and their gradients.
    gathered: parameters as products take them, where they are kept in parts or in another type. Those of two layers or
    of a table where layers are recomputed; else all, since XLA keeps for the backward pass what it gathered.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(self)


class Transfer(NamedTuple):
    """Collectives of one kind and size in a step. bytes: of each, as `Collective.bytes`. axes: over which they go."""

    what: str
    kind: str
    axes: tuple[str, ...]
    bytes: float
    times: int

    def wire_bytes(self, mesh: Mesh) -> float:
        """What a device sends in a step."""
        return self.times * ring_bytes(self.kind, self.bytes, _size(mesh, self.axes))


class Prediction(NamedTuple):
    """seconds: of operations, memory traffic and network, each at its peak. model_flops: of a device, as MFU counts."""

    mesh: Mesh
    memory: Memory
    transfers: list[Transfer]
    seconds: tuple[float, float, float]
    model_flops: float
    peak: float
    fits: bool

    @property
    def overlapped(self) -> float:
        """Seconds of a step at the least."""
        return max(self.seconds)

    @property
    def serial(self) -> float:
        """If nothing overlaps."""
        return sum(self.seconds)

    @property
    def mfu(self) -> float:
        """At the most."""
        return self.model_flops / self.peak / self.overlapped

    def sent(self) -> dict[tuple[str, ...], float]:
        """Bytes on the wire by axes."""
        sums: dict[tuple[str, ...], float] = {}
        for transfer in self.transfers:
            sums[transfer.axes] = sums.get(transfer.axes, 0.0) + transfer.wire_bytes(self.mesh)
        return sums


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(getattr(mesh, axis) for axis in axes)


def tokens(job: Job, mesh: Mesh) -> float:
    """Of a device."""
    return job.batch * job.length / (mesh.data * mesh.fsdp * mesh.context)


def forward_flops(model: Model, job: Job) -> float:
    """Of all devices: two for each token and parameter that multiplies it, and attention over what the causal mask
    shows. A step takes three times as many (Narayanan et al. 2021), or four where each layer is recomputed.
    """
    m = model
    projections = projection_flops(job.batch, job.length, m.dim, m.heads, m.kv_heads, m.head_dim)
    feed_forward = 2 * job.batch * job.length * m.dim * m.hidden * (3 if m.gated else 2)
    pairs = visible_pairs(job.length, job.length, causal=True)
    attention = flops(pairs, job.batch, m.heads, m.head_dim, m.head_dim)
    return m.layers * (projections + feed_forward + attention) + 2 * job.batch * job.length * m.dim * m.vocab


def layer_flops(model: Model, job: Job) -> float:
    """The layers' share of `forward_flops`: what is recomputed. The read-out is not."""
    return forward_flops(model, job) - 2 * job.batch * job.length * model.dim * model.vocab


def memory(model: Model, job: Job, mesh: Mesh, cpu: bool = False) -> Memory:
    """The optimiser is Adam. Attention keeps no logits (it is blockwise), and there is no dropout.

    cpu: what XLA:CPU holds of this project's step at its fullest moment, in float32, its layers scanned.
    """
    if cpu:
        return _on_cpu(model, job, mesh)
    m, here = model, tokens(job, mesh)
    stored = job.stored * (m.matrices / mesh.tensor + m.scales) / mesh.fsdp
    # Of a token in a layer: both norms' inputs and outputs; queries, keys, values and what attention gives; the
    # hidden layer before and after its activation, or both factors and their product.
    whole, cut = 4 * m.dim, 2 * m.head_dim * (m.heads + m.kv_heads) + (3 if m.gated else 2) * m.hidden
    whole, residual = (whole / mesh.tensor, m.dim / mesh.tensor) if job.sequence else (whole, m.dim)
    layer = here * (job.compute * (whole + cut / mesh.tensor) + 4 * m.heads / mesh.tensor)  # and its log-sum-exps
    kept = m.layers * layer if job.remat == "none" else m.layers * here * residual * job.compute + layer
    logits = here * m.vocab / mesh.tensor * 2 * (job.compute + 4)  # as computed and in float32, and gradients of both
    largest = max(2 * (m.matrices - m.tables) / m.layers, m.vocab * m.dim)
    held = largest / mesh.tensor if job.remat == "full" else m.matrices / mesh.tensor + m.scales
    gathered = job.compute * held if mesh.fsdp > 1 or job.compute != job.stored else 0.0
    return Memory(stored, stored, MOMENTS * stored, kept, logits, gathered)


def _on_cpu(model: Model, job: Job, mesh: Mesh) -> Memory:
    """The fullest of three moments: the read-out's backward pass, the last layer's, and the optimiser's."""
    m, here = model, tokens(job, mesh)
    stored = 4 * (m.matrices / mesh.tensor + m.scales) / mesh.fsdp
    table, layers = 4 * m.vocab * m.dim / mesh.tensor, 4 * (m.matrices - m.tables) / mesh.tensor
    # Of a token in a layer: of each norm three arrays, its output, which products take, and two numbers; queries,
    # keys, values and what attention gives, the latter twice; of the hidden layer its output and the derivative, or of
    # a gate four arrays more; attention's sums and, of a short sequence, its weights under the mask.
    kept_weights = mesh.context == 1 and job.length <= BLOCKS_LENGTH
    weights = m.heads * (1 + (job.length + BLOCK) / 2 if kept_weights else 1)
    cut = m.heads * m.head_dim + 2 * m.head_dim * (m.heads + m.kv_heads) + (6 if m.gated else 2) * m.hidden + weights
    layer = 4 * here * (8 * m.dim + 4 + cut / mesh.tensor)
    again = job.remat == "full"
    kept = m.layers * (4 * here * m.dim if again else layer)
    logits = 2 * 4 * here * m.vocab / mesh.tensor  # their exponentials, then their gradients
    tables = (m.tables // (m.vocab * m.dim)) * table if mesh.fsdp > 1 else 0.0
    held = tables + (layers / m.layers if again else layers) * (mesh.fsdp > 1)
    # The gradients of all layers have their place from the first on; the read-out's is made first, by a turned table.
    norm = 4 * here * 5 * m.dim  # the last one's arrays, its output, and the gradient of it
    behind = 4 * here * ((3 if m.gated else 1) * m.hidden / mesh.tensor + (5 if m.gated else 4) * m.dim)  # gradients
    own = layers / mesh.fsdp + table
    moments = (
        Memory(stored, own, MOMENTS * stored, kept + norm, logits, held + table),
        Memory(stored, own, MOMENTS * stored, kept + (layer if again else 0.0) + behind, 0.0, held),
        Memory(stored, 2 * stored, MOMENTS * stored, 0.0, 0.0, 0.0),  # summed, then divided by the tokens
    )
    return max(moments, key=lambda moment: moment.total)


def transfers(model: Model, job: Job, mesh: Mesh, cpu: bool = False) -> list[Transfer]:
    """All that a step sends, sums of single numbers (losses, norms) aside.

    fsdp: the parameters for the forward pass, those of the layers again where they are recomputed, and the gradients,
    added and cut. Layers are rounded before they are sent, tables after.
    data, context: the gradients, added.
    tensor: a sum of activations behind attention and behind the feed-forward layer, and of their gradients before
    each; where a layer is recomputed, attention's again (what the layer gives is not needed). One behind the table and
    one before the read-out; of a token's logits the largest, the sum and the target's.
    context: keys and values go round in the forward pass (twice where it is recomputed), and in the backward pass
    together with their gradients in float32; zigzag deals queries, keys and values and collects what attention gives.

    cpu: as XLA:CPU compiles it, for the virtual devices of a test. It adds in float32 (and before jax 0.11 gathers and
    permutes in it), and has no reduce-scatter: gradients are added whole, a tied table's twice (as it was read and as
    it reads out), and once more along `context`. The gradients that queries, keys and values (up and gate) have of
    their input are added over devices before they are added to one another. Scales are too small to be cut.
    """
    m, here, passes = model, tokens(job, mesh), 2 if job.remat == "full" else 1
    uncut = m.matrices / mesh.tensor + m.scales
    tables, width = m.tables / mesh.tensor, 4 if cpu else job.compute
    moved = 4 if cpu and jax.__version_info__ < (0, 11) else job.compute
    keys = here * 2 * m.kv_heads * m.head_dim / mesh.tensor
    dealt = here * 2 * m.head_dim * (m.heads + m.kv_heads) / mesh.tensor
    rounds = m.layers * mesh.context
    before = 3 + (2 if m.gated else 1) if cpu else 2
    every = [
        Transfer("activations", "all-reduce", ("tensor",), width * here * m.dim, m.layers * (1 + passes + before) + 2),
        Transfer("targets' logits and their sums", "all-reduce", ("tensor",), 4 * here, 3),
        Transfer("keys and values", "collective-permute", ("context",), moved * keys, rounds * (passes + 1)),
        Transfer("their gradients", "collective-permute", ("context",), 4 * keys, rounds),
        Transfer("zigzag", "collective-permute", ("context",), moved * dealt, m.layers * (passes + 1)),
    ]
    if cpu:
        added = 4 * (uncut + (tables if m.tied else 0))
        every += [
            Transfer("layers", "all-gather", ("fsdp",), moved * (m.matrices - m.tables) / mesh.tensor, passes),
            Transfer("tables", "all-gather", ("fsdp",), job.stored * tables, 1),
            Transfer("gradients", "all-reduce", ("data", "fsdp"), added, 1),
            Transfer("gradients", "all-reduce", ("context",), added, 1),
        ]
    else:
        layers, summed = uncut - tables - m.dim, job.stored * uncut / mesh.fsdp
        every += [
            Transfer("layers", "all-gather", ("fsdp",), job.compute * layers, passes),
            Transfer("tables", "all-gather", ("fsdp",), job.stored * (uncut - layers), 1),
            Transfer("gradients", "reduce-scatter", ("fsdp",), job.stored * uncut, 1),
            Transfer("gradients", "all-reduce", ("data", "context"), summed, 1),
        ]
    there = [each._replace(axes=tuple(axis for axis in each.axes if getattr(mesh, axis) > 1)) for each in every]
    return [each for each in there if each.axes]


def transfer_seconds(transfer: Transfer, mesh: Mesh, machine: Machine) -> float:
    """At the full rates: what crosses nodes is sent by all devices of a node at once, each its part."""
    numbers = np.arange(mesh.devices).reshape(mesh)
    group = numbers[tuple(slice(None) if axis in transfer.axes else 0 for axis in AXES)].ravel()
    size, inside = len(group), int((group < machine.devices).sum())  # all of them, and those of the first one's node
    if transfer.kind == "collective-permute":
        rate = machine.inside if inside == size else machine.between
        return transfer.times * transfer.bytes / rate
    outside = math.ceil(size / inside)
    within = ring_bytes(transfer.kind, transfer.bytes, inside) / machine.inside
    across = ring_bytes(transfer.kind, transfer.bytes / inside, outside) / machine.between
    return transfer.times * max(within, across)


def traffic(model: Model, job: Job, mesh: Mesh, needed: Memory) -> float:
    """Bytes between memory and processor at the least: the parameters once for each pass, what is kept written and
    read, the gradient, the parameters and the moments read and the latter two written.
    """
    passes = 3 if job.remat == "full" else 2
    gathered = passes * job.compute * (model.matrices / mesh.tensor)
    return gathered + 2 * (needed.activations + needed.logits) + (3 + 2 * MOMENTS) * needed.parameters


def predict(model: Model, job: Job, mesh: Mesh, machine: Machine) -> Prediction:
    needed, sent = memory(model, job, mesh), transfers(model, job, mesh)
    peak = machine.flops[job.dtype]
    forward = forward_flops(model, job) / mesh.devices
    again = layer_flops(model, job) / mesh.devices if job.remat == "full" else 0.0
    seconds = (
        (3 * forward + again) / peak,
        traffic(model, job, mesh, needed) / machine.bandwidth,
        sum(transfer_seconds(each, mesh, machine) for each in sent),
    )
    return Prediction(mesh, needed, sent, seconds, 3 * forward, peak, needed.total <= machine.memory)


def meshes(model: Model, job: Job, devices: int) -> Iterator[Mesh]:
    """All that cut evenly what they must: heads of both kinds, hidden layers and the vocabulary over `tensor`, the
    batch over `data` and `fsdp`, an example's two halves over `context`.
    """
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, context in itertools.product(divisors, repeat=3):
        if devices % (data * fsdp * context):
            continue
        mesh = Mesh(data, fsdp, context, devices // (data * fsdp * context))
        cut = [model.heads, model.kv_heads, model.hidden, model.vocab]
        even = not any(size % mesh.tensor for size in cut)
        if even and not job.batch % (data * fsdp) and (context == 1 or not job.length % (2 * context)):
            yield mesh


def ranked(model: Model, job: Job, machine: Machine, devices: int) -> list[Prediction]:
    """One for each mesh: those that fit first, and of them the fastest, by the full overlap and then without."""
    every = [predict(model, job, mesh, machine) for mesh in meshes(model, job, devices)]
    return sorted(every, key=lambda each: (not each.fits, each.overlapped, each.serial))
