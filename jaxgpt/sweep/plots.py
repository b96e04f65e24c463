"""Charts of a sweep: the loss against each setting, and the loss over steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.display import charts
from jaxgpt.display.charts import PALETTE, QUIET, SHAPES, Spec, category, chart, columns, label, layer, quantity
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
    specs = {}
    names = [name for name in (found[0].setting if found else {}) if len({o.setting[name] for o in found}) > 1]
    if names:
        specs[folder / "settings.png"] = hyperparameters(found, names)
    if found and len(found[0].curve) > 1:
        specs[folder / "curves.png"] = curves(found)
    for path, spec in specs.items():
        charts.save(spec, path)
    return list(specs)


def hyperparameters(found: Sequence[Outcome], names: Sequence[str]) -> Spec:
    """A panel for each setting: mean and standard error over seeds against its value, a line for each combination of
    the others. Of more combinations than colours, only the best value of each is a line, and all are dots."""
    low, high = _limits(found)
    y = quantity("loss", LABEL, domain=[low, high], nice=False)
    panels = [_panel(found, name, y if i == 0 else {**y, "title": None}) for i, name in enumerate(names)]
    if above := sum(outcome.mean > high for outcome in found):
        panels[0]["layer"].append(label(f"↑ {above} above", {"value": 6}, {"value": 8}, align="left"))
    return chart(hconcat=panels, resolve={"scale": {"color": "independent", "shape": "independent"}})


def curves(found: Sequence[Outcome]) -> Spec:
    """Loss by step of the best settings, as many as there are colours: the mean over seeds, and its standard error as a
    band."""
    shown = found[: len(PALETTE)]
    names = [describe(outcome.setting) or "as it is" for outcome in shown]
    rows = [
        row
        for name, outcome in zip(names, shown, strict=True)
        for row in _spread(*zip(*outcome.curve, strict=True), setting=name)
    ]
    over = f", mean ± standard error of {len(found[0].losses)} seeds" if len(found[0].losses) > 1 else ""
    title = f"the {len(shown)} best of {len(found)}" if len(found) > len(shown) else None
    legend = (
        {"title": title, "orient": "right", "labelLimit": 400} if len(shown) > 1 or describe(shown[0].setting) else None
    )
    color, shape = category("setting", names, PALETTE, legend), category("setting", names, SHAPES, legend)
    x, y = quantity("x", f"step{over}"), quantity("loss", LABEL)
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color}
    return chart(
        layer=[
            layer(rows, "area", band, opacity=0.18),
            layer(rows, "line", {"x": x, "y": y, "color": color}, strokeWidth=2),
            layer(rows, "point", {"x": x, "y": y, "color": color, "shape": shape}, filled=True, size=45, opacity=1),
        ],
        width=560,
        height=360,
    )  # fmt: skip


def _panel(found: Sequence[Outcome], name: str, y: Spec) -> Spec:
    values = sorted({outcome.setting[name] for outcome in found}, key=_order)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lines: dict[str, list[Outcome]] = {}
    for outcome in found:
        others = {other: value for other, value in outcome.setting.items() if other != name}
        lines.setdefault(describe(others), []).append(outcome)
    dots: list[Outcome] = []
    if len(lines) > len(PALETTE):
        best = [min((o for o in found if o.setting[name] == value), key=lambda o: o.mean) for value in values]
        lines, dots = {"the best of the others": best}, list(found)

    def rows(outcomes: list[Outcome], line: str) -> list[Spec]:
        at = [outcome.setting[name] if numeric else str(outcome.setting[name]) for outcome in outcomes]
        return _spread(at, [o.mean for o in outcomes], [o.standard_error for o in outcomes], line=line)

    x: Spec
    if numeric:
        log = values[0] > 0 and values[-1] / values[0] >= 4
        axis: Spec = {"values": values, "labelOverlap": False} if len(values) <= 6 else {"tickCount": 6}
        axis["labelExpr"] = "format(datum.value, '.6~g')"
        x = quantity("x", name, axis, type="log" if log else "linear", nice=False, padding=16)
    else:
        x = {"field": "x", "type": "ordinal", "sort": list(map(str, values)), "title": name, "axis": {"labelAngle": 0}}
    marked = sorted(lines)
    legend = {"columns": 2, "labelLimit": 300, "title": None} if len(lines) > 1 or marked[0] else None
    color, shape = category("line", marked, PALETTE, legend), category("line", marked, SHAPES, legend)
    each = [row for line in marked for row in rows(lines[line], line)]
    at: Spec = {"x": x, "y": y, "color": color}
    layers = [
        layer(rows(dots, ""), "point", {"x": x, "y": y}, filled=True, size=25, color=QUIET, opacity=0.5, clip=True),
        layer(each, "rule", {**at, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, clip=True),
        layer(each, "line", at, clip=True),
        layer(each, "point", {**at, "shape": shape}, filled=True, size=60, opacity=1, clip=True),
    ]
    return {"width": 400, "height": 340, "layer": layers}


def _spread(x: Sequence[Any], means: Sequence[float], errors: Sequence[float], **more: Any) -> list[Spec]:
    """Rows with x, the loss, and the ends of its error bar."""
    known = [0 if math.isnan(error) else error for error in errors]
    low, high = ([mean + sign * error for mean, error in zip(means, known, strict=True)] for sign in (-1, 1))
    return columns(x=x, loss=means, low=low, high=high, **more)


def _order(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)


def _limits(found: Sequence[Outcome]) -> tuple[float, float]:
    """The range of the y axis: all losses, except those so high that the others would lie on top of each other."""
    means = sorted(outcome.mean for outcome in found)
    errors = [0 if math.isnan(outcome.standard_error) else outcome.standard_error for outcome in found]
    low = min(outcome.mean - error for outcome, error in zip(found, errors, strict=True))
    high = max(outcome.mean + error for outcome, error in zip(found, errors, strict=True))
    high = min(high, low + max(4 * (means[len(means) // 2] - low), 0.05))
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room
