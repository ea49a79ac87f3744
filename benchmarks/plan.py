"""Which mesh is best for a decoder-only Transformer on a machine that is not here, and does it fit?

    python -m benchmarks.plan --machine h100 --devices 64 --model llama-8b --length 8192 --global-batch 512 --remat full
    python -m benchmarks.plan --machine v5p --devices 256 --model llama-70b --precision bf16 --check

A line a mesh, those that fit first and of them the fastest: memory of a device; what a step takes at the least for
operations, memory traffic and network, each at its published peak; the bound if they overlap fully and if not at all;
MFU at the former; what a device sends by axis. No program reaches these bounds; how near published runs come is in
`tests/benchmarks/test_planning.py`.

--check compiles the real training step for as many virtual devices, without anything allocated, for the best mesh, and
puts what the compiler plans and sends beside the closed forms for this backend, XLA:CPU, and the accelerator's.

Measured, 2026-11-26, jax 0.10.2, XLA:CPU on 8 virtual devices, float32, layers scanned; bytes of a device planned for
this backend against arguments and temporaries of the compiled step:

                                                     data=8   fsdp=8   fsdp=2,tensor=4   fsdp=4,context=2
    gpt2, 32 x 1,024                                 -2.2 %   +2.2 %        +0.4 %            +2.4 %
    8 layers of 1,024, vocabulary 32,000, 64 x 512   -3.2 %   +3.9 %        +0.7 %            +2.0 %
    6 layers of 512, 32,000, 16 x 4,096              -0.2 %   +2.4 %        +0.4 %            +1.1 %
    llama-1b, 16 x 2,048, recomputed                 +2.8 %   +8.2 %        -1.6 %            +2.3 %
    llama-8b, 16 x 4,096, recomputed                 -1.3 %   +4.3 %        -4.5 %            -6.9 %

llama-8b for 64 devices (fsdp=64, bf16, 512 x 8,192, recomputed): compiled in 7 s, 113.1 GB, planned 118.2; all that is
sent as planned. On jax 0.11.2, where XLA:CPU keeps bfloat16, 106 s of a busy machine and 90.6 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.measuring import write
from benchmarks.planning import Job, Mesh, Model, Prediction, Transfer, memory, ranked, transfers
from jaxarch.data.text import Tokens
from jaxarch.run import Experiment, check_least
from jaxarch.run.collectives import axes, collectives
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.machines import MACHINES
from jaxarch.run.mesh import make_mesh, parse
from jaxarch.run.program import Member, Programs
from jaxarch.run.protocol import ConfigError, RunError
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.layout import LAYOUT
from jaxarch.transformer.training import PRECISIONS, Hypers, OptimConfig, make_init, make_step, next_token

# Shapes as in the models' config.json on Hugging Face; gpt2's table filled up to a multiple of 128.
MODELS = {
    "gpt2": Model(12, 768, 12, 12, 64, 3072, 50304, gated=False, tied=True),
    "llama-1b": Model(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "llama-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
    "llama-405b": Model(126, 16384, 128, 8, 128, 53248, 128256),
}


@dataclass(frozen=True)
class Arguments:
    machine: Literal["h100", "a100", "v4", "v5e", "v5p", "v6e"] = "h100"
    devices: int = 64
    model: Literal["gpt2", "llama-1b", "llama-8b", "llama-70b", "llama-405b"] = "llama-8b"
    length: int = 8192
    global_batch: int = 512
    """examples a step, of all devices"""
    remat: Literal["none", "full"] = "full"
    """what the backward pass recomputes: nothing or each layer"""
    precision: Literal["bf16", "f32"] = "bf16"
    """of the computation; parameters are f32"""
    top: int = 10
    """lines"""
    check: bool = False
    """compile the step for as many virtual devices on the best mesh"""
    mesh: str = ""
    """this one too, as fsdp=8,tensor=8; it is what --check compiles"""
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("devices", "length", "global_batch", "top"), 1)


def subject(model: Model, job: Job, scan: bool = True) -> tuple[Experiment, Tokens]:
    """The training step that is planned, and the shapes of its batch. Nothing is allocated.

    scan: the layers are compiled as one.
    """
    config = ModelConfig(
        model.layers,
        model.heads,
        model.dim,
        model.kv_heads,
        model.head_dim,
        mlp="swiglu" if model.gated else "gelu",
        mlp_dim=model.hidden,
        norm="rms",
        positions="rotary",
        tied=model.tied,
        remat=job.remat == "full",
        scan_layers=scan,
    )
    network = decoder(config, model.vocab, job.length, PRECISIONS[{2: "bf16", 4: "f32"}[job.compute]])
    optim = OptimConfig()
    step = make_step(next_token(network), optim, 1000)
    shape = job.batch, job.length
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    init = make_init(network, network.inputs(), optim)
    experiment = Experiment(init, step, lambda state, key: {}, batch_size=job.batch, hypers=Hypers(), layout=LAYOUT)
    return experiment, Tokens(tokens, tokens, weights)


def compiled(model: Model, job: Job, mesh: Mesh, scan: bool = True) -> tuple[Programs, jax.stages.Compiled]:
    """The training step for as many devices as the mesh has, of which there must be enough."""
    experiment, batch = subject(model, job, scan)
    sizes = {name: size for name, size in mesh._asdict().items() if size > 1}
    programs = Programs(experiment, [Member(0, {})], make_mesh(sizes) if sizes else None)
    return programs, programs.compiled_step(batch)


# --- against the compiler -----------------------------------------------------------------------


def sent(text: str, mesh: Mesh) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes by kind and axes that a compiled program sends; single numbers (losses, norms, clipping) aside."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    shape = {name: size for name, size in mesh._asdict().items() if size > 1}
    for one in collectives(text):
        one = one._replace(operands=tuple(operand for operand in one.operands if operand[1] > 4))
        # Between two devices zigzag leaves some halves where they are, as a permutation along no axis.
        key = one.kind, axes(one, shape) or ("context",)
        sums[key] = sums.get(key, 0.0) + (one.times or 0) * one.bytes
    return {key: bytes_ for key, bytes_ in sums.items() if bytes_}


def named(every: list[Transfer]) -> dict[tuple[str, tuple[str, ...]], float]:
    """The same of a plan."""
    sums: dict[tuple[str, tuple[str, ...]], float] = {}
    for each in every:
        sums[each.kind, each.axes] = sums.get((each.kind, each.axes), 0.0) + each.bytes * each.times
    return sums


def lowered(model: Model, job: Job, mesh: Mesh) -> dict[str, Any]:
    """What the compiled step takes and sends. In a process that has as many devices."""
    programs, step = compiled(model, job, mesh)
    analysis: Any = step.memory_analysis()
    every = sent(step.as_text() or "", mesh)
    found = [{"kind": kind, "axes": along, "bytes": bytes_} for (kind, along), bytes_ in every.items()]
    bytes_ = {"arguments": analysis.argument_size_in_bytes, "temporaries": analysis.temp_size_in_bytes}
    return bytes_ | {"sent": found, "seconds": programs.compile_seconds}


def checked(model: Model, job: Job, mesh: Mesh) -> dict[str, Any]:
    """`lowered` in a process of its own with virtual devices. Raises RunError with the last line where it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={mesh.devices}".strip()
    command = [sys.executable, "-m", "benchmarks.plan", "lower", json.dumps([model, job, mesh])]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the step was not compiled: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(model: Model, job: Job, mesh: Mesh, found: dict[str, Any]) -> list[str]:
    planned, theory = memory(model, job, mesh, cpu=True), memory(model, job, mesh)
    state = planned.parameters + planned.optimizer
    rows = [("arguments", found["arguments"], state, theory.parameters + theory.optimizer)]
    rows += [("temporaries", found["temporaries"], planned.total - state, theory.total - rows[0][3])]
    rows += [("together", rows[0][1] + rows[1][1], planned.total, theory.total)]
    here, accelerator = (named(transfers(model, job, mesh, cpu)) for cpu in (True, False))
    own = {(each["kind"], tuple(each["axes"])): each["bytes"] for each in found["sent"]}
    for key in sorted({*own, *here, *accelerator}):
        rows.append((f"{key[0]} {','.join(key[1])}", own.get(key, 0), here.get(key, 0), accelerator.get(key, 0)))
    out = [f"{shown(mesh)}: compiled in {found['seconds']:.0f} s; GB a device"]
    out += [f"{'':32}{'compiled':>12}{'planned here':>14}{'':9}{'accelerator':>13}"]
    for name, *bytes_ in rows:
        compiled_, planned_, theory_ = (each / 1e9 for each in bytes_)
        off = f"{100 * (planned_ / compiled_ - 1):+.1f} %" if compiled_ else ""
        out.append(f"{name:32}{compiled_:12.3f}{planned_:14.3f}{off:>9}{theory_:13.3f}")
    return out


