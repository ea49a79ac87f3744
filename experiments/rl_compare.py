"""Algorithms of reinforcement learning on several environments, with many seeds, in one table.

    python -m experiments.rl_compare
    python -m experiments.rl_compare --algorithms ppo dqn --environments CartPole-v1 Acrobot-v1 --seeds 10
    python -m experiments.rl_compare --algorithms ppo sac td3 --environments Pendulum-v1 --env-steps 20000

Each algorithm plays with the settings of its own experiment: those of its preset for the environment, where there is
one, else its defaults. One that does not take an environment's actions leaves its place in the table empty.

A step of the run is a part of every game, after which all are evaluated greedily. Beside the usual curves a run
leaves, in `samples/`, the tables `returns.md` (interquartile mean over the seeds and its 95 % interval) and
`improvement.md` (how probable it is that one algorithm beats another), the learning curves with their bands,
`returns.png`, and the performance profiles, `profiles.png` (Agarwal et al. 2021).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxarch.rl.environments import OtherActions
from jaxarch.rl.statistics import estimate, improvement, profile
from jaxarch.run import ConfigError, Experiment, Index, Metrics, check_least, main
from jaxarch.run.mesh import of_members, over_members
from jaxarch.run.metrics import interquartile_mean, interval

Algorithm = Literal["ppo", "a2c", "reinforce", "dqn", "iqn", "pqn", "sac", "td3"]


@dataclass(frozen=True)
class Config:
    algorithms: tuple[Algorithm, ...] = ("ppo", "a2c", "dqn", "pqn")
    """to play, by the names of their experiments"""
    environments: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1")
    """of gymnax, or MODULE:FACTORY"""
    seeds: int = 5
    """of each algorithm on each environment"""
    env_steps: int = 500_000
    """of each seed"""
    steps: int = 20
    """parts that every game is cut into"""
    data_seed: int = 0
    """without effect: what is seen comes from the run's own key"""

    def __post_init__(self) -> None:
        check_least(self, ("seeds", "env_steps", "steps"), 1)
        if not self.algorithms or not self.environments:
            raise ConfigError("--algorithms and --environments are at least one of each.")


class Game(NamedTuple):
    """An algorithm on an environment. iterations: of its own steps, in all `parts`."""

    experiment: Experiment
    iterations: int
    parts: int


@flax.struct.dataclass
class State:
    """games: by `algorithm, environment`, the states of all seeds; returns: of each, `[parts, seeds]`."""

    games: dict[str, Any]
    returns: dict[str, Any]
    key: Any


def experiment(config: Config) -> Experiment:
    games = dict(found(config))
    if not games:
        raise ConfigError(f"none of {', '.join(config.algorithms)} takes the actions of these environments.")

    def init(key: Key[Array, ""], _: tuple) -> State:
        states, seen = {}, {}
        for name, game in games.items():
            keys = jax.random.split(key, config.seeds)
            states[name] = over_members(game.experiment.init, (0, None))(keys, game.experiment.hypers)
            seen[name] = jnp.full((config.steps, config.seeds), jnp.nan)
        return State(states, seen, key)

    def step(state: State, batch: None, index: Index) -> tuple[State, Metrics]:
        states, returns, metrics = {}, {}, {}
        for name, game in games.items():
            states[name] = played(game, state.games[name], index)
            keys = jax.random.split(jax.random.fold_in(state.key, index), config.seeds)
            now = cast(Array, over_members(game.experiment.evaluate)(states[name], keys)["eval/return"])
            returns[name] = state.returns[name].at[index].set(now)
            metrics[f"eval/return[{name}]"] = jnp.mean(now)
        return State(states, returns, state.key), metrics

    def evaluate(state: State, key: Key[Array, ""]) -> Metrics:
        return {f"eval/last_return[{name}]": jnp.nanmean(last(seen)) for name, seen in state.returns.items()}

    def report(state: State, key: Key[Array, ""], folder: Path) -> Metrics:
        returns = {name: np.asarray(seen) for name, seen in state.returns.items()}
        (folder / "returns.md").write_text(table(returns, config))
        (folder / "improvement.md").write_text(improvements(returns, config))
        draw(returns, config, folder / "returns.png")
        draw_profiles(returns, config, folder / "profiles.png")
        return {}

    return Experiment(
        init=init,
        step=step,
        evaluate=evaluate,
        report=report,
        monitor="-eval/last_return",
        weights=(),
        newest_only=("games",),
        layout=of_members("games"),
    )


def found(config: Config) -> list[tuple[str, Game]]:
    """All games that can be played, by name."""
    games = []
    for environment in config.environments:
        for algorithm in config.algorithms:
            module = importlib.import_module(f"experiments.{algorithm}")
            presets = [preset for preset in module.PRESETS.values() if preset.env == environment]
            one = replace(presets[0] if presets else module.Config(), env=environment, env_steps=config.env_steps)
            try:
                built = module.experiment(one)
            except OtherActions as error:
                print(f"{algorithm} on {environment}: left out; {error}")
                continue
            except ConfigError as error:
                raise ConfigError(str(error).replace("--env ", "--environments ", 1)) from None
            games.append((f"{algorithm}, {environment}", Game(built, one.steps, config.steps)))
    return games


