"""A progress bar for work outside training, such as encoding a large text. Imports no jax."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


@contextmanager
def patient_bar(console: Console, patience: float = 2.0) -> Iterator[Callable[[str, float], None]]:
    """A function of (description, share done from 0 to 1) that shows a bar on a terminal after `patience` seconds."""
    began = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn()
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=1.0)

    def show(what: str, share: float) -> None:
        if console.is_terminal and time.monotonic() - began >= patience:
            bar.start()
            bar.update(task, description=what, completed=share)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
