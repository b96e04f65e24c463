"""Charts of the diagnoses, one of each."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.diagnostics.derivatives import NoiseScale, density
from jaxgpt.diagnostics.diagnose import Attention, Curvature, Influence, Landscape, Lens
from jaxgpt.diagnostics.inside import Scores
from jaxgpt.diagnostics.view import Words
from jaxgpt.display import charts
from jaxgpt.display.charts import ACCENT, MONO, QUIET, Spec, chart, columns, label, layer, quantity, ticks
from jaxgpt.display.text import spaced

APART = {"legend": {"color": "independent"}}
"""Each panel has its own legend."""
SECOND, THIRD = "#d1661c", "#3b8048"
SCHEME = "cividis"  # for the colour-blind as for others
COLUMNS, LINES = 64, 6
"""Characters on a line of a text, and lines."""
SHOWN, HEADS = 48, 6
"""Tokens of a window whose attention is drawn, at most, and blocks and heads."""
DASHED = [6, 4]


def draw(name: str, found: Any, words: Words, path: Path) -> None:
    """Draw what the diagnosis `name` found.

    Raises:
      UsageError: as `charts.save`.
    """
    specs: dict[str, Any] = dict(
        noise=_noise, curvature=_curvature, landscape=_landscape, influence=_influence, lens=_lens,
        attention=_attention, tokens=_tokens,
    )  # fmt: skip
    charts.save(specs[name](found, words), path)


def attention_maps(maps: Any) -> Spec:
    """A map for each block and head of weights (L, H, T, T): rows attend to columns."""
    block, head, t, s = np.nonzero(np.broadcast_to(np.tril(np.ones(maps.shape[2:])), maps.shape))
    blank = {"labels": False, "ticks": False, "grid": False, "domain": False}
    x, y = ({"field": name, "type": "ordinal", "axis": blank, "title": None} for name in ("s", "t"))
    scale = {"type": "sqrt", "domain": [0, 1], "scheme": SCHEME}
    color = {
        "field": "weight",
        "type": "quantitative",
        "scale": scale,
        "legend": {"title": "weight", "orient": "right"},
    }
    header = {"title": None, "labelFontSize": 12}
    weight = np.asarray(maps)[block, head, t, s].round(3)
    return {
        "data": {"values": columns(block=block, head=head, t=t, s=s, weight=weight)},
        "facet": {
            "row": {"field": "block", "type": "ordinal", "header": {**header, "labelExpr": "'block ' + datum.value"}},
            "column": {"field": "head", "type": "ordinal", "header": {**header, "labelExpr": "'head ' + datum.value"}},
        },
        "spec": {"width": 110, "height": 110, "mark": "rect", "encoding": {"x": x, "y": y, "color": color}},
        "spacing": 6,
    }  # fmt: skip


def _noise(found: NoiseScale, words: Words) -> Spec:
    T, B = words.config.model.block_size, words.config.train.batch_size
    scale, error = float(found.scale), float(found.standard_error)
    counts, edges = np.histogram(np.asarray(found.norms), 24)
    bins = columns(begin=edges[:-1], end=edges[1:], count=counts)
    x = quantity("begin", "norm of a window's gradient, nats/token", {"grid": False, "tickCount": 7})
    y = quantity("count", "training windows", zero=True)
    x["bin"] = "binned"
    left = [layer(bins, "bar", {"x": x, "x2": {"field": "end"}, "y": y}, color=ACCENT, opacity=0.8, binSpacing=0)]
    if found.signal <= 0:
        left.append(label("the noise drowns the gradient", {"value": 150}, {"value": -8}))
        return chart(hconcat=[_panel(left)])
    signal = float(np.sqrt(found.signal))
    at = {"datum": signal, "type": "quantitative"}
    left.append(layer([{}], "rule", {"x": at}, color=SECOND, strokeWidth=2))
    left.append(
        label(
            f"norm of the true gradient, about {signal:.2g}", at, {"value": -8}, SECOND, align="left", baseline="bottom"
        )
    )
    sizes = np.geomspace(1, max(16 * scale, 4 * B), 200)
    low, high, gain = (1 / (1 + max(scale + sign * error, 0) / sizes) for sign in (1, -1, 0))
    axis = {"values": ticks(1, sizes[-1]), "format": ",d"}
    x = quantity("size", f"batch size, windows of {T} tokens", axis, type="log", nice=False)
    y = quantity("gain", "gain per step, share of the largest", domain=[0, 1])
    band, right = columns(size=sizes, gain=gain, low=low, high=high), list[Spec]()
    right.append(layer(band, "area", {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}, opacity=0.2))
    right.append(layer(band, "line", {"x": x, "y": y}, color=ACCENT))
    place, text = {"align": "right", "dx": -8, "dy": -16}, f"noise scale\n{scale:,.0f} ± {error:,.0f}"
    right += _mark(x, y, (B, 1 / (1 + scale / B)), f"batch_size {B}", SECOND, **place)
    right += _mark(x, y, (scale, 0.5), text, THIRD, **place)
    return chart(hconcat=[_panel(left), _panel(right)])


def _curvature(found: Curvature, words: Words) -> Spec:
    values, weights = np.asarray(found.spectrum.values), np.asarray(found.spectrum.weights)
    span = (values[-1] - values[0]) or 1.0  # a loss may be flat
    at = np.linspace(values[0] - 0.2 * span, values[-1] + 0.08 * span, 400)
    heights = density(values[None], weights[None], at, span / 80)
    low, high = max(1e-9, weights[weights > 0].min() / span), 4 * heights.max()
    x = quantity("value", "eigenvalue of the Hessian, nats/token", {"grid": False, "tickCount": 7})
    axis = {"values": ticks(low, high), "format": "~e"}
    y = quantity("density", "density of eigenvalues", axis, type="log", domain=[float(low), float(high)], nice=False)
    curve = columns(value=at, density=np.maximum(heights, low), low=low)
    ends = [values[0], values[-1]]
    tops = columns(value=ends, density=density(values[None], weights[None], ends, span / 80).clip(low))
    text = {"field": "value", "type": "quantitative", "format": ".3~g"}
    left = [
        layer(curve, "area", {"x": x, "y": y, "y2": {"field": "low"}}, color=ACCENT, opacity=0.25),
        layer(curve, "line", {"x": x, "y": y}, color=ACCENT, strokeWidth=1.5),
        layer(columns(value=values), "tick", {"x": x, "y": {"value": 232}}, color=SECOND, size=10),
        layer(tops, "text", {"x": x, "y": y, "text": text}, dy=-10, color=SECOND),
    ]
    distance, losses = np.asarray(found.distances), np.asarray(found.losses)
    parabola = losses[len(losses) // 2] + found.slope * distance + 0.5 * values[-1] * distance**2
    x = quantity("distance", "distance along its eigenvector", {"grid": False, "tickCount": 7})
    y = quantity("loss", "loss of the batch, nats/token")
    names, rows = ["loss", "parabola of the greatest eigenvalue"], list[Spec]()
    for name, line in zip(names, (losses, parabola), strict=True):
        rows += columns(line=name, distance=distance, loss=line)
    encoding = {
        "x": x,
        "y": y,
        "color": charts.category(
            "line", names, (ACCENT, SECOND), {"title": None, "labelLimit": 300, "symbolType": "stroke"}
        ),
    }
    dash = {**charts.category("line", names, ([1, 0], DASHED)), "legend": None}
    right = [layer(rows, "line", {**encoding, "strokeDash": dash})]
    right.append(layer(rows[: len(losses)], "point", encoding, filled=True, size=30, opacity=1))
    return chart(hconcat=[_panel(left), _panel(right)], resolve=APART)


def _landscape(found: Landscape, words: Words) -> Spec:
    places = np.asarray(found.places)
    ys, xs = np.meshgrid(places, places, indexing="ij")
    half = (places[1] - places[0]) / 2
    cells = columns(x=xs - half, right=xs + half, y=ys - half, top=ys + half, loss=np.asarray(found.losses))
    bounds = [float(places[0] - half), float(places[-1] + half)]
    x, y = (
        quantity(name, f"{order} direction, filter lengths", {"grid": False}, domain=bounds, nice=False)
        for name, order in (("x", "first"), ("y", "second"))
    )
    legend = {"title": "loss, nats/token", "orient": "right", "gradientLength": 200}
    color = {"field": "loss", "type": "quantitative", "scale": {"scheme": SCHEME, "zero": False}, "legend": legend}
    origin = {"x": {"datum": 0}, "y": {"datum": 0}}
    left = [
        layer(cells, "rect", {"x": x, "x2": {"field": "right"}, "y": y, "y2": {"field": "top"}, "color": color}),
        layer([{}], "point", origin, shape="cross", color="white", filled=True, size=90, opacity=1),
    ]
    x = quantity("share", "share of the way", {"grid": False})
    y = quantity("loss", "loss, nats/token", padding=20)
    right = [layer(columns(share=found.shares, loss=found.path), "line", {"x": x, "y": y}, color=ACCENT)]
    first, here = (float(np.interp(share, found.shares, found.path)) for share in (0, 1))
    right += _mark(x, y, (0, first), "first parameters", SECOND, align="left", dx=10)
    right += _mark(x, y, (1, here), "this checkpoint", SECOND, dy=-14)
    return chart(hconcat=[_panel(left, 240), _panel(right)], resolve=APART)


def _influence(found: Influence, words: Words) -> Spec:
    products = np.asarray(found.products)
    order = np.argsort(products)[::-1]
    chosen = np.concatenate([order[:6], order[-6:]]) if len(order) > 12 else order
    rows = columns(row=np.arange(len(chosen)), product=products[chosen])
    for row, i in zip(rows, chosen, strict=True):
        row["window"] = words.window(found.starts[i])[:48]
    x = quantity("product", "product of gradients, nats/token per unit of learning rate", {"grid": False}, zero=True)
    y = {"field": "row", "type": "ordinal", "axis": None}
    sign = {"condition": {"test": "datum.product > 0", "value": ACCENT}, "value": SECOND}
    names = {"x": {"value": -8}, "y": y, "text": {"field": "window"}}
    layers = [
        layer(rows, "bar", {"x": x, "y": y, "color": sign}),
        layer([{}], "rule", {"x": {"datum": 0}}, color=QUIET),
        layer(rows, "text", names, align="right", font=MONO, fontSize=11),
    ]
    if len(order) > 12:
        layers.append(layer([{}], "rule", {"y": {"value": 6 * 22}}, color=QUIET, strokeDash=[2, 3]))
    text = words.text(words.subject.text[: words.config.model.block_size])[:72]
    about = "blue: a step on this window of training text lowers that loss; orange: raises it"
    title = {"text": f"the loss of  {text}", "font": MONO, "fontSize": 12, "subtitle": about, "subtitleColor": QUIET}
    return chart(layer=layers, title=title, width=420, height={"step": 22})


def _lens(found: Lens, words: Words) -> Spec:
    depths, N = len(found.losses), min(24, found.text.top.shape[2])
    depth, t = np.divmod(np.arange(depths * N), N)
    cells = columns(depth=depth, t=t, probability=np.asarray(found.text.probability)[depth, 0, t])
    for cell in cells:
        cell["top"] = spaced(words.token(found.text.top[cell["depth"], 0, cell["t"]]))[:6]
    read = [{"t": i, "token": spaced(words.token(token))[:6]} for i, token in enumerate(words.subject.text[:N])]
    x: Spec = {"field": "t", "type": "ordinal", "title": None, "axis": None}
    y: Spec = {"field": "depth", "type": "ordinal", "sort": "descending", "title": "blocks before the head"}
    legend = {"title": "its probability", "orient": "right", "gradientLength": 120}
    scale = {"domain": [0, 1], "scheme": SCHEME}
    ink = {"condition": {"test": "datum.probability > 0.5", "value": "black"}, "value": "white"}
    color = {"field": "probability", "type": "quantitative", "scale": scale, "legend": legend}
    left = [
        layer(cells, "rect", {"x": x, "y": y, "color": color}),
        layer(cells, "text", {"x": x, "y": y, "text": {"field": "top"}, "color": ink}, font=MONO),
        layer(
            read, "text", {"x": x, "y": {"value": 26 * depths + 12}, "text": {"field": "token"}}, font=MONO, fontSize=12
        ),
        label("token read; in each cell the likeliest next one", {"value": 13 * N}, {"value": 26 * depths + 32}),
    ]
    rows = columns(depth=np.arange(depths), loss=found.losses)
    x = quantity(
        "loss", "loss, nats/token", {"grid": False, "tickCount": 4}, domain=[0, 1.45 * float(np.max(found.losses))]
    )
    y = {**y, "axis": {"labels": False, "ticks": False}, "title": None}
    text = {"field": "loss", "type": "quantitative", "format": ".2f"}
    right = [
        layer(rows, "line", {"x": x, "y": y}, color=ACCENT, point={"color": ACCENT}, orient="vertical"),
        layer(rows, "text", {"x": x, "y": y, "text": text}, align="left", dx=8, color=ACCENT),
    ]
    height = 26 * depths
    panels = [{**_panel(left, 26 * N), "height": height}, {**_panel(right, 150), "height": height}]
    return chart(hconcat=panels, resolve=APART)


def _attention(found: Attention, words: Words) -> Spec:
    T = min(SHOWN, found.maps.shape[-1])
    maps = attention_maps(np.asarray(found.maps)[:HEADS, :HEADS, :T, :T])
    maps["title"] = {"text": f"from each token (row) to those before it (column), the first {T}", "fontSize": 12}
    entropies, uniform = np.asarray(found.mean.entropy), float(found.mean.uniform)
    block = np.arange(entropies.size) // entropies.shape[1]
    x = quantity("entropy", "entropy of a head, nats", {"grid": False, "tickCount": 5}, domain=[0, 1.1 * uniform])
    y = {"field": "block", "type": "ordinal", "title": "block", "axis": {"grid": True}}
    at = {"datum": uniform, "type": "quantitative"}
    dots = columns(entropy=entropies.ravel(), block=block)
    layers = [
        layer(dots, "point", {"x": x, "y": y}, filled=True, size=60, opacity=0.7, color=ACCENT),
        layer([{}], "rule", {"x": at}, color=THIRD, strokeDash=DASHED),
        label("no preference", at, {"value": -8}, THIRD),
    ]
    return chart(hconcat=[maps, {"width": 220, "height": {"step": 44}, "layer": layers}], spacing=30, resolve=APART)


def _tokens(found: Scores, words: Words) -> Spec:
    rows: list[Spec] = []
    for i, token in enumerate(map(words.token, words.subject.text[: LINES * COLUMNS])):
        loss = round(float(found.losses[i - 1]), 3) if i else 0.0
        rows += [{"char": char, "loss": loss} for char in token]
    rows = rows[: LINES * COLUMNS]
    for place, row in enumerate(rows):
        row["y"], row["x"] = divmod(place, COLUMNS)
    x, y = ({"field": name, "type": "ordinal", "axis": None, "scale": {"padding": 0}} for name in ("x", "y"))
    ink = {"condition": {"test": "datum.loss > 4", "value": "white"}, "value": "black"}
    legend = {"title": "loss, nats", "orient": "right", "gradientLength": 110}
    scale = {"domain": [0, 6], "scheme": "oranges", "clamp": True}
    color = {"field": "loss", "type": "quantitative", "scale": scale, "legend": legend}
    layers = [
        layer(rows, "rect", {"x": x, "y": y, "color": color}),
        layer(rows, "text", {"x": x, "y": y, "text": {"field": "char"}, "color": ink}, font=MONO, fontSize=12),
    ]
    return chart(layer=layers, width={"step": 11}, height={"step": 24})


def _panel(layers: list[Spec], width: int = 320) -> Spec:
    return {"width": width, "height": 240, "layer": layers}


def _mark(x: Spec, y: Spec, at: tuple[float, float], text: str, colour: str, **place: Any) -> list[Spec]:
    """A dot with a text beside it."""
    row = columns(**{x["field"]: at[0], y["field"]: at[1]})
    dot = layer(row, "point", {"x": x, "y": y}, filled=True, size=70, opacity=1, color=colour)
    return [dot, layer(row, "text", {"x": x, "y": y}, text=text.split("\n"), color=colour, fontSize=11, **place)]
