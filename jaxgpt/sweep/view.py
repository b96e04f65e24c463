"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere, and the best in the end."""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.live import Live
from rich.table import Table

from jaxgpt import cost
from jaxgpt.config import Config
from jaxgpt.monitor.terminal import PLAIN_SECONDS, RunConsole, duration
from jaxgpt.sweep.compare import LEVEL, Outcome, difference, outcomes
from jaxgpt.sweep.grid import Member, told
from jaxgpt.sweep.program import Progress

ROWS = 24
"""Settings in a table, the best ones; a live one of more would not stay on the screen."""


class SweepDisplay:
    """Shows a sweep as it goes; use it as a context manager."""

    def __init__(self, console: RunConsole, members: Sequence[Member], lines: Sequence[dict[str, Any]]):
        """`lines`: the results so far, a list that grows."""
        self._console, self._members, self._lines = console, members, lines
        self._began, self._printed = time.monotonic(), time.monotonic()
        self._costs = [flops_of_a_step(member.config) for member in members]
        self._all = sum(map(self._cost, range(len(members))))
        self._before = sum(self._cost(line["member"]) for line in lines if line["done"])
        self._ended, self._over, self._at, self._now = set[int](), 0, 0, "compiling"
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None

    def __enter__(self) -> "SweepDisplay":
        if self._live:
            self._live.start()
            self._live.update(self._table())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if kind is KeyboardInterrupt:
            done = sum(line["done"] for line in self._lines)
            self._console.print(
                f"{done} of {len(self._members)} members are done, and kept; the same command again trains the others, "
                "those that were under way from their start"
            )

    def __call__(self, event: Progress | list[dict[str, Any]]) -> None:
        if isinstance(event, Progress):
            self._progress(event)
        else:
            self._scored(event)

    def _progress(self, event: Progress) -> None:
        self._at = event.step * sum(self._costs[i] for i in event.members if i not in self._ended)
        finite = [loss for loss in event.losses if math.isfinite(loss)]
        losses = f"losses {min(finite):.3f} to {max(finite):.3f}" if finite else "no loss is a number"
        which = self._which(event.members)
        self._now = f"{which}: step {event.step:,} of {event.steps:,}, {losses}{self._left()}"
        self._show()

    def _scored(self, new: Sequence[dict[str, Any]]) -> None:
        for line in new:
            if line["done"]:
                self._ended.add(line["member"])
                self._over += self._cost(line["member"])
                self._at = 0
        self._show(at_once=True)
        if not self._live:
            losses = [line["val_loss"] for line in new if line["val_loss"] is not None]
            lost = len(new) - len(losses)
            low = f"validation losses {min(losses):.4f} to {max(losses):.4f}" if losses else ""
            told_of = f"{low}{f', {lost} diverged' if lost else ''}".lstrip(", ")
            self._console.print(f"{self._which([line['member'] for line in new])}: step {new[0]['step']:,}, {told_of}")
            self._printed = time.monotonic()

    def _which(self, members: Sequence[int]) -> str:
        return f"{len(members)} of {len(self._members)} members"

    def _cost(self, member: int) -> int:
        """Operations of all its steps."""
        return self._costs[member] * self._members[member].config.train.steps

    def _left(self) -> str:
        done = self._over + self._at
        seconds = (time.monotonic() - self._began) * (self._all - self._before - done) / done if done else 0
        return f", {duration(seconds)} left" if done else ""

    def _show(self, at_once: bool = False) -> None:
        if self._live:
            self._live.update(self._table())
        elif not at_once and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._console.print(self._now)
            self._printed = time.monotonic()

    def _table(self) -> Table:
        shown = table(outcomes(self._lines, so_far=True), self._members)
        shown.caption = self._now
        return shown


def flops_of_a_step(config: Config) -> int:
    """Operations of its products."""
    train = config.train
    return 3 * cost.flops_per_token(config.model) * config.model.block_size * train.batch_size


def table(found: Sequence[Outcome], members: Sequence[Member]) -> Table:
    """A row for each setting that has finished members, best first."""
    n_seeds, names = len({member.config.train.seed for member in members}), list(members[0].setting)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for name in names or ["setting"]:
        shown.add_column(name, justify="right", no_wrap=True)
    for name in ("seeds", "step", "validation loss", "± s.e.", "diverged"):
        shown.add_column(name, justify="right", no_wrap=True)
    for outcome in found[:ROWS]:
        values = [_cell(outcome.setting[name]) for name in names] or ["as it is"]
        mean = "-" if math.isnan(outcome.mean) else f"{outcome.mean:.4f}"
        error = "-" if math.isnan(outcome.standard_error) else f"{outcome.standard_error:.4f}"
        step = f"{outcome.curve[-1][0]:,}" if outcome.curve else "-"
        shown.add_row(*values, f"{len(outcome.losses)}/{n_seeds}", step, mean, error, str(outcome.diverged or ""))
    if len(found) > ROWS:
        shown.caption = f"and {len(found) - ROWS} settings more"
    return shown


def verdict(found: Sequence[Outcome]) -> str:
    """The best setting, and how far the next one is behind it, with an interval that allows for the choice."""
    best, k = found[0], len(found)
    if math.isnan(best.mean):
        return "every setting has diverged with a seed or more: try smaller learning rates"
    error = "" if math.isnan(best.standard_error) else f" ± {best.standard_error:.4f}"
    n = len(best.losses)
    seeds = f"the mean of {n} seeds" if n > 1 else "one seed"
    said = f"best: {told(best.setting) or 'the only setting'}: {best.mean:.4f}{error} nats/token, {seeds}"
    if k < 2:
        return said
    after = found[1]
    if after.diverged:
        return f"{said}; the next, {told(after.setting)}, diverged with {after.diverged} of {len(after.losses)} seeds"
    paired = difference(best, after, k)
    said += f"; the next, {told(after.setting)}, is {paired.mean:.4f} higher"
    if paired.interval is None:
        return f"{said}; one seed gives no interval, so nothing shows that it is worse: --seeds 4"
    low, high = paired.interval
    how = f"Student's t, {paired.n} seeds paired"
    if k > 2:
        how += f", Bonferroni over the {math.comb(k, 2)} pairs of {k} settings, from which the best was chosen"
    said += f" ({LEVEL:.0%} interval {low:.4f} to {high:.4f}: {how})"
    return said if low > 0 else f"{said}; 0 is within it: these seeds do not show that it is worse, more --seeds may"


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
