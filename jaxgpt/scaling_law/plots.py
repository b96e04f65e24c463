"""The scaling law as a chart: its curves through the runs, by tokens and by compute."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
    amounts = sorted(set(D.tolist()))
    axis = {"values": amounts, "labelOverlap": False} if len(amounts) <= 8 else {"tickCount": 6}

    def panel(x: Spec, y: Spec) -> Spec:
        encoding = {"x": x, "y": y, "color": color}
        lines = layer(curves, "line", encoding, clip=True, strokeWidth=1.6)
        dots = layer(measured, "point", {**encoding, "shape": shape}, filled=True, size=60, opacity=1)
        return {"width": 400, "height": 340, "layer": [lines, dots]}

    by_tokens = panel(quantity("tokens", "tokens D", {"format": ".3~s", **axis}, type="log", nice=False), y)
    low, high = FLOPS * sizes[0] * along[0], FLOPS * sizes[-1] * along[-1]
    x = quantity("flops", f"FLOPs, {FLOPS} N D", {"values": ticks(low, high), "format": ".0~e"}, type="log", nice=False)
    by_compute = panel(x, {**y, "title": None})
    by_compute["layer"] += _frontier(found, low, high, x, y)
    return chart(hconcat=[by_tokens, by_compute])


def _frontier(found: Fit, low: float, high: float, x: Spec, y: Spec) -> list[Spec]:
    """The least loss for each budget between `low` and `high` FLOPs, and the band of the resampled laws."""
    budgets, y = np.geomspace(low, high, 60), {**y, "title": None}
    laws = [found.law, *found.resampled]
    best, *others = np.array([[law.loss(*law.optimum(budget)) for budget in budgets] for law in laws])
    layers = [
        layer(columns(flops=budgets, loss=best), "line", {"x": x, "y": y}, color=INK, strokeDash=[6, 3], clip=True)
    ]
    if others:
        ends = np.quantile(others, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
        band = columns(flops=budgets, loss=ends[0], high=ends[1])
        layers.insert(
            0, layer(band, "area", {"x": x, "y": y, "y2": {"field": "high"}}, color=INK, opacity=0.15, clip=True)
        )
    text = f"dashed: least loss for a budget, with its {INTERVAL:.0%} band"
    return [*layers, label(text, {"value": 400}, {"value": 6}, QUIET, align="right")]
