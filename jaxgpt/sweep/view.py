"""A sweep on a terminal: each evaluation on a line, then a table and the best setting; and its charts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.display.charts import ACCENT, PALETTE, Spec, category, chart, columns, layer, quantity
from jaxgpt.display.text import count, fixed, span
from jaxgpt.sweep.grid import cell, describe
from jaxgpt.sweep.program import Score
from jaxgpt.sweep.results import LEVEL, Outcome, difference

LABEL = "validation loss, nats/token"


def progress(scores: Sequence[Score], n: int) -> str:
    """The scores of an evaluation, which may be of some of the sweep's `n` members, on one line."""
    losses = [score.val_loss for score in scores if score.val_loss is not None]
    extremes = span(fixed(min(losses)), fixed(max(losses))) if losses else "none is finite"
    diverged = f", {len(scores) - len(losses)} diverged" if len(losses) < len(scores) else ""
    return f"{len(scores)} of {count(n, 'member')}: step {scores[0].step:,}, validation losses {extremes}{diverged}"


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per setting, best first."""
    rows = [[*outcomes[0].setting, "seeds", "validation loss", "± s.e.", "diverged"]]
    for outcome in outcomes:
        figures = ["-" if math.isnan(x) else fixed(x) for x in (outcome.mean, outcome.standard_error)]
        values = map(cell, outcome.setting.values())
        rows.append([*values, str(len(outcome.losses)), *figures, str(outcome.diverged or "")])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(map(str.rjust, row, widths)) for row in rows)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The best setting, and its difference to the next with an interval corrected for the choice of the best."""
    best, k = outcomes[0], len(outcomes)
    if math.isnan(best.mean):
        return "every setting diverged with at least one seed: try smaller learning rates"
    error = "" if math.isnan(best.standard_error) else f" ± {fixed(best.standard_error)}"
    text = f"best: {describe(best.setting)}: {fixed(best.mean)}{error} nats/token"
    if k < 2:
        return text
    second = outcomes[1]
    text += f"; the next, {describe(second.setting)}, "
    if second.diverged:
        return f"{text}diverged with {second.diverged} of {count(len(second.losses), 'seed')}"
    mean, n, interval = difference(best, second, k)
    text += f"is {fixed(mean)} higher"
    if interval is None:
        return f"{text}; one seed gives no interval and does not show that it is worse: --seeds 4 --name OTHER"
    low, high = interval
    pairs = f", Bonferroni over {math.comb(k, 2)} pairs of settings" if k > 2 else ""
    text += f" ({LEVEL:.0%} interval {fixed(low)} to {fixed(high)}: Student's t, {n} seeds paired{pairs})"
    doubt = "; 0 is within it: these seeds do not show that it is worse, more --seeds under another --name may"
    return text if low > 0 else text + doubt


def charts(outcomes: Sequence[Outcome]) -> dict[str, Spec]:
    """The charts of `outcomes`, best first, by file name; diverged ones are left out."""
    outcomes = [outcome for outcome in outcomes if not outcome.diverged]
    found = {"settings.png": settings(outcomes)} if len(outcomes) > 1 else {}
    return found | ({"curves.png": curves(outcomes)} if outcomes and len(outcomes[0].curve) > 1 else {})


def settings(outcomes: Sequence[Outcome]) -> Spec:
    """A panel per setting: the mean loss of every outcome against its value, with the standard error over seeds, and a
    line through the best of each value. Losses far above the best are cut off."""
    means, errors = [outcome.mean for outcome in outcomes], [outcome.standard_error for outcome in outcomes]
    low = means[0]
    high = min(means[-1], low + max(4 * (means[len(means) // 2] - low), 0.05))
    room = 0.06 * (high - low) or 0.05
    y = quantity("loss", LABEL, domain=[low - room, high + room], nice=False)
    panels = []
    for name in outcomes[0].setting:
        rows = _rows([outcome.setting[name] for outcome in outcomes], means, errors)
        best = list({row["x"]: row for row in reversed(rows)}.values())
        x: Spec = {"field": "x", "type": "ordinal", "title": name, "axis": {"labelAngle": 0}}
        panels.append({"width": 400, "height": 340, "layer": _layers(rows, best, x, y, {"value": ACCENT})})
    return chart(hconcat=panels)


def curves(outcomes: Sequence[Outcome]) -> Spec:
    """Loss by step of the best settings, as many as there are colours: the mean over seeds, and its standard error."""
    shown = {describe(outcome.setting): outcome.curve for outcome in outcomes[: len(PALETTE)]}
    rows = [row for name, curve in shown.items() for row in _rows(*zip(*curve, strict=True), line=name)]
    color = category("line", list(shown), PALETTE, {"columns": 2, "labelLimit": 400, "title": None})
    x, y = quantity("x", "step"), quantity("loss", LABEL)
    return chart(layer=_layers(rows, rows, x, y, color), width=560, height=360)


def _layers(rows: list[Spec], line: list[Spec], x: Spec, y: Spec, color: Spec) -> list[Spec]:
    """Points with error bars, and a line."""
    at: Spec = {"x": x, "y": y, "color": color}
    return [
        layer(rows, "rule", {**at, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, clip=True),
        layer(line, "line", at, clip=True),
        layer(rows, "point", at, filled=True, size=60, opacity=1, clip=True),
    ]


def _rows(x: Sequence[Any], means: Sequence[float], errors: Sequence[float], **more: Any) -> list[Spec]:
    """Rows with x, the loss, and the ends of its error bar."""
    loss, error = np.array(means), np.nan_to_num(errors)
    return columns(x=x, loss=loss, low=loss - error, high=loss + error, **more)
