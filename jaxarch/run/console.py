"""What a run prints: a progress bar when a terminal looks on, plain lines when not."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence

Advance = Callable[[int, str, float], None]
QUIET_SECONDS = 10


class Console:
    def __init__(self) -> None:
        self._terminal, self._shown = sys.stdout.isatty(), time.monotonic()
        self._print: Callable[[str], None] = lambda text: print(text, flush=True)

    def line(self, text: str) -> None:
        self._shown = time.monotonic()
        self._print(text)

    @contextlib.contextmanager
    def progress(self, steps: int, start: int) -> Iterator[Advance]:
        """Within it, `advance(step, text, seconds)` shows how far the run is, its rate and the time left."""
        if not self._terminal:
            yield self._plain(steps, start)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}")) as bar:
            task = bar.add_task("", total=steps, completed=start, rate="")
            before: list[tuple[int, float]] = []

            def advance(step: int, text: str, seconds: float) -> None:
                rate = ""
                if before:  # a resumed run's seconds do not begin at 0
                    rate = f"{(step - before[0][0]) / max(seconds - before[0][1], 1e-9):.3g} steps/s"
                before[:] = [(step, seconds)]
                bar.update(task, completed=step, description=text, rate=rate)

            self._print = lambda text: bar.console.print(text, markup=False, highlight=False)
            try:
                yield advance
            finally:
                self._print = lambda text: print(text, flush=True)

    def _plain(self, steps: int, start: int) -> Advance:
        """A line where nothing was printed for ten seconds."""
        began = time.monotonic()

        def advance(step: int, text: str, seconds: float) -> None:
            if time.monotonic() - self._shown >= QUIET_SECONDS:
                rate = (step - start) / (time.monotonic() - began)
                left = clock((steps - step) / rate)
                self.line(f"step {step}/{steps}  {text}  {rate:.3g} steps/s  {left} left")

        return advance


@contextlib.contextmanager
def heard(name: str) -> Iterator[None]:
    """Within it, what this logger says, from INFO on, is printed, and goes nowhere else."""

    class Printed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), flush=True)  # to stdout as it is then: a progress bar stands in front of it

    logger, handler = logging.getLogger(name), Printed()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library may have given the root logger a handler that prints
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def sparkline(values: Sequence[float]) -> str:
    """A curve on one line, highest at the full block."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1.0))] for v in values)