# --- the table ----------------------------------------------------------------------------------


def shown(mesh: Mesh) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh._asdict().items() if size > 1) or "one device"


def lines(found: list[Prediction], arguments: Arguments) -> list[str]:
    room = MACHINES[arguments.machine].memory / 1e9
    out = [
        f"{'mesh':34}{'GB':>8}{'operations':>12}{'memory':>9}{'network':>9}{'overlapped':>12}{'serial':>8}{'MFU':>7}"
    ]
    for each in found:
        sent_ = ", ".join(f"{'+'.join(along)} {bytes_ / 1e9:.3g}" for along, bytes_ in each.sent().items())
        seconds = "".join(f"{value:{width}.3g}" for value, width in zip(each.seconds, (12, 9, 9), strict=True))
        out.append(
            f"{shown(each.mesh):34}{each.memory.total / 1e9:8.3g}{seconds}{each.overlapped:12.3g}{each.serial:8.3g}"
            f"{each.mfu:7.1%}  sends GB: {sent_ or '-'}{'' if each.fits else f'; does not fit {room:.3g} GB'}"
        )
    return [*out, "seconds of a step at the least; MFU if all overlaps"]


def record(each: Prediction) -> dict[str, Any]:
    names = ("operations", "memory", "network")
    return {
        "mesh": each.mesh._asdict(),
        "bytes": each.memory._asdict() | {"total": each.memory.total},
        "seconds": dict(zip(names, each.seconds, strict=True)) | {"overlapped": each.overlapped, "serial": each.serial},
        "mfu": each.mfu,
        "sent": {"+".join(along): bytes_ for along, bytes_ in each.sent().items()},
        "fits": each.fits,
    }


