"""Charts of a sweep: the loss against each setting, and the loss over steps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.display import charts
from jaxgpt.display.charts import PALETTE, SHAPES, Spec, category, chart, columns, layer, quantity
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
        specs[folder / "settings.png"] = settings(found, names)
    if found and len(found[0].curve) > 1:
        specs[folder / "curves.png"] = curves(found)
    for path, spec in specs.items():
        charts.save(spec, path)
    return list(specs)


def settings(found: Sequence[Outcome], names: Sequence[str]) -> Spec:
    """A panel for each setting: mean and standard error over seeds against its value, a line for each combination of
    the others; of more combinations than colours, one line of the best of each value. Losses far above are cut off."""
    rows = _spread(range(len(found)), [o.mean for o in found], [o.standard_error for o in found])
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    high = min(high, low + max(4 * (found[len(found) // 2].mean - low), 0.05))
    room = 0.06 * (high - low) or 0.05
    y = quantity("loss", LABEL, domain=[low - room, high + room], nice=False)
    panels = [_panel(found, name, y if i == 0 else {**y, "title": None}) for i, name in enumerate(names)]
    return chart(hconcat=panels, resolve={"scale": {"color": "independent", "shape": "independent"}})


def curves(found: Sequence[Outcome]) -> Spec:
    """Loss by step of the best settings, as many as there are colours: the mean over seeds, and its standard error."""
    shown = found[: len(PALETTE)]
    names = [describe(outcome.setting) or "as it is" for outcome in shown]
    over = f", mean ± standard error of {len(found[0].losses)} seeds" if len(found[0].losses) > 1 else ""
    title = f"the {len(shown)} best of {len(found)}" if len(found) > len(shown) else None
    lines = {
        name: _spread(*zip(*outcome.curve, strict=True), line=name) for name, outcome in zip(names, shown, strict=True)
    }
    return chart(
        layer=_marks(lines, quantity("x", f"step{over}"), quantity("loss", LABEL), title), width=560, height=360
    )


def _panel(found: Sequence[Outcome], name: str, y: Spec) -> Spec:
    values = sorted(
        {outcome.setting[name] for outcome in found}, key=lambda x: x if isinstance(x, int | float) else str(x)
    )
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    lines: dict[str, list[Outcome]] = {}
    for outcome in found:
        others = {other: value for other, value in outcome.setting.items() if other != name}
        lines.setdefault(describe(others), []).append(outcome)
    if len(lines) > len(PALETTE):
        best = [min((o for o in found if o.setting[name] == value), key=lambda o: o.mean) for value in values]
        lines = {"the best of the others": best}

    def rows(line: str) -> list[Spec]:
        at = [outcome.setting[name] if numeric else str(outcome.setting[name]) for outcome in lines[line]]
        return _spread(at, [o.mean for o in lines[line]], [o.standard_error for o in lines[line]], line=line)

    x: Spec = {
        "field": "x",
        "type": "ordinal",
        "sort": list(map(str, values)),
        "title": name,
        "axis": {"labelAngle": 0},
    }
    if numeric:
        log = values[0] > 0 and values[-1] / values[0] >= 4
        axis: Spec = {"values": values, "labelOverlap": False} if len(values) <= 6 else {"tickCount": 6}
        axis["labelExpr"] = "format(datum.value, '.6~g')"
        x = quantity("x", name, axis, type="log" if log else "linear", nice=False, padding=16)
    return {"width": 400, "height": 340, "layer": _marks({line: rows(line) for line in sorted(lines)}, x, y)}


def _marks(lines: dict[str, list[Spec]], x: Spec, y: Spec, title: str | None = None) -> list[Spec]:
    """Lines with points and error bars, by name."""
    names, each = list(lines), [row for rows in lines.values() for row in rows]
    legend = {"columns": 2, "labelLimit": 400, "title": title} if len(names) > 1 or names[0] else None
    color, shape = category("line", names, PALETTE, legend), category("line", names, SHAPES, legend)
    at: Spec = {"x": x, "y": y, "color": color}
    clip = "domain" in y["scale"]
    return [
        layer(each, "rule", {**at, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, clip=clip),
        layer(each, "line", at, clip=clip),
        layer(each, "point", {**at, "shape": shape}, filled=True, size=60, opacity=1, clip=clip),
    ]


def _spread(x: Sequence[Any], means: Sequence[float], errors: Sequence[float], **more: Any) -> list[Spec]:
    """Rows with x, the loss, and the ends of its error bar."""
    known = [0 if math.isnan(error) else error for error in errors]
    low, high = ([mean + sign * error for mean, error in zip(means, known, strict=True)] for sign in (-1, 1))
    return columns(x=x, loss=means, low=low, high=high, **more)
