"""The results of diagnoses as lines of text, as JSON, and as charts of those that need more than a few lines."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxgpt.diagnostics.derivatives import NoiseScale
from jaxgpt.diagnostics.diagnose import Attention, Curvature, Influence, Landscape, Subject
from jaxgpt.diagnostics.inside import Lens, Scores
from jaxgpt.display.charts import ACCENT, MONO, WARM, Spec, category, chart, columns, layer, quantity
from jaxgpt.display.text import fixed
from jaxgpt.monitor import cost

LONGEST = 20_000
"""Most elements of an array in JSON; a larger one is written as its shape."""
SCHEME = "cividis"  # readable for the colour-blind
SHOWN, HEADS = 48, 6
"""Most tokens whose attention is drawn, and most blocks and heads."""


def noise(found: NoiseScale, subject: Subject) -> Iterator[str]:
    T, B = subject.config.model.block_size, subject.config.train.batch_size
    if found.signal <= 0 or not np.isfinite(found.standard_error):
        yield f"the noise exceeds the gradient: more than {len(found.norms)} windows are needed (--windows)"
    else:
        scale = " ± ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in (found.scale, found.standard_error))
        yield f"gradient noise scale {scale} windows of {T} tokens; trained with batches of {B}"
    yield f"squared gradient {found.signal:.3g}, summed variance over windows {found.noise:.3g} (nats/token)²"


def curvature(found: Curvature, subject: Subject) -> Iterator[str]:
    values, errors, traces = found.spectrum.values, found.spectrum.errors, found.traces
    yield (
        f"Hessian eigenvalues from {values[0]:.3g} ± {errors[0]:.1g} to {values[-1]:.3g} ± {errors[-1]:.1g}, trace "
        f"{np.mean(traces):.3g} ± {np.std(traces, ddof=1) / math.sqrt(len(traces)):.2g}, nats/token"
    )
    stable = f"; gradient descent is stable up to a learning rate of {2 / values[-1]:.2g}" if values[-1] > 0 else ""
    yield f"over {cost.n_params(subject.config.model):,} parameters{stable}"


def landscape(found: Landscape, subject: Subject) -> Iterator[str]:
    losses, (first, here) = found.losses, np.interp([0, 1], found.shares, found.path)
    middle, least = len(losses) // 2, int(np.argmin(found.path))
    edge = np.concatenate([losses[[0, -1], middle], losses[middle, [0, -1]]])
    yield f"loss {here:.3f} here, {edge.min():.3f} to {edge.max():.3f} at one filter norm along random directions"
    lowest = f"{found.path[least]:.3f}, at {found.shares[least]:.2f} of the way"
    yield f"on the line from the initial parameters, of loss {first:.3f}, the lowest loss is {lowest}"


def influence(found: Influence, subject: Subject) -> Iterator[str]:
    order, T = np.argsort(found.dots), subject.config.model.block_size
    yield f"of training windows on the loss of '{subject.show(subject.text[: T + 1])[:64]}'"
    for what, sign in (("lowered most by", 1), ("raised most by", -1)):
        for i in (i for i in order[::-sign][:3] if sign * found.dots[i] > 0):
            window = subject.show(subject.train[found.starts[i] : found.starts[i] + T + 1])
            yield f"{what:<16} {found.dots[i]:+8.3g}  '{window[:64]}'"
    if not np.any(found.dots):
        yield f"not changed by any of the {len(order)} windows (--windows)"


def lens(found: Lens, subject: Subject) -> Iterator[str]:
    yield "depth      " + "".join(f"{depth:>8}" for depth in range(len(found.losses)))
    for name, row in (("loss", found.losses), ("KL to last", found.divergence)):
        yield f"{name:<11}" + "".join(f"{x:z8.3f}" for x in row.mean(axis=(1, 2)))


def attention(found: Attention, subject: Subject) -> Iterator[str]:
    yield f"entropy in nats (uniform: {found.uniform:.2f}) and mean distance in tokens, by head"
    for block, (entropies, distances) in enumerate(zip(found.entropy, found.distance, strict=True)):
        yield f"block {block:<3} " + "  ".join(f"{e:z.2f}/{d:.0f}" for e, d in zip(entropies, distances, strict=True))


def tokens(found: Scores, subject: Subject) -> Iterator[str]:
    yield f"mean loss {fixed(found.losses.mean())} nats over {len(found.losses)} tokens; the least expected:"
    for i in np.argsort(found.losses)[::-1][:5]:
        before, token = subject.show(subject.text[max(0, i - 24) : i + 1]), subject.show(subject.text[i + 1])
        likely = zip(found.ids[i, :3], found.probabilities[i, :3], strict=True)
        instead = ", ".join(f"'{subject.show(id)}' {p:.2f}" for id, p in likely)
        yield f"{found.losses[i]:6.2f}  '{before}' -> '{token}'; likelier: {instead}"


VIEWS: dict[str, Callable[[Any, Subject], Iterator[str]]] = {
    each.__name__: each for each in (noise, curvature, landscape, influence, lens, attention, tokens)
}


def lines(name: str, found: Any, subject: Subject) -> Iterator[str]:
    """The result of a diagnosis as a few lines, the first with its name."""
    for i, line in enumerate(VIEWS[name](found, subject)):
        yield f"  {'' if i else name:<10} {line}"


def plain(value: Any) -> Any:
    """Nested results as JSON values: arrays longer than LONGEST as their shape, non-finite numbers as null."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    array = np.asarray(value)
    if array.size > LONGEST:
        return {"shape": list(array.shape)}
    whole: Any = array.astype(object)
    whole[~np.isfinite(array)] = None
    return whole.tolist()


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
        "data": {"values": columns(block=block, head=head, t=t, s=s, weight=maps[block, head, t, s])},
        "facet": facets,
        "spec": {"width": 110, "height": 110, "mark": "rect", "encoding": encoding},
        "spacing": 6,
    }


