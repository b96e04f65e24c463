"""A sweep on a terminal: a live table or plain lines, and the best setting at the end."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rich import box, progress
from rich.table import Table

from jaxgpt.config import Config
from jaxgpt.monitor.chips import flops_per_token
from jaxgpt.monitor.terminal import PLAIN_SECONDS, RunConsole, duration
from jaxgpt.sweep.grid import Member, describe
from jaxgpt.sweep.program import Progress
from jaxgpt.sweep.results import LEVEL, Outcome, difference

ROWS = 24
"""Settings in a table, at most, so that a live one fits on the screen."""


class SweepDisplay:
    """Shows the progress of a sweep; a context manager."""

    def __init__(self, console: RunConsole, members: Sequence[Member], lines: Sequence[dict[str, Any]]):
        """`lines`: the results so far, a list that the sweep appends to."""
        self._console, self._lines, self._printed = console, lines, time.monotonic()
        self._flops = [flops_of_a_step(member.config) * member.config.train.steps for member in members]
        self._bar = progress.Progress(
            "{task.description}",
            progress.BarColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=3600,
            get_time=lambda: time.monotonic(),
        )
        done = sum(self._flops[i] for i in self._ended())
        self._task = self._bar.add_task("compiling", total=sum(self._flops), completed=done)

    def __enter__(self) -> "SweepDisplay":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            self._console.print(
                f"{len(self._ended())} of {len(self._flops)} members are done and kept; the same command again "
                "trains the others, unfinished ones from their start"
            )

    def __call__(self, event: Progress | list[dict[str, Any]]) -> None:
        """Show progress, or new lines of results."""
        ended, now, in_training = self._ended(), time.monotonic(), isinstance(event, Progress)
        if isinstance(event, Progress):
            n, losses, at = len(event.members), event.losses, f"step {event.step:,} of {event.steps:,}, losses"
            running = sum(self._flops[i] * event.step // event.steps for i in event.members if i not in ended)
            self._bar.update(self._task, completed=sum(self._flops[i] for i in ended) + running)
        else:
            n, losses = len(event), [math.nan if line["val_loss"] is None else line["val_loss"] for line in event]
            at = f"step {event[0]['step']:,}, validation losses"
        finite = [loss for loss in losses if math.isfinite(loss)]
        between = f"{min(finite):.4f} to {max(finite):.4f}" if finite else "not finite"
        lost = f", {n - len(finite)} diverged" if 0 < len(finite) < n else ""
        text = f"{n} of {len(self._flops)} members: {at} {between}{lost}{self.left()}"
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal and (not in_training or now - self._printed > PLAIN_SECONDS):
            self._console.print(text)
            self._printed = now

    def left(self) -> str:
        """The time left, by the FLOPs done and left."""
        seconds = self._bar.tasks[0].time_remaining
        return f", {duration(seconds)} left" if seconds else ""

    def _ended(self) -> set[int]:
        return {line["member"] for line in self._lines if line["done"]}


def flops_of_a_step(config: Config) -> int:
    train = config.train
    return 3 * flops_per_token(config.model) * config.model.block_size * train.batch_size


def table(found: Sequence[Outcome], members: Sequence[Member]) -> Table:
    """A row per setting, best first."""
    n_seeds, names = len({member.config.train.seed for member in members}), list(members[0].setting)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in names or ["setting"]:
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("seeds", "step", "validation loss", "± s.e.", "diverged"):
        shown.add_column(name, justify="right", no_wrap=True)
    for outcome in found[:ROWS]:
        values = [_cell(outcome.setting[name]) for name in names] or ["the only one"]
        mean = "-" if math.isnan(outcome.mean) else f"{outcome.mean:.4f}"
        error = "-" if math.isnan(outcome.standard_error) else f"{outcome.standard_error:.4f}"
        step = f"{outcome.curve[-1][0]:,}" if outcome.curve else "-"
        shown.add_row(*values, f"{len(outcome.losses)}/{n_seeds}", step, mean, error, str(outcome.diverged or ""))
    if len(found) > ROWS:
        shown.caption = f"and {len(found) - ROWS} more settings"
    return shown


def verdict(found: Sequence[Outcome]) -> str:
    """The best setting, and the difference to the next with an interval corrected for the choice of the best."""
    best, k = found[0], len(found)
    if math.isnan(best.mean):
        return "every setting diverged with at least one seed: try smaller learning rates"
    error = "" if math.isnan(best.standard_error) else f" ± {best.standard_error:.4f}"
    seeds = f"the mean of {len(best.losses)} seeds" if len(best.losses) > 1 else "one seed"
    text = f"best: {describe(best.setting) or 'the only setting'}: {best.mean:.4f}{error} nats/token, {seeds}"
    if k < 2:
        return text
    after = found[1]
    text += f"; the next, {describe(after.setting)}, "
    if after.diverged:
        return f"{text}diverged with {after.diverged} of {len(after.losses)} seeds"
    paired = difference(best, after, k)
    text += f"is {paired.mean:.4f} higher"
    if paired.interval is None:
        return f"{text}; one seed gives no interval and does not show that it is worse: --seeds 4"
    low, high = paired.interval
    how = f"Student's t, {paired.n} seeds paired"
    if k > 2:
        how += f", Bonferroni over the {math.comb(k, 2)} pairs of {k} settings"
    text += f" ({LEVEL:.0%} interval {low:.4f} to {high:.4f}: {how})"
    return text if low > 0 else f"{text}; 0 is within it: these seeds do not show that it is worse, more --seeds may"


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
