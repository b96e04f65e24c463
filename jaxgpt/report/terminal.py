"""What a person sees of a training run: a live line on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.text import Text

from jaxgpt.report.oneline import ASCII, BLOCKS, sparkline, visible
from jaxgpt.training.evaluate import Evaluation
from jaxgpt.training.journal import Evaluated, Event, Notice, Progress, Sampled

PLAIN_SECONDS = 5.0
"""Where the output is no terminal, progress lines are at least so far apart."""
WIDE = 72
"""Columns from which on there is room for the bar and for all numbers."""
CURVE = 1000
"""Losses that are kept for the curve; of more, the means of two neighbours."""


class RunConsole(Console):
    """A console that falls silent when whoever read it has gone, and loses what a full disk does not take: neither is
    a reason to end a run."""

    def __init__(self, **kwargs: Any):
        super().__init__(highlight=False, markup=False, soft_wrap=True, **kwargs)

    def print(self, *objects: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **kwargs)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.file is sys.stdout:  # its last flush, at exit, must not find the broken pipe again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TrainingDisplay:
    """Shows the events of `fit`; use it as a context manager and as `fit`'s `watch`.

    Args:
      utilisation: tokens per second to the share of what the devices can do at most, where that is known.
    """

    def __init__(self, console: Console, steps: int, utilisation: Callable[[float], float] | None = None):
        self._console, self._printed = console, time.monotonic()
        self._utilisation = utilisation
        self.live = console.is_terminal and not console.is_dumb_terminal
        """Whether there is a terminal that lines can be drawn on again and again."""
        self.notices = 0
        self._losses: list[float] = []
        self._best: Evaluated | None = None
        self._sample = ""
        self._bar = LiveBar(self._below, console, disable=not self.live)
        self._task = self._bar.add_task("train", total=steps, numbers="compiling")

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Evaluated(step, evaluation):
                if self._best is None or evaluation.loss < self._best.evaluation.loss:
                    self._best = event
                self._print(f"step {step:>6,}  validation {describe(evaluation)}")
            case Notice(_, step, text):
                self.notices += 1
                self._print(f"WARNING  step {step:,}  {text}", style="bold yellow")
            case Sampled(_, text):
                self._sample = text
            case Progress():
                self._progress(event)

    def _progress(self, event: Progress) -> None:
        self._losses.append(event.loss)
        if len(self._losses) > CURVE:
            self._losses = [sum(pair) / 2 for pair in zip(self._losses[::2], self._losses[1::2], strict=False)]
        short = f"loss {event.loss:.4f}"
        numbers = short
        if event.tokens_per_second and event.seconds_left is not None:
            left = f"{duration(event.seconds_left)} left"
            short += f"  {left}"
            used = f"  {self._utilisation(event.tokens_per_second):.0%} used" if self._utilisation else ""
            numbers += f"  {event.tokens_per_second:,.0f} tokens/s{used}  {left}"
        fitting = numbers if self._console.width >= WIDE else short
        self._bar.update(self._task, completed=event.step, numbers=fitting)
        if not self.live and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"step {event.step:>6,}/{event.steps:,}  {numbers}")

    def _below(self) -> Iterator[Text]:
        """The lines under the bar: the loss so far, and what the model wrote last."""
        width = self._console.width
        if len(self._losses) > 1:
            levels = BLOCKS if self._console.encoding.startswith("utf") else ASCII
            said = f"  {self._losses[0]:.2f} to {self._losses[-1]:.2f}"
            if self._best:
                said += f"  best {self._best.evaluation.loss:.4f} at {self._best.step:,}"
            curve = sparkline(self._losses, min(60, width - len(said) - 5), levels) if width > len(said) + 15 else ""
            yield Text(f"loss {curve}{said}", no_wrap=True, overflow="crop")
        if self._sample:
            yield Text(visible(self._sample), style="dim", no_wrap=True, overflow="crop")

    def _print(self, line: str, **style: str) -> None:
        self._printed = time.monotonic()
        self._console.print(line, **style)  # type: ignore[arg-type]


class LiveBar(progress.Progress):
    """A bar with lines under it."""

    def __init__(self, below: Callable[[], Iterable[Text]], console: Console, disable: bool):
        self._below = below
        columns: list[progress.ProgressColumn] = [TextColumn("step"), MofNCompleteColumn()]
        columns += [BarColumn(bar_width=None)] if console.width >= WIDE else []
        super().__init__(*columns, TextColumn("{task.fields[numbers]}"), console=console, disable=disable)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from self._below()


def describe(evaluation: Evaluation) -> str:
    """An evaluation on one line."""
    return (
        f"loss {evaluation.loss:.4f} ± {evaluation.standard_error:.4f} nats/token, "
        f"{evaluation.bits_per_char:.4f} bits/char, {evaluation.bits_per_byte:.4f} bits/byte"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(75), duration(3700)
    ('1m15s', '1h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
