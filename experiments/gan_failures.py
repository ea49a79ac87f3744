"""What goes wrong in GANs, measured, and what cures it: many seeds and a grid of settings, side by side.

    python -m experiments.gan_failures
    python -m experiments.gan_failures --data ring --seeds 20 --treatments non_saturating packed relativistic_r1_r2

Data: that of `experiments.gan_toy`.

Each treatment is the game of `experiments.gan_toy` with another objective or cure, played by all members at once:
`--seeds` seeds with one setting, and one seed at each point of a grid of learning rates and gammas. Beside the usual
curves a run leaves, in `samples/`, the table `failures.md` and the figure `failures.png`.

Measured: 2026-11-26, two cores of an AMD EPYC (Zen 5), jax 0.10.2, all games: 22 minutes of processor time. Of 25
modes the games without a penalty find 7 to 22 and none of them converges at any point of the grid; with R1, R1 and R2
or the gradient penalty every one of ten seeds finds all 25, and 44 to 67 % of the grid converges (docs/gan.md has the
table).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from experiments import gan_toy
from jaxarch.gan.training import GameConfig, GANState, Hypers, OptimConfig
from jaxarch.run import ConfigError, Experiment, Index, Mean, Metrics, check_least, main
from jaxarch.run.mesh import of_members, over_members

PLAIN = GameConfig(penalty="none")
TREATMENTS: dict[str, GameConfig] = {
    "minimax": replace(PLAIN, objective="minimax"),
    "non_saturating": replace(PLAIN, objective="non_saturating"),
    "least_squares": replace(PLAIN, objective="least_squares"),
    "hinge": replace(PLAIN, objective="hinge"),
    "wasserstein_clip": replace(PLAIN, objective="wasserstein", clip=0.1, critics=3),
    "wasserstein_penalty": GameConfig(objective="wasserstein", penalty="gradient", critics=3),
    "unrolled": replace(PLAIN, objective="non_saturating", unroll=5),
    "packed": replace(PLAIN, objective="non_saturating", pack=4),
    "non_saturating_r1": GameConfig(objective="non_saturating", penalty="r1"),
    "relativistic": PLAIN,
    "relativistic_r1_r2": GameConfig(),
}
DEFAULT = "relativistic_r1_r2"
ACCURACY, NORM = "train/d_accuracy", "train/g_grad_norm"
LOST = 0.01  # share of samples of high quality below which a member counts as diverged, finite or not
CONVERGED = 0.2  # reverse KL in nats: a fifth of the modes may be missing, log(1 / 0.8) = 0.22


@dataclass(frozen=True)
class Config:
    data: Literal["ring", "grid"] = "grid"
    """8 Gaussians on a circle, or 25 on a square"""
    treatments: tuple[str, ...] = tuple(TREATMENTS)
    """games to play, by name"""
    seeds: int = 10
    """members with the one setting"""
    rates: tuple[float, ...] = (5e-4, 2e-3, 8e-3)
    """learning rates of the grid"""
    gammas: tuple[float, ...] = (0.02, 0.1, 0.5)
    """weights of the penalty of the grid"""
    data_seed: int = 0
    """without effect: members draw their samples from their own keys"""
    steps: int = 10_000
    """length of the runs"""
    batch_size: int = 64
    """samples that a player sees a step"""
    width: int = 64
    """units of a hidden layer"""
    layers: int = 4
    """hidden layers of each network"""
    gamma: float = 0.1
    """weight of the penalty, of the seeds' setting"""
    optim: OptimConfig = OptimConfig(learning_rate=2e-3, final=0.05)

    def __post_init__(self) -> None:
        unknown = [name for name in self.treatments if name not in TREATMENTS]
        if unknown or not self.treatments:
            raise ConfigError(f"--treatments {' '.join(unknown) or 'is empty'}: there are {', '.join(TREATMENTS)}.")
        check_least(self, ("seeds",), 1)
        given = *self.rates, *self.gammas
        if not self.rates or not self.gammas or not all(0 < number < float("inf") for number in given):
            raise ConfigError("--rates and --gammas are numbers above 0, at least one of each.")
        for name in self.treatments:
            self.toy(name)

    def toy(self, name: str) -> gan_toy.Config:
        """The experiment that a treatment is."""
        game = replace(TREATMENTS[name], gamma=self.gamma)
        return gan_toy.Config(
            data=self.data,
            steps=self.steps,
            batch_size=self.batch_size,
            width=self.width,
            layers=self.layers,
            game=game,
            optim=self.optim,
        )


@flax.struct.dataclass
class State:
    """games: of each treatment the states of all members: the seeds, then the grid, rates by gammas."""

    games: dict[str, GANState]
    key: Key[Array, "*replicas"]