def parsed(text: str, devices: int) -> Mesh:
    """Raises ConfigError."""
    sizes = parse(text)
    if "replica" in sizes:
        raise ConfigError(f"--mesh {text}: a plan is of one member; there are {', '.join(Mesh._fields)}.")
    mesh = Mesh(**sizes)
    if mesh.devices != devices:
        raise ConfigError(f"--mesh {text} is of {mesh.devices} devices, not of --devices {devices}.")
    return mesh


def main() -> None:
    if sys.argv[1:2] == ["lower"]:
        model, job, mesh = json.loads(sys.argv[2])
        print(json.dumps(lowered(Model(*model), Job(*job), Mesh(*mesh))))
        return
    with exits("plan"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.plan", __doc__ or "", sys.argv[1:])
        model, width = MODELS[arguments.model], {"bf16": 2, "f32": 4}[arguments.precision]
        job = Job(arguments.length, arguments.global_batch, arguments.remat, compute=width)
        machine = MACHINES[arguments.machine]
        if job.dtype not in machine.flops:
            raise ConfigError(f"--precision {arguments.precision}: no rate is published for {arguments.machine}.")
        mesh = parsed(arguments.mesh, arguments.devices) if arguments.mesh else None
        found = ranked(model, job, machine, arguments.devices)
        if not found:
            raise ConfigError(
                f"--devices {arguments.devices}: no mesh divides the model and a --global-batch of {job.batch} evenly; "
                "a power of two or a larger batch would do."
            )
        if mesh is not None and mesh not in [each.mesh for each in found]:
            raise ConfigError(f"--mesh {arguments.mesh} does not divide {arguments.model} and the batch evenly.")
        for line in lines([each for i, each in enumerate(found) if i < arguments.top or each.mesh == mesh], arguments):
            print(line)
        fits: list[dict[str, Any]] = []
        if arguments.check:
            mesh = mesh or found[0].mesh
            own = checked(model, job, mesh)
            for line in compared(model, job, mesh, own):
                print(line)
            planned = memory(model, job, mesh, cpu=True).total
            fits = [
                {"implementation": arguments.model, "quantity": "bytes", "mesh": mesh._asdict(), "planned": planned}
                | own
            ]
        write(
            arguments.output,
            f"plan-{arguments.model}-{arguments.machine}-{arguments.devices}",
            [*map(record, found)],
            fits,
        )


if __name__ == "__main__":
    main()
