"""The scaling law as a chart: its curves through the runs, by tokens and by compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.display import charts
from jaxgpt.display.charts import (
    INK,
    PALETTE,
    QUIET,
    SHAPES,
    Spec,
    category,
    chart,
    columns,
    label,
    layer,
    quantity,
    ticks,
)
from jaxgpt.scaling_law.law import FLOPS, INTERVAL, Fit


def draw(found: Fit, points: Sequence[tuple[int, int, float]], folder: Path) -> list[Path]:
    """Draw the law into `folder`; the file. `points` are (parameters, tokens, loss in nats per token).

    Raises:
      UsageError: as `charts.save`.
    """
    charts.save(law(found, points), folder / "law.png")
    return [folder / "law.png"]


def law(found: Fit, points: Sequence[tuple[int, int, float]]) -> Spec:
    """Loss against tokens and against FLOPs: a curve for each size, and the least loss for each budget as a band."""
    N, D, losses = (np.array(each) for each in zip(*points, strict=True))
    sizes, room = sorted(set(N.tolist())), 0.06 * (losses.max() - losses.min())
    along = np.geomspace(D.min() / 1.3, D.max() * 1.3, 100)
    names = [f"{n:,}" for n in sizes]
    legend = {"title": "parameters N", "orient": "right"}
    color, shape = category("N", names, PALETTE, legend), category("N", names, SHAPES, legend)
    domain = [float(losses.min() - room), float(losses.max() + room)]
    y = quantity("loss", "validation loss, nats/token", domain=domain, nice=False)
    measured = columns(N=[f"{n:,}" for n in N], tokens=D, flops=FLOPS * N * D, loss=losses)
    curves = [
        row
        for n in sizes
        for row in columns(N=f"{n:,}", tokens=along, flops=FLOPS * n * along, loss=found.law.loss(n, along))
    ]
    low, high = FLOPS * sizes[0] * along[0], FLOPS * sizes[-1] * along[-1]
    tokens = quantity("tokens", "tokens D", {"format": ".3~s", "tickCount": 6}, type="log", nice=False)
    axis = {"values": ticks(low, high), "format": ".0~e"}
    flops = quantity("flops", f"FLOPs, {FLOPS} N D", axis, type="log", nice=False)
    panels: list[Spec] = []
    for x in (tokens, flops):
        encoding = {"x": x, "y": {**y, "title": None if panels else y["title"]}, "color": color}
        lines = layer(curves, "line", encoding, clip=True, strokeWidth=1.6)
        dots = layer(measured, "point", {**encoding, "shape": shape}, filled=True, size=60, opacity=1)
        panels.append({"width": 400, "height": 340, "layer": [lines, dots]})
    panels[1]["layer"] += _frontier(found, np.geomspace(low, high, 60), flops, {**y, "title": None})
    return chart(hconcat=panels)


def _frontier(found: Fit, budgets: NDArray[Any], x: Spec, y: Spec) -> list[Spec]:
    """The least loss for each budget of FLOPs, and the band of the resampled laws."""
    best, *others = (np.array([law.loss(*law.optimum(b)) for b in budgets]) for law in (found.law, *found.resampled))
    low, high = np.quantile(others or [best], [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
    band, at = columns(flops=budgets, best=best, loss=low, high=high), {"x": x, "y": y}
    text = f"dashed: least loss for a budget, with its {INTERVAL:.0%} band"
    return [
        layer(band, "area", {**at, "y2": {"field": "high"}}, color=INK, opacity=0.15, clip=True),
        layer(band, "line", {"x": x, "y": {**y, "field": "best"}}, color=INK, strokeDash=[6, 3], clip=True),
        label(text, {"value": 400}, {"value": 6}, QUIET, align="right"),
    ]