def experiment(config: Config) -> Experiment:
    games = {name: gan_toy.experiment(config.toy(name)) for name in config.treatments}
    points = [(config.optim.learning_rate, config.gamma)] * config.seeds
    points += [(rate, gamma) for rate in config.rates for gamma in config.gammas]
    hypers = Hypers(
        learning_rate=jnp.asarray([rate for rate, _ in points], jnp.float32),
        ratio=jnp.full(len(points), config.optim.ratio),
        gamma=jnp.asarray([gamma for _, gamma in points], jnp.float32),
    )

    def init(key: Key[Array, ""], _: tuple) -> State:
        keys = jax.random.split(key, len(points))
        return State({name: over_members(game.init)(keys, hypers) for name, game in games.items()}, key)

    def step(state: State, batch: None, index: Index) -> tuple[State, Metrics]:
        states, metrics = {}, {}
        for name, game in games.items():
            states[name], said = over_members(game.step, (0, None, None))(state.games[name], None, index)
            for metric, value in said.items():
                if metric == ACCURACY or metric.startswith(NORM):
                    metrics[f"{metric}[{name}]"] = living(cast(Array, value)[: config.seeds])
        return State(states, state.key), metrics

    def measured(state: State, key: Key[Array, ""]) -> dict[str, dict[str, Any]]:
        keys = jax.random.split(key, len(points))
        found = {}
        for name, game in games.items():
            values: dict[str, Any] = over_members(game.evaluate)(state.games[name], keys)
            # What the players would say in a step from here.
            said = over_members(game.step, (0, None, None))(state.games[name], None, jnp.asarray(config.steps))[1]
            values |= {metric: said[metric] for metric in said if metric == ACCURACY or metric.startswith(NORM)}
            broken = ~finite(state.games[name].generator, len(points))
            lost = broken | (values["val/high_quality"] < LOST)
            found[name] = values | {"diverged": lost, "converged": ~lost & (values["val/reverse_kl"] < CONVERGED)}
        return found

    def evaluate(state: State, key: Key[Array, ""]) -> Metrics:
        metrics: Metrics = {}
        for name, values in measured(state, key).items():
            seeds, grid = slice(None, config.seeds), slice(config.seeds, None)
            for metric in ("val/modes", "val/high_quality", "val/reverse_kl"):
                metrics[f"{metric}[{name}]"] = living(values[metric][seeds].astype(jnp.float32))
            metrics[f"val/diverged[{name}]"] = jnp.mean(values["diverged"][seeds], dtype=jnp.float32)
            metrics[f"val/converged[{name}]"] = jnp.mean(values["converged"][seeds], dtype=jnp.float32)
            metrics[f"val/grid[{name}]"] = jnp.mean(values["converged"][grid], dtype=jnp.float32)
        return metrics

    return Experiment(
        init=init,
        step=step,
        evaluate=evaluate,
        report=make_report(config, jax.jit(measured)),
        monitor=f"val/reverse_kl[{DEFAULT if DEFAULT in games else config.treatments[-1]}]",
        weights=(),  # members may diverge: that is what is measured
        layout=of_members("games"),
    )


def living(values: Array) -> Mean:
    """The mean over the members where it is finite."""
    alive = jnp.isfinite(values)
    return Mean(jnp.sum(jnp.where(alive, values, 0)), jnp.sum(alive, dtype=values.dtype))


def finite(params: Any, members: int) -> Bool[Array, " members"]:
    leaves = [jnp.isfinite(leaf).reshape(members, -1).all(axis=1) for leaf in jax.tree.leaves(params)]
    return jnp.stack(leaves).all(axis=0)


# --- the report ---------------------------------------------------------------------------------


def make_report(
    config: Config, measured: Callable[[State, Key[Array, ""]], dict[str, dict[str, Any]]]
) -> Callable[[State, Key[Array, ""], Path], Metrics]:
    mixture = gan_toy.MIXTURES[config.data]
    sample = gan_toy.make_sample(gan_toy.points(config.toy(DEFAULT)))  # the same generator in all games
    points_of = jax.jit(jax.vmap(lambda state, key: sample(state, key, gan_toy.COUNTED), (0, None)))

    def report(state: State, key: Key[Array, ""], folder: Path) -> Metrics:
        values = jax.device_get(measured(state, key))
        found = {name: values[name] for name in config.treatments}
        (folder / "failures.md").write_text(table(found, config))
        points = {
            name: np.asarray(points_of(jax.tree.map(lambda leaf: leaf[: config.seeds], game), key))
            for name, game in state.games.items()
        }
        draw(found, points, mixture.centres, config, folder / "failures.png")
        return {}

    return report


