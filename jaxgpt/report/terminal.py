"""What a person sees of a training run: a live line on a terminal, plain lines elsewhere."""

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxgpt.training.evaluate import Evaluation
from jaxgpt.training.journal import Evaluated, Event, Notice

PLAIN_SECONDS = 5.0
"""Where the output is no terminal, progress lines are at least so far apart."""


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
    """Shows the events of `fit`; use it as a context manager and as `fit`'s `watch`."""

    def __init__(self, console: Console, steps: int):
        self._console, self._printed = console, time.monotonic()
        self.notices = 0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, numbers="compiling")

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Evaluated):
            self._print(f"step {event.step:>6,}  validation {describe(event.evaluation)}")
            return
        if isinstance(event, Notice):
            self.notices += 1
            self._print(f"WARNING  step {event.step:,}  {event.text}", style="bold yellow")
            return
        numbers = f"loss {event.loss:.4f}"
        if event.tokens_per_second and event.seconds_left is not None:
            numbers += f"  {event.tokens_per_second:,.0f} tokens/s  {duration(event.seconds_left)} left"
        self._bar.update(self._task, completed=event.step, numbers=numbers)
        if not self._console.is_terminal and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"step {event.step:>6,}/{event.steps:,}  {numbers}")

    def _print(self, line: str, **style: str) -> None:
        self._printed = time.monotonic()
        self._console.print(line, **style)  # type: ignore[arg-type]


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
