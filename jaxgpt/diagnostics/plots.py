"""Charts of the diagnoses that need more than a few lines of text."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgpt.diagnostics.diagnose import Attention, Curvature, Landscape, Subject
from jaxgpt.diagnostics.inside import Lens
from jaxgpt.display.charts import ACCENT, MONO, WARM, Spec, category, chart, columns, layer, quantity

SCHEME = "cividis"  # readable for the colour-blind
SHOWN, HEADS = 48, 6
"""Most tokens whose attention is drawn, and most blocks and heads."""


def attention_maps(maps: Any) -> Spec:
    """Weights (L, H, T, T) as a map for each block and head: rows attend to columns."""
    block, head, t, s = np.nonzero(np.broadcast_to(np.tril(np.ones(maps.shape[2:])), maps.shape))
    blank = {"labels": False, "ticks": False, "grid": False, "domain": False}
    x, y = ({"field": name, "type": "ordinal", "axis": blank, "title": None} for name in ("s", "t"))
    facets = {
        side: {"field": name, "type": "ordinal", "header": {"title": None, "labelExpr": f"'{name} ' + datum.value"}}
        for side, name in (("row", "block"), ("column", "head"))
    }
    encoding = {"x": x, "y": y, "color": _shade("weight", "weight", domain=[0, 1], type="sqrt")}
    return {
        "data": {"values": columns(block=block, head=head, t=t, s=s, weight=np.asarray(maps)[block, head, t, s])},
        "facet": facets,
        "spec": {"width": 110, "height": 110, "mark": "rect", "encoding": encoding},
        "spacing": 6,
    }


def curvature(found: Curvature, subject: Subject) -> Spec:
    """The Ritz values with their weights, and the loss along the top eigenvector beside the predicted parabola."""
    values, weights = np.asarray(found.spectrum.values), np.asarray(found.spectrum.weights)
    low = float(max(1e-8, weights[weights > 0].min()) / 2)
    rows = columns(value=values, weight=np.maximum(weights, low), low=low)
    x = quantity("value", "eigenvalue of the Hessian, nats/token", {"grid": False, "tickCount": 7})
    axis = {"tickCount": 5, "format": "~e"}
    y = quantity("weight", "share of the spectrum", axis, type="log", domain=[low, 1], nice=False)
    sticks = [
        layer(rows, "rule", {"x": x, "y": y, "y2": {"field": "low"}}, color=ACCENT),
        layer(rows, "point", {"x": x, "y": y}, filled=True, color=ACCENT, opacity=1),
    ]
    distance, losses = np.asarray(found.distances), np.asarray(found.losses)
    parabola = losses[len(losses) // 2] + found.slope * distance + 0.5 * values[-1] * distance**2
    lines = {"loss": losses, "parabola of the largest eigenvalue": parabola}
    curves = [row for name, loss in lines.items() for row in columns(line=name, distance=distance, loss=loss)]
    encoding = {
        "x": quantity("distance", "distance along its eigenvector", {"grid": False, "tickCount": 7}),
        "y": quantity("loss", "loss of the batch, nats/token"),
        "color": category("line", list(lines), (ACCENT, WARM), {"title": None, "labelLimit": 300}),
    }
    return chart(hconcat=[_panel(sticks), _panel([layer(curves, "line", encoding)])])


def landscape(found: Landscape, subject: Subject) -> Spec:
    """The plane as a heatmap, and the line from the initial parameters."""
    ys, xs = np.meshgrid(found.places, found.places, indexing="ij")
    cells = columns(x=xs, y=ys, loss=np.asarray(found.losses))
    x, y = (
        {"field": name, "type": "ordinal", "title": f"{order} direction, filter norms", "axis": {"format": ".2f"}}
        for name, order in (("x", "first"), ("y", "second"))
    )
    encoding = {"x": x, "y": {**y, "sort": "descending"}, "color": _shade("loss", "loss, nats/token", zero=False)}
    share = quantity("share", "share of the way from the initial parameters", {"grid": False})
    at = {"x": share, "y": quantity("loss", "loss, nats/token", padding=20)}
    line = layer(columns(share=found.shares, loss=found.path), "line", at, color=ACCENT)
    return chart(hconcat=[_panel([layer(cells, "rect", encoding)], 240), _panel([line])])


def lens(found: Lens, subject: Subject) -> Spec:
    """The most likely next token after each token, by depth."""

    def label(token: Any) -> str:
        return subject.show(token).replace(" ", "␣")[:6]

    depths, N = len(found.losses), min(24, found.top.shape[2])
    depth, t = np.divmod(np.arange(depths * N), N)
    top, probability = (np.asarray(x)[depth, 0, t] for x in (found.top, found.probability))
    cells = columns(depth=depth, t=t, probability=probability, text=[label(token) for token in top])
    read = columns(t=np.arange(N), token=[label(token) for token in subject.text[:N]])
    width = max(26, 8 * max(len(value) for row in cells + read for value in row.values() if isinstance(value, str)))
    x: Spec = {"field": "t", "type": "ordinal", "title": None, "axis": None}
    y = {"field": "depth", "type": "ordinal", "sort": "descending", "title": "blocks before the head"}
    below = {"x": x, "y": {"value": 26 * depths + 12}, "text": {"field": "token"}}
    ink = {"condition": {"test": "datum.probability > 0.5", "value": "black"}, "value": "white"}
    layers = [
        layer(cells, "rect", {"x": x, "y": y, "color": _shade("probability", "probability", domain=[0, 1])}),
        layer(cells, "text", {"x": x, "y": y, "text": {"field": "text"}, "color": ink}, font=MONO, fontSize=12),
        layer(read, "text", below, font=MONO, fontSize=12),
    ]
    title = "the likeliest next token at each depth; below, the token read"
    return chart(layer=layers, title=title, width=width * N, height=26 * depths)


def attention(found: Attention, subject: Subject) -> Spec:
    T = min(SHOWN, found.maps.shape[-1])
    return chart(hconcat=[attention_maps(np.asarray(found.maps)[:HEADS, :HEADS, :T, :T])])


CHARTS: dict[str, Callable[[Any, Subject], Spec]] = {
    each.__name__: each for each in (curvature, landscape, lens, attention)
}


def _shade(field: str, title: str, **scale: Any) -> Spec:
    """A quantity as colour."""
    legend = {"title": title, "orient": "right", "gradientLength": 120, "format": ".3~g"}
    return {"field": field, "type": "quantitative", "scale": {"scheme": SCHEME, **scale}, "legend": legend}


def _panel(layers: list[Spec], width: int = 320) -> Spec:
    return {"width": width, "height": 240, "layer": layers}