def mean(values: np.ndarray) -> float:
    alive = values[np.isfinite(values)]
    return float(alive.mean()) if len(alive) else float("nan")


def table(found: Mapping[str, Mapping[str, np.ndarray]], config: Config) -> str:
    """Of each treatment: means over the seeds, shares of seeds and of the grid."""
    modes = len(gan_toy.MIXTURES[config.data].centres)
    lines = [
        f"Means over {config.seeds} seeds after {config.steps} steps; grid: {len(config.rates)} learning rates by "
        f"{len(config.gammas)} gammas. Converged: reverse KL below {CONVERGED:g}; diverged: not finite, or less than "
        f"{100 * LOST:g} % of high quality.",
        "",
        f"| game | modes of {modes} | high quality | reverse KL | diverged | converged | of the grid "
        "| D tells pairs | G's gradient, first and last layer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        seeds, grid = slice(None, config.seeds), slice(config.seeds, None)
        layers = [mean(values[layer][seeds]) for layer in layers_of(values)]
        quality = 100 * mean(values["val/high_quality"][seeds])
        shares = [
            values["diverged"][seeds],
            values["converged"][seeds],
            values["converged"][grid],
            values[ACCURACY][seeds],
        ]
        cells = [
            name,
            f"{mean(values['val/modes'][seeds]):.1f}",
            f"{quality:.1f} %",
            f"{mean(values['val/reverse_kl'][seeds]):.2f}",
            *(f"{100 * mean(share):.0f} %" for share in shares),
            f"{layers[0]:.2g}, {layers[-1]:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def layers_of(values: Mapping[str, np.ndarray]) -> list[str]:
    """From the first on; of more than ten the names' order would be another."""
    return sorted((name for name in values if name.startswith(f"{NORM}/")), key=lambda name: (len(name), name))


def draw(
    found: Mapping[str, Mapping[str, np.ndarray]],
    points: Mapping[str, np.ndarray],
    centres: np.ndarray,
    config: Config,
    path: Path,
) -> None:
    """A row of each treatment: samples of the worst seed, modes of every seed, gradients by layer, the grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.3 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 4, squeeze=False, width_ratios=(1, 1.2, 1.2, 1.2))
    reach = 1.4 * np.abs(centres).max()
    norms = [mean(values[layer][: config.seeds]) for values in found.values() for layer in layers_of(values)]
    norms = [norm for norm in norms if np.isfinite(norm) and norm > 0] or [1.0]
    for row, (name, values) in zip(axes, found.items(), strict=True):
        kl = values["val/reverse_kl"][: config.seeds]
        worst = int(np.argmax(np.where(np.isfinite(kl), kl, np.inf)))
        row[0].scatter(*centres.T, s=30, marker="x", color="tab:orange", linewidths=0.8)
        row[0].scatter(*points[name][worst].T, s=1, alpha=0.3, color="tab:blue")
        row[0].set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name.replace("_", " "))
        row[0].set_title("samples of the worst seed", fontsize=8)
        row[1].bar(np.arange(config.seeds), np.sort(values["val/modes"][: config.seeds]), color="tab:blue")
        row[1].axhline(len(centres), color="tab:orange", linewidth=1)
        row[1].set(ylim=(0, 1.1 * len(centres)), xticks=[])
        row[1].set_title("modes of each seed", fontsize=8)
        layers = layers_of(values)
        row[2].bar(
            [layer.split("/")[-1] for layer in layers], [mean(values[layer][: config.seeds]) for layer in layers]
        )
        row[2].set_yscale("log")
        row[2].set_ylim(min(norms) / 2, max(norms) * 2)
        row[2].tick_params(axis="x", labelsize=6)
        row[2].set_title(
            f"gradient of G by layer; D tells {100 * mean(values[ACCURACY][: config.seeds]):.0f} %", fontsize=8
        )
        grid = values["converged"][config.seeds :].reshape(len(config.rates), len(config.gammas))
        row[3].imshow(grid, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
        row[3].set_yticks(np.arange(len(config.rates)), [f"{rate:g}" for rate in config.rates], fontsize=7)
        row[3].set_xticks(np.arange(len(config.gammas)), [f"{gamma:g}" for gamma in config.gammas], fontsize=7)
        row[3].set_ylabel("learning rate", fontsize=7)
        without = "" if TREATMENTS[name].penalty != "none" else " (no effect)"
        row[3].set_xlabel(f"gamma{without}", fontsize=7)
        row[3].set_title(f"converged: {100 * grid.mean():.0f} % of the grid", fontsize=8)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(experiment, Config)
