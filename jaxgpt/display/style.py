"""What all charts have in common: colours by their names in the page, axes, zooming."""

from collections.abc import Sequence
from typing import Any

from jaxgpt.report.facts import Facts

Spec = dict[str, Any]
"""A Vega-Lite specification as plain values."""

INK, QUIET, LINE, MARK, WARN = (f"var(--{name})" for name in ("ink", "quiet", "line", "accent", "warm"))
SERIES = [f"var(--series-{i})" for i in range(6)]


ZOOM: Spec = {
    "name": "zoom",
    "bind": "scales",
    "select": {
        "type": "interval",
        "zoom": "wheel![event.shiftKey]",
        "translate": "[pointerdown[event.shiftKey], window:pointerup] > window:pointermove!",
    },
}
"""With Shift held, the wheel zooms and the pointer drags; without it, the page scrolls."""


FIT: Spec = {"type": "fit-x", "contains": "padding"}


def chart(**parts: Any) -> Spec:
    config: Spec = {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": QUIET,
            "titleColor": QUIET,
            "gridColor": LINE,
            "domainColor": LINE,
            "tickColor": LINE,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": 400,
            "labelOverlap": True,
        },
        "legend": {"labelColor": INK, "titleColor": QUIET, "orient": "top", "title": None, "labelFontSize": 13},
        "header": {"labelColor": QUIET, "titleColor": QUIET},
    }
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "autosize": FIT,
        **parts,
    }
    return {**spec, "config": config | parts.get("config", {})}


def step_axis(last: int) -> Spec:
    scale = {"domain": [0, last], "nice": False, "padding": 8}
    return {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "scale": scale,
        "axis": {"format": ",d", "tickMinStep": 1, "tickCount": 8},
    }


def by_run(runs: Sequence[Facts], legend: bool = True) -> Spec:
    names = [facts.name for facts in runs]
    if len(names) == 1:
        return {"value": SERIES[0]}
    scale = {"domain": names, "range": [SERIES[i % len(SERIES)] for i in range(len(names))]}
    return {"field": "run", "type": "nominal", "scale": scale, "legend": {} if legend else None}


def tooltip(form: str) -> list[Spec]:
    step = {"field": "step", "type": "quantitative", "format": ",d"}
    return [{"field": "run"}, step, {"field": "value", "type": "quantitative", "format": form}]
