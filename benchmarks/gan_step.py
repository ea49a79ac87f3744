"""How fast is a DCGAN's training step, beside PyTorch's and a plain Flax one on the same machine in the same minutes?

    python -m benchmarks.gan_step --output results
    python -m benchmarks.gan_step --torch-python python3.11

One step is that of PyTorch's tutorial: real and generated pictures pass the discriminator apart, one forward pass of
the generator serves both players, Adam, running statistics kept. PyTorch runs with channels last and with the
discriminator's parameters frozen in the generator's step. The Flax version is what one writes first: `nn.ConvTranspose`
and `nn.BatchNorm`, a forward pass of the generator for each player, `jax.grad` of it all, `optax.adam`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measuring import Measure, Peer, alternating, quartiles, ratio, write
from jaxarch.gan.dcgan import DCGANConfig, dcgan, widths
from jaxarch.gan.training import WEIGHTS, GameConfig, OptimConfig, hypers, make_init, make_step
from jaxarch.run import Experiment, backend, check_least
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.program import Carry, Member, Programs

CHANNELS, LATENTS = 3, 100
RATE, BETAS = 2e-4, (0.5, 0.999)  # Radford et al. 2016, sec. 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    size: int = 32
    """height and width of a picture"""
    features: int = 64
    """at half the picture's size"""
    batch: int = 64
    torch: bool = True
    """compare with PyTorch"""
    torch_python: Path | None = None
    """interpreter that has PyTorch (default: this one)"""
    naive: bool = True
    """compare with the plain Flax version"""
    steps: int = 10
    """steps a measurement; of the plain Flax version a fifth of them"""
    rounds: int = 7
    output: Path = Path("results")

    def __post_init__(self) -> None:
        check_least(self, ("features", "batch", "steps", "rounds"), 1)


def pictures(arguments: Arguments) -> np.ndarray:
    shape = (arguments.batch, arguments.size, arguments.size, CHANNELS)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def timed(step: Callable[[Any, int], Any], state: Any, steps: int) -> Measure:
    """Seconds of one of `state = step(state, index)`."""

    def measure() -> float:
        nonlocal state
        start = time.perf_counter()
        for index in range(steps):
            state = step(state, index)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    return measure


def ours(arguments: Arguments) -> Measure:
    real = pictures(arguments)
    generator, discriminator = dcgan(DCGANConfig(LATENTS, arguments.features), real.shape[1:])
    game = GameConfig("non_saturating", "none", reuse_fakes=True)
    optim = OptimConfig(RATE, beta1=BETAS[0], beta2=BETAS[1], average=0.0)
    experiment = Experiment(
        init=make_init(generator, discriminator, game, optim, real),
        step=make_step(generator, discriminator, game, optim, lambda batch: (batch, None)),
        evaluate=lambda state, key: {},
        hypers=hypers(game, optim),
        weights=WEIGHTS,
    )
    programs = Programs(experiment, [Member(0, {})])
    first = Carry(programs.init(), programs.sums(real))
    return timed(lambda carry, index: programs.steps(carry, real[None], index), first, arguments.steps)


# --- the plain Flax version ---------------------------------------------------------------------


