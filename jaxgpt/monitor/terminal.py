"""The display of a training run: a live line on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.text import Text

from jaxgpt.display.text import ASCII, BLOCKS, fixed, percent, sparkline, visible
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated, Event, Notice, Progress, Sampled

PLAIN_SECONDS = 5.0
"""Seconds between progress lines, at least, where the output is not a terminal."""
WIDE = 72
"""Columns that the bar and all numbers need."""


class RunConsole(Console):
    """A console whose output may fail (a full disk, a closed pipe or terminal) without ending the run."""

    def __init__(self, **kwargs: Any):
        super().__init__(highlight=False, markup=False, soft_wrap=True, **kwargs)

    def __exit__(self, *error: Any) -> None:
        """Write what was printed, and forget it if that fails."""
        try:
            super().__exit__(*error)
        except OSError:
            quiet, self.quiet = self.quiet, True
            with self:  # a quiet console empties its buffer
                pass
            self.quiet = quiet

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.file is sys.stdout:  # else the flush at exit raises again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TrainingDisplay(progress.Progress):
    """Shows the events of `fit`; a context manager, and the `on_event` of `fit`. Where lines cannot be redrawn it is
    disabled, and prints plain lines.

    Args:
      utilization: tokens per second -> model FLOPs utilization; None if unknown.
    """

    def __init__(self, console: Console, steps: int, utilization: Callable[[float], float | None] = lambda speed: None):
        self.notices = 0
        self._utilization, self._printed = utilization, time.monotonic()
        self._losses, self._line = list[float](), ""  # of each chunk, and the curve as it was drawn last
        self._best: Evaluated | None = None
        self._sample = ""
        bar = [BarColumn(bar_width=None)] if console.width >= WIDE else []
        columns = TextColumn("step"), MofNCompleteColumn(), *bar, TextColumn("{task.fields[numbers]}")
        live = console.is_terminal and not console.is_dumb_terminal
        super().__init__(*columns, console=console, refresh_per_second=4, disable=not live)
        self._task = self.add_task("train", total=steps, numbers="compiling")

    def __call__(self, event: Event) -> None:
        match event:
            case Evaluated(step, evaluation):
                self._best = min(self._best or event, event, key=lambda each: each.rank)
                self._print(f"step {step:>6,}  validation {describe(evaluation)}")
            case Notice(_, step, text):
                self.notices += 1
                self._print(f"WARNING  step {step:,}  {text}", "bold yellow")
            case Sampled(_, text):
                self._sample = text
            case Progress():
                self._progress(event)

    def _progress(self, event: Progress) -> None:
        self._best = event.best or self._best
        self._losses.append(event.loss)
        self._line = "" if self.disable else self.curve()  # not at each refresh: there may be many losses
        numbers = short = f"loss {fixed(event.loss)}"
        if (speed := event.tokens_per_second) and event.seconds_left is not None:
            left = f"  {duration(event.seconds_left)} left"
            used = self._utilization(speed)
            share = "" if used is None else f"  {percent(used)} used"
            numbers, short = f"{short}  {speed:,.0f} tokens/s{share}{left}", short + left
        self.update(self._task, completed=event.step, numbers=numbers if self.console.width >= WIDE else short)
        if self.disable and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"step {event.step:>6,}/{event.steps:,}  {numbers}")

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and under it the loss curve and the newest sample."""
        yield from super().get_renderables()
        for line, style in ((self._line, ""), (visible(self._sample), "dim")):
            if line:
                yield Text(line, style, no_wrap=True, overflow="crop")

    def curve(self) -> str:
        """The training loss so far on one line; empty before the second Progress."""
        if len(self._losses) < 2:
            return ""
        levels = BLOCKS if self.console.encoding.startswith("utf") else ASCII
        text = f"  {fixed(self._losses[0], 2)} to {fixed(self._losses[-1], 2)}"
        if self._best:
            text += f"  best {fixed(self._best.evaluation.loss)} at {self._best.step:,}"
        room = min(60, self.console.width - len(text) - 5)
        return f"loss {sparkline(self._losses, room, levels) if room > 10 else ''}{text}"

    def _print(self, line: str, style: str | None = None) -> None:
        self._printed = time.monotonic()
        self.console.print(line, style=style)


def describe(evaluation: Evaluation) -> str:
    """An evaluation on one line."""
    error = "" if math.isnan(evaluation.standard_error) else f" ± {fixed(evaluation.standard_error)}"
    return (
        f"loss {fixed(evaluation.loss)}{error} nats/token, "
        f"{fixed(evaluation.bits_per_char)} bits/char, {fixed(evaluation.bits_per_byte)} bits/byte"
    )


def duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> duration(75), duration(3700)
    ('1m15s', '1h01m')
    """
    minutes, whole = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours}h{left:02}m"
    return f"{minutes}m{whole:02}s" if minutes else f"{whole}s"
