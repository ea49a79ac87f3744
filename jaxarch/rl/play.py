"""A GIF of what a run has learned.

python -m jaxarch.rl.play runs/ppo/demo
python -m jaxarch.rl.play runs/dqn/demo --episodes 3 --sampled --output three.gif
python -m jaxarch.rl.play runs/tabular/demo --member 2 --step best
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from jaxtyping import Array, Key
from PIL import Image

from jaxarch.rl.agent import Agent
from jaxarch.rl.collecting import World, advance, begin
from jaxarch.rl.drawing import drawing_of
from jaxarch.rl.environments import LONGEST, Environment
from jaxarch.rl.training import Evaluation
from jaxarch.run import backend
from jaxarch.run.command import exits, parsed_or_usage
from jaxarch.run.load import open_run
from jaxarch.run.protocol import ConfigError, check_least


@dataclasses.dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run, as runs/ppo/demo"""
    episodes: int = 1
    """how many, one after another"""
    sampled: bool = False
    """draw actions from the policy instead of taking the best"""
    output: Path | None = None
    """the GIF (default: played.gif in the run)"""
    member: int = 0
    """of a run of several replicas, which"""
    seed: int = 0
    """of the episodes' beginnings and chances"""
    step: str = "newest"
    """checkpoint: newest, best or a number"""
    overwrite: bool = False
    """replace what is there"""


class Episode(NamedTuple):
    """states: as the environment's source knows them, first to last."""

    states: list[Any]
    total: float

    @property
    def length(self) -> int:
        return len(self.states) - 1


def main() -> None:
    with exits("play"):
        arguments = parsed_or_usage(Arguments, "python -m jaxarch.rl.play", __doc__ or "", sys.argv[1:])
        check_least(arguments, ("episodes",), 1)
        output = arguments.output or arguments.run / "played.gif"
        if output.suffix != ".gif":
            raise ConfigError(f"--output {output} is not a .gif.")
        if arguments.output and output.exists() and not arguments.overwrite:
            raise ConfigError(f"--output {output} is there already; --overwrite replaces it.")
        backend.prepare()
        evaluation, learner = learned(arguments.run, arguments.step, arguments.member)
        drawing = drawing_of(evaluation.environment)
        pictures: list[Image.Image] = []
        for number in range(arguments.episodes):
            key = jax.random.fold_in(jax.random.key(arguments.seed), number)
            episode = played(evaluation.environment, evaluation.agent, learner, key, greedy=not arguments.sampled)
            pictures += map(drawing.picture, episode.states)
            print(f"episode {number}: {episode.length} steps, return {episode.total:g}")
        save(pictures, output, drawing.seconds)
        print(f"written to {output}")


def learned(run: Path, step: str, member: int) -> tuple[Evaluation, Any]:
    """What the run is evaluated with, and what its member has learned. Raises ConfigError."""
    opened = open_run(run, int(step) if step.isdigit() else step)
    evaluation = opened.loaded.experiment.evaluate
    if not isinstance(evaluation, Evaluation):
        raise ConfigError(f"{run} is not a run of one agent: there is nothing to play.")
    count = len(opened.programs.members)
    if not 0 <= member < count:
        raise ConfigError(f"--member {member}: {run} has {count}, from 0.")
    learner = opened.loaded.state.learner
    return evaluation, jax.tree.map(lambda leaf: leaf[member], learner) if count > 1 else learner


def played(environment: Environment, agent: Agent, learner: Any, key: Key[Array, ""], greedy: bool) -> Episode:
    """One episode, step by step."""

    @jax.jit
    def one(world: World, key: Key[Array, ""]) -> tuple[World, Any, Any, Any]:
        act_key, step_key, start_key = jax.random.split(key, 3)
        action, memory = agent.policy(learner, world.observation, act_key, world.memory, world.first, greedy)
        starts = jax.vmap(environment.reset)(start_key[None])
        following, made, seen = advance(environment, world, action, memory, step_key[None], starts)
        reached = following.state if made.next_state is None else made.next_state
        return following, reached, seen.ended[0], seen.returns[0]

    def inner(state: Any) -> Any:
        return environment.inner(jax.device_get(jax.tree.map(lambda leaf: leaf[0], state)))

    begin_key, key = jax.random.split(key)
    world = jax.jit(lambda key: begin(environment, agent, 1, key))(begin_key)
    states, total = [inner(world.state)], 0.0
    for t in range(environment.episode_length or LONGEST):
        world, reached, ended, total = one(world, jax.random.fold_in(key, t))
        states.append(inner(reached))
        if ended:
            break
    return Episode(states, float(total))


def save(pictures: list[Image.Image], path: Path, seconds: float) -> None:
    """The last picture is held for a second. Browsers show no frame for less than 20 ms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [max(20, round(1000 * seconds))] * (len(pictures) - 1) + [1000]
    first, *others = (picture.quantize(64, dither=Image.Dither.NONE) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, disposal=1)


if __name__ == "__main__":
    main()
