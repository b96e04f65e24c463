"""A sweep on a terminal: its scores, and at the end a table and the best setting."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from jaxgpt.sweep.grid import cell, describe
from jaxgpt.sweep.program import Scored
from jaxgpt.sweep.results import LEVEL, Outcome, difference


def scores(found: Sequence[Scored], n: int) -> str:
    """The newest scores, of some of `n` members, on one line."""
    losses = [score.evaluation.loss for score in found if score.evaluation]
    between = f"{min(losses):.4f} to {max(losses):.4f}" if losses else "none is finite"
    lost = f", {len(found) - len(losses)} diverged" if len(losses) < len(found) else ""
    return f"{len(found)} of {n} members: step {found[0].step:,}, validation losses {between}{lost}"


def table(found: Sequence[Outcome]) -> Table:
    """A row per setting, best first."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*(found[0].setting or ["setting"]), "seeds", "validation loss", "± s.e.", "diverged"):
        shown.add_column(name, justify="right", no_wrap=True)
    for outcome in found:
        values = [cell(value) for value in outcome.setting.values()] or ["the only one"]
        figures = ["-" if math.isnan(x) else f"{x:.4f}" for x in (outcome.mean, outcome.standard_error)]
        shown.add_row(*values, str(len(outcome.losses)), *figures, str(outcome.diverged or ""))
    return shown


def verdict(found: Sequence[Outcome]) -> str:
    """The best setting, and the difference to the next with an interval corrected for the choice of the best."""
    best, k = found[0], len(found)
    if math.isnan(best.mean):
        return "every setting diverged with at least one seed: try smaller learning rates"
    error = "" if math.isnan(best.standard_error) else f" ± {best.standard_error:.4f}"
    text = f"best: {describe(best.setting) or 'the only setting'}: {best.mean:.4f}{error} nats/token"
    if k < 2:
        return text
    after = found[1]
    text += f"; the next, {describe(after.setting)}, "
    if after.diverged:
        return f"{text}diverged with {after.diverged} of {len(after.losses)} seeds"
    mean, n, interval = difference(best, after, k)
    text += f"is {mean:.4f} higher"
    if interval is None:
        return f"{text}; one seed gives no interval and does not show that it is worse: --seeds 4"
    (low, high), pairs = interval, math.comb(k, 2)
    how = f"Student's t, {n} seeds paired" + (f", Bonferroni over {pairs} pairs of settings" if k > 2 else "")
    text += f" ({LEVEL:.0%} interval {low:.4f} to {high:.4f}: {how})"
    return text if low > 0 else f"{text}; 0 is within it: these seeds do not show that it is worse, more --seeds may"
