"""Charts of a sweep: the loss against each setting, and the loss over steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.display import charts
from jaxgpt.display.charts import ACCENT, PALETTE, Spec, category, chart, columns, layer, quantity
from jaxgpt.sweep.grid import describe
from jaxgpt.sweep.results import Outcome

LABEL = "validation loss, nats/token"


def draw(found: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw the outcomes, best first, into `folder`; the files.

    Raises:
      UsageError: as `charts.save`.
    """
    charts.require()
    found = [outcome for outcome in found if not math.isnan(outcome.mean)]
    names = [name for name in (found[0].setting if found else {}) if len({o.setting[name] for o in found}) > 1]
    specs = {folder / "settings.png": settings(found, names)} if names else {}
    if found and len(found[0].curve) > 1:
        specs[folder / "curves.png"] = curves(found)
    for path, spec in specs.items():
        charts.save(spec, path)
    return list(specs)


def settings(found: Sequence[Outcome], names: Sequence[str]) -> Spec:
    """A panel for each setting: the mean loss of every outcome against its value, with the standard error over seeds,
    and a line through the best of each value. Losses far above are cut off."""
    low, high = found[0].mean, found[-1].mean
    high = min(high, low + max(4 * (found[len(found) // 2].mean - low), 0.05))
    room = 0.06 * (high - low) or 0.05
    y = quantity("loss", LABEL, domain=[low - room, high + room], nice=False)
    panels = []
    for name in names:
        values = [outcome.setting[name] for outcome in found]
        x: Spec = {"field": "x", "type": "ordinal", "title": name}
        if all(isinstance(value, int | float) for value in values):
            log = min(values) > 0 and max(values) / min(values) >= 4
            x = quantity(
                "x", name, {"tickCount": 6, "format": ".4~g"}, type="log" if log else "linear", nice=False, padding=16
            )
        rows = _spread(values, [o.mean for o in found], [o.standard_error for o in found])
        best = list({row["x"]: row for row in reversed(rows)}.values())
        panels.append({"width": 400, "height": 340, "layer": _marks(rows, best, x, y, {"value": ACCENT})})
    return chart(hconcat=panels)


def curves(found: Sequence[Outcome]) -> Spec:
    """Loss by step of the best settings, as many as there are colours: the mean over seeds, and its standard error."""
    names = [describe(outcome.setting) or "the only setting" for outcome in found[: len(PALETTE)]]
    rows = [
        row
        for name, outcome in zip(names, found, strict=False)
        for row in _spread(*zip(*outcome.curve, strict=True), line=name)
    ]
    color = category("line", names, PALETTE, {"columns": 2, "labelLimit": 400, "title": None})
    x, y = quantity("x", "step"), quantity("loss", LABEL)
    return chart(layer=_marks(rows, rows, x, y, color), width=560, height=360)


def _marks(rows: list[Spec], line: list[Spec], x: Spec, y: Spec, color: Spec) -> list[Spec]:
    """Points with error bars, and a line."""
    at: Spec = {"x": x, "y": y, "color": color}
    return [
        layer(rows, "rule", {**at, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, clip=True),
        layer(line, "line", at, clip=True),
        layer(rows, "point", at, filled=True, size=60, opacity=1, clip=True),
    ]


def _spread(x: Sequence[Any], means: Sequence[float], errors: Sequence[float], **more: Any) -> list[Spec]:
    """Rows with x, the loss, and the ends of its error bar."""
    known = [0 if math.isnan(error) else error for error in errors]
    low, high = ([mean + sign * error for mean, error in zip(means, known, strict=True)] for sign in (-1, 1))
    return columns(x=x, loss=means, low=low, high=high, **more)