def played(game: Game, states: Any, part: Index) -> Any:
    """These states after one more part of the game: all parts are its iterations, as evenly as they can be cut."""

    def one(number: Array | int, states: Any) -> Any:
        return over_members(lambda state: game.experiment.step(state, None, jnp.asarray(number))[0])(states)

    begin, end = (number * game.iterations // game.parts for number in (part, part + 1))
    return jax.lax.fori_loop(begin, end, one, states)


def last(seen: Float[Array, "parts seeds"]) -> Float[Array, " seeds"]:
    """The newest returns: later parts are not yet numbers."""
    played_parts = jnp.sum(jnp.isfinite(seen).any(axis=1))
    return seen[jnp.maximum(played_parts - 1, 0)]


# --- the report -----------------------------------------------------------------------------------


def table(returns: Mapping[str, np.ndarray], config: Config) -> str:
    lines = [
        f"Greedy returns after {config.env_steps:,} steps: interquartile means over {config.seeds} seeds, and their "
        "95 % intervals.",
        "",
        f"| environment | {' | '.join(config.algorithms)} |",
        f"|---|{'---|' * len(config.algorithms)}",
    ]
    for environment in config.environments:
        cells = []
        for algorithm in config.algorithms:
            seen = returns.get(f"{algorithm}, {environment}")
            cells.append("" if seen is None else summary(np.asarray(last(jnp.asarray(seen)))))
        lines.append(f"| {environment} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return f"{np.isfinite(values).sum()} of {len(values)} seeds are numbers"
    low, high = interval(values)
    return f"{float(interquartile_mean(values)):.1f} ({low:.1f} to {high:.1f})"


def newest(returns: Mapping[str, np.ndarray], algorithm: str, environment: str) -> np.ndarray | None:
    """The last returns of one game, `[seeds]`; None where it is not played, or a seed's is no number."""
    seen = returns.get(f"{algorithm}, {environment}")
    found = None if seen is None else np.asarray(last(jnp.asarray(seen)))
    return found if found is not None and np.isfinite(found).all() else None


def improvements(returns: Mapping[str, np.ndarray], config: Config) -> str:
    """How probable it is that the algorithm of a row beats that of a column, on the environments that both play."""
    lines = [
        "The probability that a seed of the row's algorithm has a higher return than one of the column's, on an "
        "environment drawn at random, and its 95 % interval.",
        "",
        f"| | {' | '.join(config.algorithms)} |",
        f"|---|{'---|' * len(config.algorithms)}",
    ]
    for row in config.algorithms:
        cells = []
        for column in config.algorithms:
            pairs = [[newest(returns, name, env) for name in (row, column)] for env in config.environments]
            both = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
            if row == column or not both:
                cells.append("")
                continue
            own, other = (np.stack([pair[i] for pair in both], axis=1) for i in (0, 1))
            found = estimate(improvement, own, other)
            cells.append(f"{float(found.value):.2f} ({float(found.low):.2f} to {float(found.high):.2f})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_profiles(returns: Mapping[str, np.ndarray], config: Config, path: Path) -> None:
    """A panel an environment: the share of seeds whose return is above each level, with its 95 % interval."""
    from matplotlib.figure import Figure

    count = len(config.environments)
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    for axes, environment in zip(figure.subplots(1, count, squeeze=False)[0], config.environments, strict=True):
        played_by = {name: newest(returns, name, environment) for name in config.algorithms}
        known = {name: values for name, values in played_by.items() if values is not None}
        everything = np.concatenate([*known.values(), np.zeros(0 if known else 1)])
        margin = 0.05 * np.ptp(everything) or 1.0
        levels = np.linspace(everything.min() - margin, everything.max() + margin, 201)
        for name, values in known.items():
            found = estimate(partial(profile, levels=levels), values[:, None])
            (line,) = axes.plot(levels, found.value, label=name)
            axes.fill_between(levels, found.low, found.high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set(title=environment, xlabel="return", ylabel="share of seeds above it")
        if known:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw(returns: Mapping[str, np.ndarray], config: Config, path: Path) -> None:
    """A panel an environment: interquartile means over the steps, and their intervals as bands."""
    from matplotlib.figure import Figure

    count = len(config.environments)
    figure = Figure(figsize=(5 * count, 3.6), layout="constrained")
    at = config.env_steps / config.steps * np.arange(1, config.steps + 1)
    for axes, environment in zip(figure.subplots(1, count, squeeze=False)[0], config.environments, strict=True):
        for algorithm in config.algorithms:
            seen = returns.get(f"{algorithm}, {environment}")
            if seen is None:
                continue
            known = np.isfinite(seen).all(axis=1)
            middle = interquartile_mean(seen[known])
            low, high = np.array([interval(row) for row in seen[known]]).reshape(-1, 2).T
            (line,) = axes.plot(at[known], middle, label=algorithm)
            axes.fill_between(at[known], low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set(title=environment, xlabel="environment steps", ylabel="greedy return")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(experiment, Config)