def curvature_chart(found: Curvature, subject: Subject) -> Spec:
    """The Ritz values with their weights, and the loss along the top eigenvector beside the predicted parabola."""
    values, weights = found.spectrum.values, found.spectrum.weights
    low = max(1e-8, float(weights[weights > 0].min())) / 2
    rows = columns(value=values, weight=np.maximum(weights, low), low=low)
    x = quantity("value", "eigenvalue of the Hessian, nats/token", {"grid": False, "tickCount": 7})
    axis = {"tickCount": 5, "format": "~e"}
    y = quantity("weight", "share of the spectrum", axis, type="log", domain=[low, 1], nice=False)
    sticks = [
        layer(rows, "rule", {"x": x, "y": y, "y2": {"field": "low"}}, color=ACCENT),
        layer(rows, "point", {"x": x, "y": y}, filled=True, color=ACCENT, opacity=1),
    ]
    distance, losses = found.distances, found.losses
    parabola = losses[len(losses) // 2] + found.slope * distance + 0.5 * values[-1] * distance**2
    lines = ["loss", "parabola of the largest eigenvalue"]
    curves = columns(line=np.array(lines)[:, None], distance=distance, loss=[losses, parabola])
    encoding = {
        "x": quantity("distance", "distance along its eigenvector", {"grid": False, "tickCount": 7}),
        "y": quantity("loss", "loss of the batch, nats/token"),
        "color": category("line", lines, (ACCENT, WARM), {"title": None, "labelLimit": 300}),
    }
    return chart(hconcat=[_panel(sticks), _panel([layer(curves, "line", encoding)])])


def landscape_chart(found: Landscape, subject: Subject) -> Spec:
    """The plane as a heatmap, and the line from the initial parameters."""
    cells = columns(x=found.places, y=found.places[:, None], loss=found.losses)
    x, y = (
        {"field": name, "type": "ordinal", "title": f"{order} direction, filter norms", "axis": {"format": ".2f"}}
        for name, order in (("x", "first"), ("y", "second"))
    )
    encoding = {"x": x, "y": {**y, "sort": "descending"}, "color": _shade("loss", "loss, nats/token", zero=False)}
    share = quantity("share", "share of the way from the initial parameters", {"grid": False})
    at = {"x": share, "y": quantity("loss", "loss, nats/token", padding=20)}
    line = layer(columns(share=found.shares, loss=found.path), "line", at, color=ACCENT)
    return chart(hconcat=[_panel([layer(cells, "rect", encoding)], 240), _panel([line])])


def lens_chart(found: Lens, subject: Subject) -> Spec:
    """The most likely next token after each token, by depth."""

    def labels(tokens: Any) -> list[str]:
        return [subject.show(token).replace(" ", "␣")[:6] for token in tokens]

    depths, N = len(found.losses), min(24, found.top.shape[2])
    guesses, read = [labels(tokens) for tokens in found.top[:, 0, :N]], labels(subject.text[:N])
    depth = np.arange(depths)[:, None]
    cells = columns(depth=depth, t=np.arange(N), probability=found.probability[:, 0, :N], text=guesses)
    width = max(len(label) for row in (*guesses, read) for label in row)
    axis = {"labelExpr": f"{json.dumps(read)}[datum.value]", "labelAngle": 0, "labelFont": MONO}
    x = {"field": "t", "type": "ordinal", "title": "the token read", "axis": axis}
    y = {"field": "depth", "type": "ordinal", "sort": "descending", "title": "blocks before the head"}
    ink = {"condition": {"test": "datum.probability > 0.5", "value": "black"}, "value": "white"}
    layers = [
        layer(cells, "rect", {"x": x, "y": y, "color": _shade("probability", "probability", domain=[0, 1])}),
        layer(cells, "text", {"x": x, "y": y, "text": {"field": "text"}, "color": ink}, font=MONO, fontSize=12),
    ]
    title = "the likeliest next token at each depth"
    return chart(layer=layers, title=title, width=max(26, 8 * width) * N, height=26 * depths)


def attention_chart(found: Attention, subject: Subject) -> Spec:
    T = min(SHOWN, found.maps.shape[-1])
    return chart(hconcat=[attention_maps(found.maps[:HEADS, :HEADS, :T, :T])])


CHARTS: dict[str, Callable[[Any, Subject], Spec]] = {
    "curvature": curvature_chart,
    "landscape": landscape_chart,
    "lens": lens_chart,
    "attention": attention_chart,
}


def _shade(field: str, title: str, **scale: Any) -> Spec:
    """A quantity as colour."""
    legend = {"title": title, "orient": "right", "gradientLength": 120, "format": ".3~g"}
    return {"field": field, "type": "quantitative", "scale": {"scheme": SCHEME, **scale}, "legend": legend}


def _panel(layers: list[Spec], width: int = 320) -> Spec:
    return {"width": width, "height": 240, "layer": layers}
