"""A sweep on a terminal: each evaluation on a line, and at the end a table and the best setting."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from jaxgpt.sweep.grid import cell, describe
from jaxgpt.sweep.program import Score
from jaxgpt.sweep.results import LEVEL, Outcome, difference


def progress(scores: Sequence[Score], n: int) -> str:
    """The scores of an evaluation, which may be of some of the sweep's `n` members, on one line."""
    losses = [score.val_loss for score in scores if score.val_loss is not None]
    extremes = f"{min(losses):.4f} to {max(losses):.4f}" if losses else "none is finite"
    diverged = f", {len(scores) - len(losses)} diverged" if len(losses) < len(scores) else ""
    return f"{len(scores)} of {n} members: step {scores[0].step:,}, validation losses {extremes}{diverged}"


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row per setting, best first."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*(outcomes[0].setting or ["setting"]), "seeds", "validation loss", "± s.e.", "diverged"):
        shown.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        values = [cell(value) for value in outcome.setting.values()] or ["the only one"]
        figures = ["-" if math.isnan(x) else f"{x:.4f}" for x in (outcome.mean, outcome.standard_error)]
        shown.add_row(*values, str(len(outcome.losses)), *figures, str(outcome.diverged or ""))
    return shown


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The best setting, and its difference to the next with an interval corrected for the choice of the best."""
    best, k = outcomes[0], len(outcomes)
    if math.isnan(best.mean):
        return "every setting diverged with at least one seed: try smaller learning rates"
    error = "" if math.isnan(best.standard_error) else f" ± {best.standard_error:.4f}"
    text = f"best: {describe(best.setting) or 'the only setting'}: {best.mean:.4f}{error} nats/token"
    if k < 2:
        return text
    second = outcomes[1]
    text += f"; the next, {describe(second.setting)}, "
    if second.diverged:
        return f"{text}diverged with {second.diverged} of {len(second.losses)} seeds"
    mean, n, interval = difference(best, second, k)
    text += f"is {mean:.4f} higher"
    if interval is None:
        return f"{text}; one seed gives no interval and does not show that it is worse: --seeds 4"
    low, high = interval
    how = f"Student's t, {n} seeds paired" + (f", Bonferroni over {math.comb(k, 2)} pairs of settings" if k > 2 else "")
    text += f" ({LEVEL:.0%} interval {low:.4f} to {high:.4f}: {how})"
    return text if low > 0 else f"{text}; 0 is within it: these seeds do not show that it is worse, more --seeds may"