class NaiveGenerator(nn.Module):
    size: int
    features: int

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        *rest, first = widths(self.size, self.features)
        x = nn.ConvTranspose(first, (4, 4), padding="VALID", use_bias=False)(latents[:, None, None])
        for width in rest[::-1]:
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            x = nn.ConvTranspose(width, (4, 4), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return jnp.tanh(nn.ConvTranspose(CHANNELS, (4, 4), (2, 2), use_bias=False)(x))


class NaiveDiscriminator(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number, width in enumerate(widths(x.shape[1], self.features)):
            x = nn.Conv(width, (4, 4), (2, 2), use_bias=False)(x)
            x = nn.leaky_relu(nn.BatchNorm(use_running_average=False)(x) if number else x, 0.2)
        return nn.Conv(1, (4, 4), padding="VALID", use_bias=False)(x).reshape(-1)


def naive(arguments: Arguments) -> Measure:
    real = jnp.asarray(pictures(arguments))
    generator, discriminator = (
        NaiveGenerator(arguments.size, arguments.features),
        NaiveDiscriminator(arguments.features),
    )
    optimizer = optax.adam(RATE, *BETAS)

    def init(key: jax.Array) -> dict[str, Any]:
        g, d = generator.init(key, jnp.zeros((1, LATENTS))), discriminator.init(key, real[:1])
        params, stats = (g["params"], d["params"]), (g.get("batch_stats", {}), d.get("batch_stats", {}))
        state = {"key": key, "g": params[0], "d": params[1], "g_stats": stats[0], "d_stats": stats[1]}
        return state | {"g_opt": optimizer.init(params[0]), "d_opt": optimizer.init(params[1])}

    def applied(network: nn.Module, params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, moved = cast(Any, network.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]))
        return y, moved.get("batch_stats", {})  # of 8 x 8 pixels D has none

    def step(state: dict[str, Any], index: Any) -> dict[str, Any]:
        keys = jax.random.split(jax.random.fold_in(state["key"], index))
        latents = [jax.random.normal(key, (arguments.batch, LATENTS)) for key in keys]

        def d_loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            fake, g_stats = applied(generator, state["g"], state["g_stats"], latents[0])
            on_real, stats = applied(discriminator, params, state["d_stats"], real)
            on_fake, stats = applied(discriminator, params, stats, fake)
            return jnp.mean(nn.softplus(-on_real)) + jnp.mean(nn.softplus(on_fake)), (stats, g_stats)

        grads, (d_stats, g_stats) = jax.grad(d_loss, has_aux=True)(state["d"])
        updates, d_opt = optimizer.update(grads, state["d_opt"])
        d = optax.apply_updates(state["d"], updates)

        def g_loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            fake, stats = applied(generator, params, g_stats, latents[1])
            on_fake, after = applied(discriminator, d, d_stats, fake)
            return jnp.mean(nn.softplus(-on_fake)), (stats, after)

        grads, (g_stats, d_stats) = jax.grad(g_loss, has_aux=True)(state["g"])
        updates, g_opt = optimizer.update(grads, state["g_opt"])
        g = optax.apply_updates(state["g"], updates)
        state = state | {"g": g, "d": d, "g_stats": g_stats, "d_stats": d_stats}
        return state | {"g_opt": g_opt, "d_opt": d_opt}

    return timed(jax.jit(step), jax.jit(init)(jax.random.key(0)), max(arguments.steps // 5, 1))


def main() -> None:
    with exits("gan_step"):
        arguments = parsed_or_usage(Arguments, "python -m benchmarks.gan_step", __doc__ or "", sys.argv[1:])
        backend.prepare()
        measures = {"jaxarch": ours(arguments)}
        peers = []
        if arguments.torch:
            sizes = arguments.features, arguments.batch, arguments.size
            peers.append(Peer(arguments.torch_python, "dcgan", *sizes, arguments.steps))
            measures[peers[0].description] = peers[0].measure
        if arguments.naive:
            measures["Flax, as one writes it first"] = naive(arguments)
        seconds = alternating(measures, arguments.rounds)
        for peer in peers:
            peer.close()
        records = []
        for name, values in seconds.items():
            record = {"implementation": name, "pass": "train_step", "length": arguments.size, "precision": "f32"}
            record |= {"features": arguments.features, "batch": arguments.batch, "seconds": quartiles(values)}
            if name != "jaxarch":
                record["speed_of_ours"] = ratio(seconds["jaxarch"], values)
            records.append(record)
            speed = f"  ours is {record['speed_of_ours']['median']:.2f}x as fast" if name != "jaxarch" else ""
            print(f"{1e3 * record['seconds']['median']:9.1f} ms  {name}{speed}")
        write(arguments.output, "gan_step", records)


if __name__ == "__main__":
    main()
