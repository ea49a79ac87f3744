"""How does a training step scale over devices?

    python -m benchmarks.scaling --output results
    python -m benchmarks.scaling --families gpt --axis fsdp --devices 1 8 --precision bf16

weak: each device has as many examples however many devices there are. strong: all of them together have. Each number
of devices has a process of its own, and they are measured by turns.

Efficiency is the work done in a second against that of one device times their number; the interval is that of the
quartiles over rounds. What is sent is read from the compiled program, one turn of each loop whose turns depend on the
data (PPO looks once more at truncated episodes). Without accelerators the devices are virtual ones that share this
machine's cores: there is no more work to be had from more of them, so efficiency is then against one device's work
itself, and says what spreading costs, not what it gains.

mesh: a step on a mesh of one device against the step without one, which must cost no more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import Measure, Peer, alternating, quartiles, ratio, write
from jaxarch.data.text import Tokens
from jaxarch.gan.dcgan import DCGANConfig, dcgan
from jaxarch.gan.layout import LAYOUT as GAN_LAYOUT
from jaxarch.gan.training import WEIGHTS, GameConfig
from jaxarch.gan.training import OptimConfig as GanOptim
from jaxarch.gan.training import hypers as gan_hypers
from jaxarch.gan.training import make_init as gan_init
from jaxarch.gan.training import make_step as gan_step
from jaxarch.rl import environments
from jaxarch.rl.algorithms.ppo import PPOConfig, make_agent
from jaxarch.rl.training import make_experiment
from jaxarch.run import Experiment, backend, check_least, peaks
from jaxarch.run.collectives import collectives, totals
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.mesh import make_mesh
from jaxarch.run.program import Carry, Member, Programs
from jaxarch.run.protocol import Batch, ConfigError
from jaxarch.transformer.decoder import ModelConfig, decoder, forward_flops
from jaxarch.transformer.layout import LAYOUT
from jaxarch.transformer.training import PRECISIONS, Hypers, OptimConfig, make_init, make_step, next_token

VOCAB, LENGTH, PIXELS = 256, 128, 32


def gpt(batch: int, precision: str) -> tuple[Experiment, Batch]:
    config = ModelConfig(2, 8, 256, positions="rotary")
    model = decoder(config, VOCAB, LENGTH, PRECISIONS[precision])
    optim = OptimConfig()
    step = make_step(next_token(model), optim, 10_000)
    init = make_init(model, model.inputs(), optim)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (batch, LENGTH + 1), np.int32)
    given = Tokens(tokens[:, :-1], tokens[:, 1:], np.ones((batch, LENGTH), np.float32))
    experiment = Experiment(init, step, lambda state, key: {}, batch_size=batch, hypers=Hypers(), layout=LAYOUT)
    operations = 3 * forward_flops(config, VOCAB, batch, LENGTH)
    return experiment._replace(flops={jnp.dtype(model.dtype).name: operations}), given


def gan(batch: int, precision: str) -> tuple[Experiment, Batch]:
    real = np.random.default_rng(0).uniform(-1, 1, (batch, PIXELS, PIXELS, 3)).astype(np.float32)
    networks = dcgan(DCGANConfig(features=32), real.shape[1:])
    game, optim = GameConfig("non_saturating", "none", reuse_fakes=True), GanOptim(average=0.0)
    experiment = Experiment(
        gan_init(*networks, game, optim, real),
        gan_step(*networks, game, optim, lambda batch: (batch, None)),
        lambda state, key: {},
        batch_size=batch,
        hypers=gan_hypers(game, optim),
        weights=WEIGHTS,
        layout=GAN_LAYOUT,
    )
    return experiment, real


def ppo(batch: int, precision: str) -> tuple[Experiment, Batch]:
    """On CartPole. Steps are shuffled within each environment: groups that any number of devices divides."""
    environment, config = environments.make("CartPole-v1"), PPOConfig(groups=batch)
    agent = make_agent(environment, config, batch, LENGTH, iterations=10_000)
    return make_experiment(environment, agent, config.hypers, batch, LENGTH), None


class Family(NamedTuple):
    """make: of the examples (texts, pictures, environments) of a step and the precision. examples: of a device.
    unit, count: what is in one.
    """

    make: Callable[[int, str], tuple[Experiment, Batch]]
    examples: int
    unit: str
    count: int


FAMILIES = {
    "gpt": Family(gpt, 8, "tokens", LENGTH),
    "dcgan": Family(gan, 16, "pictures", 1),
    "ppo": Family(ppo, 8, "env steps", LENGTH),
}


@dataclass(frozen=True)
class Arguments:
    families: tuple[str, ...] = tuple(FAMILIES)
    devices: tuple[int, ...] = (1, 2, 4, 8)
    axis: Literal["data", "fsdp"] = "data"
    """what the devices are an axis of"""
    precision: Literal["f32", "bf16"] = "f32"
    kinds: tuple[Literal["weak", "strong", "mesh"], ...] = ("weak", "strong", "mesh")
    examples: int = 0
    """of a device, or strong: of all (0: 8 texts, 16 pictures, 8 environments; strong: as many for each of the most
    devices)"""
    steps: int = 4
    """a measurement"""
    rounds: int = 5
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("steps", "rounds"), 1)
        check_least(self, ("examples",), 0)
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown:
            raise ConfigError(f"--families {unknown[0]} is none; there are {', '.join(FAMILIES)}.")
        if not self.families or not self.kinds:
            raise ConfigError("--families and --kinds are at least one of each.")
        if self.precision != "f32" and set(self.families) != {"gpt"}:
            raise ConfigError(f"--precision {self.precision}: gpt alone is measured in it; --families gpt would do.")
        if "strong" in self.kinds and any(self.examples % number for number in self.devices):
            raise ConfigError(
                f"--examples {self.examples}: of strong scaling they are divided by --devices "
                f"{' '.join(map(str, self.devices))}; {max(self.devices)} would do."
            )
        if "ppo" in self.families and self.axis != "data":
            raise ConfigError(f"--axis {self.axis}: ppo can use data; leave it out: --families gpt dcgan.")
        if self.devices[:1] != (1,) or list(self.devices) != sorted(set(self.devices)):
            raise ConfigError("--devices begin with 1, which the others are held against, and grow.")


def stepping(programs: Programs, batch: Batch, steps: int) -> Measure:
    """Seconds of a step."""
    given = 1 if batch is None else programs.on_mesh(jax.tree.map(lambda leaf: leaf[None], batch), 0)
    carry = Carry(programs.init(), programs.sums(batch))

    def measure() -> float:
        nonlocal carry
        start = time.perf_counter()
        for index in range(steps):
            carry = programs.steps(carry, given, index)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    return measure


def made(family: str, examples: int, precision: str, sizes: dict[str, int] | None) -> tuple[Programs, Batch]:
    experiment, batch = FAMILIES[family].make(examples, precision)
    return Programs(experiment, [Member(0, {})], make_mesh(sizes) if sizes else None), batch


def work(family: str, devices: str, axis: str, examples: str, precision: str, steps: str) -> None:
    """What a process of its own does: says what its step sends, and measures whenever it is asked."""
    backend.prepare()
    programs, batch = made(family, int(examples), precision, {axis: int(devices)})
    measure = stepping(programs, batch, int(steps))
    sent = totals(collectives(programs.compiled_step(batch).as_text() or ""), wire=True, turns=1)
    at_peak = peaks.seconds_at_peak(programs.operations())  # 0 where they are not known, as PPO's are not
    measure()
    virtual = jax.devices()[0].platform == "cpu"
    print(json.dumps({"description": family, "sent": sent, "at_peak": at_peak, "virtual": virtual}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"seconds": measure()}), flush=True)


class Worker(Peer):
    """A process with this many devices."""

    def __init__(self, *arguments: object, devices: int):
        flag = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        command = [sys.executable, "-m", "benchmarks.scaling", "worker", *map(str, arguments)]
        # Several processes have a GPU's memory together.
        self.start(command, os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


def scaled(arguments: Arguments, family: str, kind: str) -> list[dict[str, Any]]:
    """A record for each number of devices."""
    one, unit = FAMILIES[family], FAMILIES[family].unit
    most = (arguments.examples or one.examples * max(arguments.devices)) if kind == "strong" else 0
    examples = {n: most or n * (arguments.examples or one.examples) for n in arguments.devices}
    workers = {}
    for n in arguments.devices:
        given = family, n, arguments.axis, examples[n], arguments.precision, arguments.steps
        workers[n] = Worker(*given, devices=n)
    seconds = alternating({str(n): worker.measure for n, worker in workers.items()}, arguments.rounds)
    records = []
    for n, worker in workers.items():
        worker.close()
        own, first, virtual = seconds[str(n)], seconds["1"], worker.said["virtual"]
        ideal = examples[n] / examples[1] / (1 if virtual else n)  # what is to be done, by what does it
        efficiency = quartiles([ideal * alone / taken for alone, taken in zip(first, own, strict=True)])
        median = quartiles(own)["median"]
        records.append(
            {"implementation": family, "pass": "train_step", "kind": kind, "axis": arguments.axis, "devices": n}
            | {"examples": examples[n], "precision": arguments.precision, "seconds": quartiles(own), "unit": unit}
            | {"rate": examples[n] * one.count / median, "efficiency": efficiency, "sent": worker.said["sent"]}
            | {"mfu": worker.said["at_peak"] / median / (1 if virtual else n) or None, "virtual": virtual}
        )
    return records


def overhead(arguments: Arguments, family: str) -> dict[str, Any]:
    """A mesh of one device against none, by turns in one process."""
    examples = arguments.examples or FAMILIES[family].examples
    measures = {
        name: stepping(*made(family, examples, arguments.precision, sizes), arguments.steps)
        for name, sizes in {"none": None, "mesh": {arguments.axis: 1}}.items()
    }
    seconds = alternating(measures, arguments.rounds)
    record = {"implementation": family, "pass": "train_step", "kind": "mesh", "axis": arguments.axis, "devices": 1}
    record |= {"examples": examples, "precision": arguments.precision, "seconds": quartiles(seconds["mesh"])}
    return record | {"without": quartiles(seconds["none"]), "ratio": ratio(seconds["none"], seconds["mesh"])}


def lines(records: list[dict[str, Any]]) -> list[str]:
    out = [f"{'':8}{'':8}{'devices':>8}{'examples':>9}{'steps/s':>9}{'a second':>18}{'MFU':>7}  efficiency"]
    for r in records:
        if r["kind"] == "mesh":
            continue
        low, median, high = (r["efficiency"][name] for name in ("q25", "median", "q75"))
        sent = ", ".join(f"{kind} {bytes_ / 1e6:.3g} MB" for kind, bytes_ in r["sent"].items()) or "nothing"
        rate, mfu = f"{r['rate']:,.0f} {r['unit']}", "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        out.append(
            f"{r['implementation']:8}{r['kind']:8}{r['devices']:8}{r['examples']:9}{1 / r['seconds']['median']:9.2f}"
            f"{rate:>18}{mfu:>7}  {median:.2f} ({low:.2f}-{high:.2f}), sent: {sent}"
        )
    for r in records:
        if r["kind"] == "mesh":
            low, median, high = (100 * (r["ratio"][name] - 1) for name in ("q25", "median", "q75"))
            out.append(f"{r['implementation']:8}a mesh of one device costs {median:+.1f} % ({low:+.1f} to {high:+.1f})")
    if any(r.get("virtual") for r in records):
        out.append(f"the devices are virtual: all of them share {len(os.sched_getaffinity(0))} core(s)")
    return out


def draw(records: list[dict[str, Any]], picture: Path) -> None:
    """Efficiency by the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r["kind"] != "mesh":
            curves.setdefault(f"{r['implementation']}, {r['kind']}", []).append(r)
    for name, own in curves.items():
        devices = [r["devices"] for r in own]
        low, median, high = ([r["efficiency"][part] for r in own] for part in ("q25", "median", "q75"))
        (line,) = axes.plot(devices, median, "o-", label=name, markersize=4)
        axes.fill_between(devices, low, high, alpha=0.2, color=line.get_color())
    axes.set(xscale="log", xlabel="devices", ylabel="efficiency", ylim=(0, None))
    axes.set_xticks(sorted({r["devices"] for r in records}), [str(n) for n in sorted({r["devices"] for r in records})])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=110)


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        work(*sys.argv[2:])
        return
    with exits("scaling"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.scaling", __doc__ or "", sys.argv[1:])
        backend.prepare()
        records = []
        for family in arguments.families:
            for kind in arguments.kinds:
                records += [overhead(arguments, family)] if kind == "mesh" else scaled(arguments, family, kind)
        for line in lines(records):
            print(line)
        write(arguments.output, "scaling", records)
        if set(arguments.kinds) != {"mesh"}:
            draw(records, arguments.output / "scaling.png")


if __name__ == "__main__":
    main()
