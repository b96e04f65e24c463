"""The ladder as a picture: each rung's loss beside the lecture's figure."""

from collections.abc import Sequence

from jaxgpt.display.charts import ACCENT, INK, QUIET, Spec, chart, label, layer, quantity
from jaxgpt.lecture.ladder import Result
from jaxgpt.lecture.view import published

LECTURE, LIMIT = "#d1661c", "#3b8048"


def ladder(results: Sequence[Result]) -> Spec:
    """A row for each rung with a loss: its name, a dot, the lecture's figure as a tick, and both as numbers.

    A figure of a larger model is pale; a dashed line marks the loss of the bigram counts.
    """
    rows = [
        {"name": result.rung.name, "about": result.rung.about, "loss": result.loss, "lecture": published(result.rung)}
        for result in results
        if result.loss is not None
    ]
    figures = [
        {"name": result.rung.name, "figure": figure, "opacity": 0.45 if result.rung.lecture_size else 1.0}
        for result in results
        if result.loss is not None
        for figure in result.rung.lecture
    ]
    grid = {"labels": False, "ticks": False, "domain": False, "grid": True}
    y = {"field": "name", "type": "nominal", "sort": [row["name"] for row in rows], "title": None, "axis": grid}
    x = quantity(
        "loss", "loss on the validation split, nats per character", {"grid": False, "tickCount": 7}, padding=20
    )

    def column(offset: float | Spec, field: str, colour: str, size: int, dy: int = 0, form: str | None = None) -> Spec:
        text = {"field": field} | ({"format": form} if form else {})
        encoding = {"x": {"value": offset}, "y": y, "text": text}
        return layer(rows, "text", encoding, align="right", baseline="middle", dy=dy, fontSize=size, color=colour)

    pale = {"field": "opacity", "type": "quantitative", "scale": None}
    layers = [
        column(-10, "name", INK, 14, -7),
        column(-10, "about", QUIET, 11, 9),
        column({"expr": "width + 60"}, "loss", ACCENT, 13, form=".3f"),
        column({"expr": "width + 150"}, "lecture", LECTURE, 13),
        layer(
            figures, "line", {"x": {**x, "field": "figure"}, "y": y, "detail": {"field": "name"}},
            color=LECTURE, strokeWidth=3,
        ),
        layer(
            figures, "tick", {"x": {**x, "field": "figure"}, "y": y, "opacity": pale},
            color=LECTURE, thickness=3, size=26,
        ),
        layer(rows, "point", {"x": x, "y": y}, filled=True, size=110, opacity=1, color=ACCENT),
    ]  # fmt: skip
    for offset, text, colour in ((60, "here", ACCENT), (150, "lecture", LECTURE)):
        place = {"value": {"expr": f"width + {offset}"}}
        layers.append(label(text, place, {"value": -14}, colour, align="right", fontSize=13, fontWeight="bold"))
    for result in results:
        if result.rung.kind == "bigram counts" and result.loss is not None:
            at_limit = {"datum": result.loss, "type": "quantitative"}
            layers.insert(4, layer([{}], "rule", {"x": at_limit}, color=LIMIT, strokeDash=[6, 4], strokeWidth=1.5))
            layers.append(label(f"bigrams, counted: {result.loss:.3f}", at_limit, {"value": -14}, LIMIT))
    for size in {result.rung.lecture_size for result in results if result.rung.lecture_size}:
        corner = {"value": {"expr": "width + 150"}}, {"value": {"expr": "height + 34"}}
        layers.append(label(f"* at {size}", *corner, LECTURE, align="right"))
    return chart(layer=layers, width=520, height={"step": 44})
