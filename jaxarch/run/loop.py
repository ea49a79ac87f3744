"""The loop: dispatch steps, look now and then, save, stop when told."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxarch.run import backend, processes
from jaxarch.run.checkpoint import Checkpoints, kept
from jaxarch.run.console import Advance, Console
from jaxarch.run.mesh import rows_here
from jaxarch.run.metrics import Log, Values, better, divergences, divide, lines, ordered, summary
from jaxarch.run.peaks import seconds_at_peak
from jaxarch.run.program import Carry, Member, Programs, restart
from jaxarch.run.protocol import Batch, Experiment, RunError

AHEAD = 2  # dispatches for which batches are made ready in advance
ASK = 5.0  # seconds after which several processes ask each other for a signal that came to one of them


class Plan(NamedTuple):
    """Which steps a run takes and after which of them it looks. All but `steps` may differ on resume."""

    steps: int
    stop: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    scan: int


class Reached(NamedTuple):
    """Where a run stands: after `step` steps, which took `seconds`."""

    carry: Carry
    step: int
    seconds: float


class Stopped(Exception):
    """A signal ended the run after a whole step; all is saved."""

    def __init__(self, signal_number: int, step: int):
        self.signal_number, self.step = signal_number, step


def plan(steps: int, stop: int | None, eval_every: int, checkpoint_every: int, scan: int) -> Plan:
    """Fills what was left at 0: ten evaluations a run, a checkpoint at each, a hundred lines in the log."""

    def rounded(every: int) -> int:
        return max(1, -(-every // scan)) * scan

    eval_every = eval_every or rounded(steps // 10)
    return Plan(steps, stop or steps, rounded(steps // 100), eval_every, checkpoint_every or eval_every, scan)


def dispatches(start: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """`(first step, number of steps)`: `plan.scan` at a time, one at a time where a look would be jumped over."""
    looks = (plan.log_every, plan.eval_every, plan.checkpoint_every)
    index = start
    while index < plan.stop:
        until = min(plan.stop, *(index + every - index % every for every in looks))
        count = plan.scan if index + plan.scan <= until else 1
        yield index, count
        index += count


def batches(experiment: Experiment, index: int, count: int, rows: tuple[int, int] | None = None) -> Batch | int:
    """Batches `index ... index + count - 1`, stacked; their number where the state holds its own world.

    rows: the first example of each and one past the last, where not all are wanted.
    """
    if experiment.data is None:
        return count
    size, (first, last) = experiment.batch_size, rows or (0, experiment.batch_size)
    examples = [experiment.data[i * size + row] for i in range(index, index + count) for row in range(first, last)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(count, last - first, *np.shape(leaves[0])), *examples)


def feed(programs: Programs, schedule: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, Batch | int]]:
    """The schedule with its batches, which a thread makes ready ahead of their use.

    Each process of several reads the examples that its devices need.
    """
    experiment, rows = programs.experiment, None
    if programs.mesh is not None and experiment.data is not None:
        rows = rows_here(experiment.batch_size, experiment.layout, programs.mesh)

    def ready_made(index: int, count: int) -> Batch | int:
        found = batches(experiment, index, count, rows)
        return found if rows is None else programs.on_mesh(found, rows[0])

    waiting: deque[tuple[int, int, Future]] = deque()
    with ThreadPoolExecutor(1, "batches") as thread:
        try:
            for index, count in schedule:
                waiting.append((index, count, thread.submit(ready_made, index, count)))
                if len(waiting) > AHEAD:
                    index, count, ready = waiting.popleft()
                    yield index, count, ready.result()
            for index, count, ready in waiting:
                yield index, count, ready.result()
        finally:
            thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Within it, SIGINT and SIGTERM are noted: the call gives the number of the one that came, or 0.

    A second one interrupts at once. Of several processes all are told of it, so that they stop after the same step:
    all have to call.
    """
    seen = 0

    def note(number: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: processes.largest(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Seconds spent on steps: compiling, evaluating, reporting and saving stand outside."""

    def __init__(self, seconds: float, programs: Programs):
        self._programs, self._running = programs, True
        self._start(seconds)

    def _start(self, total: float) -> None:
        self._total, self._since, self._compiled = total, time.perf_counter(), self._programs.compile_seconds

    def seconds(self) -> float:
        if not self._running:
            return self._total
        return self._total + time.perf_counter() - self._since - (self._programs.compile_seconds - self._compiled)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Entered when the device is idle, so that the steps still under way are not left out."""
        self._total, self._running = self.seconds(), False
        yield
        self._running = True
        self._start(self._total)


class Profiler:
    """Records ten steps into `profile/`, for Perfetto or XProf: from the tenth on, sooner in a short run."""

    FIRST, COUNT = 10, 10

    def __init__(self, folder: Path, start: int, stop: int, wanted: bool):
        self._folder, self._wanted = folder / "profile", wanted
        self._first = start + min(self.FIRST, max(stop - start - self.COUNT, (stop - start) // 2)) if wanted else None
        self._until: int | None = None

    def before(self, index: int, carry: Carry) -> None:
        if self._first is not None and index >= self._first:
            jax.block_until_ready(carry)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._first, self._until = None, index + self.COUNT

    def after(self, step: int, carry: Carry) -> None:
        if self._until is not None and step >= self._until:
            self._stop(carry)

    def _stop(self, carry: Carry) -> None:
        jax.block_until_ready(carry)
        jax.profiler.stop_trace()
        self._until = None

    def close(self, carry: Carry, console: Console) -> None:
        if self._until is not None:
            self._stop(carry)
        if self._wanted:
            there = self._folder.exists()
            console.line(f"profile: {self._folder}" if there else "profile: there was no step to record")


class Run:
    """One run under way: what it has reached, and where it writes."""

    def __init__(
        self,
        programs: Programs,
        plan: Plan,
        folder: Path,
        checkpoints: Checkpoints,
        console: Console,
        log: Log,
        reached: Reached,
    ):
        self.programs, self.plan, self.folder = programs, plan, folder
        self.checkpoints, self.console, self.log = checkpoints, console, log
        self.carry, self.step = reached.carry, reached.step
        self.clock = Clock(reached.seconds, programs)
        self.dead: dict[int, tuple[int, str]] = {}  # member -> first step and metric that was not finite
        self.last: list[dict[str, Any]] = []  # the last evaluation: a line for each point of the sweep
        self._monitored: tuple[int, float] | None = None
        self._logged = reached.step, reached.seconds
        self._at_peak = 0.0  # seconds that the machine would take for a step at the least; 0: not known
        self._said: set[str] = set()
        self._asked, self._ask_at = (reached.step, reached.seconds), reached.step + 1

    def train(self, profile: bool = False) -> None:
        """The steps up to `plan.stop`, looking, logging and saving on the way.

        Raises RunError when no member is left that has not diverged, or a checkpoint cannot be written;
        Stopped after a signal. In each case the last good checkpoint is there.
        """
        profiler = Profiler(self.folder, self.step, self.plan.stop, profile)
        schedule = dispatches(self.step, self.plan)
        with signals() as stopped, self.console.progress(self.plan.steps, self.step) as advance:
            with self.clock.paused():
                # Measured, if it must be, before anything else is under way.
                jax.block_until_ready(self.carry)
                self._at_peak = seconds_at_peak(self.programs.operations(), self.console.line) / devices(self.carry)
                if self.step == 0:
                    self._write(self._evaluate(), advance)
            for index, count, batch in feed(self.programs, schedule):
                profiler.before(index, self.carry)
                self.carry = self.programs.steps(self.carry, batch, index)
                self._say_notes()
                self.step = index + count
                profiler.after(self.step, self.carry)
                looks = self._due(self.plan.log_every) or self._due(self.plan.eval_every)
                if looks:
                    self._look(advance)
                signal_number = stopped() if looks or self._asks() else 0
                if self._due(self.plan.checkpoint_every) or self.step == self.plan.stop or signal_number:
                    self.save()
                if signal_number and self.step < self.plan.steps:
                    raise Stopped(signal_number, self.step)
            if self.step == self.plan.steps and not self.last:  # killed before it could say its result
                self._evaluate()
        profiler.close(self.carry, self.console)

    def _asks(self) -> bool:
        """Whether a signal is asked for now. Several processes wait for each other then: every few seconds."""
        if processes.alone():
            return True
        if self.step < self._ask_at:
            return False
        steps, seconds = self.step - self._asked[0], self.clock.seconds() - self._asked[1]
        pace = steps * ASK / seconds if seconds > 0 else 0.0
        self._asked = self.step, self.clock.seconds()
        self._ask_at = self.step + max(1, processes.largest(int(min(pace, 2.0**30))))
        return True

    def _say_notes(self) -> None:
        """What the compiler and the loop chose, when they have chosen it."""
        for note in sorted(self.programs.notes - self._said):
            self.console.line(note)
        self._said |= self.programs.notes

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.plan.steps

    def _look(self, advance: Advance) -> None:
        values = divide(self.carry.sums)
        self._bury(divergences(self.carry.sums))
        self.carry = Carry(self.carry.state, restart(self.carry.sums))
        with self.clock.paused():
            if self._due(self.plan.eval_every):
                values |= self._evaluate()
            self._write(values, advance)

    def _write(self, values: Values, advance: Advance) -> None:
        values = ordered(values, self.programs.experiment.monitor)
        written = lines(values, self.programs.members, self.dead)
        self.log.write(self.step, self.clock.seconds(), written, self.speed(*self._logged))
        self._logged = self.step, self.clock.seconds()
        if self._due(self.plan.eval_every):
            for line in written:
                self.console.line(f"step {self.step}  {summary(line)}")
        advance(self.step, summary(written[0], most=2), self.clock.seconds())

    def speed(self, since: int = 0, seconds: float = 0.0) -> dict[str, float]:
        """Steps a second and, where it is known, MFU: the share of the machine's peak that the model's operations
        reached (Chowdhery et al. 2022, app. B). Since step `since`, which was reached after so many seconds.

        To be called when the device is idle.
        """
        steps, taken = self.step - since, self.clock.seconds() - seconds
        if not steps or taken <= 0:
            return {}
        mfu = {"mfu": steps * self._at_peak / taken} if self._at_peak else {}
        return {name: float(f"{value:.4g}") for name, value in {"steps_per_second": steps / taken, **mfu}.items()}

    def _evaluate(self) -> Values:
        values = divide(self.programs.evaluate(self.carry.state, self.step))
        values |= report(self.programs, self.carry.state, self.step, self.folder)
        self.last = lines(ordered(values, self.programs.experiment.monitor), self.programs.members, self.dead)
        name, sign = better(self.programs.experiment.monitor)
        alive = values[name][self._living()] if name in values else np.array([np.nan])
        if np.isfinite(alive).any():
            self._monitored = self.step, sign * float(np.mean(alive[np.isfinite(alive)]))
        return values

    def _living(self) -> list[int]:
        return [number for number in range(len(self.programs.members)) if number not in self.dead]

    def _bury(self, found: dict[int, tuple[int, str]]) -> None:
        """Counts these members as diverged, and names them. Raises RunError when none is left."""
        members = self.programs.members
        for number, (step, what) in found.items():
            if number not in self.dead:
                self.dead[number] = step, what
                if len(members) > 1:
                    self.console.line(
                        f"{named(members[number])}: {what} is not finite at step {step}; left out from here"
                    )
        if not self._living():
            raise RunError(divergence(min(self.dead.values()), len(members), self.checkpoints.steps()))

    def save(self) -> None:
        self._bury(divergences(self.carry.sums))
        broken = np.flatnonzero(~self.programs.finite(self.carry.state))
        self._bury({int(number): (self.step - 1, "a parameter after the update") for number in broken})
        with self.clock.paused():
            best = self._monitored[1] if self._monitored and self._monitored[0] == self.step else None
            self.checkpoints.save(self.step, self.carry, {"seconds": self.clock.seconds()}, best)


def devices(carry: Carry) -> int:
    """How many devices share the work; those of a CPU are one machine."""
    return 1 if backend.platform() == "cpu" else len(jax.tree.leaves(carry)[0].devices())


def report(programs: Programs, state: PyTree, step: int, folder: Path) -> Values:
    """Calls the experiment's report, if it has one, for each member, into `samples/<step>/`; its metrics.

    Of several processes the first calls it, and all are told the metrics. Raises RunError where it cannot write.
    """
    if programs.experiment.report is None:
        return {}
    state, keys = programs.whole(state), programs.report_keys(step)
    collected: list[Values] = []
    with processes.agreed():
        for number in range(len(programs.members) if processes.first() else 0):
            place = folder / "samples" / f"{step:07d}"
            if not programs.solo:
                place /= f"member-{number}"
            place.mkdir(parents=True, exist_ok=True)
            key = keys if programs.solo else keys[number]
            collected.append(divide(programs.experiment.report(programs.member(state, number), key, place)))
    names = list(dict.fromkeys(name for values in collected for name in values))
    found = {name: [float(values.get(name, [math.nan])[0]) for values in collected] for name in names}
    return {name: np.array(values) for name, values in processes.said(found).items()}


def named(member: Member) -> str:
    point = " ".join(f"{name}={value:g}" for name, value in member.point.items())
    return f"replica with seed {member.seed}" + (f" at {point}" if point else "")


def divergence(first: tuple[int, str], members: int, saved: list[int]) -> str:
    step, metric = first
    who = "" if members == 1 else f"all {members} replicas diverged; the first: "
    advice = "A lower learning rate or a clipped gradient may help."
    if metric.startswith("env/"):  # said of what was given, not of what was learned
        advice = "The environment gave a reward or an observation that is no number."
    return f"{who}{metric} is not finite at step {step}; {kept(saved)}. {advice}"
