"""A scaling law as lines of text, and as a chart with its runs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.display.charts import INK, PALETTE, Spec, category, chart, columns, layer, quantity
from jaxgpt.scaling_law.law import FLOPS, HIGH, INTERVAL, LOW, Fit, Law, Point


def lines(fit: Fit, points: Sequence[Point], flops: Sequence[float]) -> Iterator[str]:
    """The fit to `points`, and the best parameters and tokens for budgets of FLOPs."""
    sizes, amounts, _ = zip(*points, strict=True)
    trained = [FLOPS * N * D for N, D, _ in points]
    E, A, B, a, b = fit.law
    yield f"L(N, D) = {E:.3f} + {A:.3g} / N^{a:.3f} + {B:.3g} / D^{b:.3f} nats/token"
    bounded = [name for name, x in (("a", a), ("b", b)) if min(x - LOW[-1], HIGH[-1] - x) < 1e-3]
    bounded += ["E"] * (math.log(E) - LOW[0] < 1e-3)
    yield f"  residuals of {fit.error:.2%} (root mean square); {INTERVAL:.0%} intervals by bootstrap:"
    for name, value, low, high in zip(Law._fields, fit.law, *fit.interval(lambda law: law), strict=True):
        note = ", at a bound of the fit: these runs do not determine it" * (name in bounded)
        yield f"  {name}  {value:>8.3g}  {low:.3g} to {high:.3g}{note}"
    yield f"best parameters and tokens for a budget of {FLOPS} N D FLOPs:"
    for budget in flops:
        N, D = fit.law.optimum(budget)
        low, high = fit.interval(lambda law: law.optimum(budget)[0])  # noqa: B023
        beyond = ""
        if not min(trained) <= budget <= max(trained):
            beyond = ", extrapolated"
        elif not (min(sizes) <= N <= max(sizes) and min(amounts) <= D <= max(amounts)):
            beyond = ", beyond the sizes or tokens of the runs"
        yield (
            f"  {budget:g}  {N:>13,.0f} parameters ({low:,.0f} to {high:,.0f}), {D:,.0f} tokens, "
            f"loss {fit.law.loss(N, D):.3f}{beyond}"
        )


def law_chart(fit: Fit, points: Sequence[Point]) -> Spec:
    """Loss against FLOPs: a curve for each size, and the least loss for each budget with its interval as a band."""
    N, D, losses = (np.array(each) for each in zip(*points, strict=True))
    sizes, room = sorted(set(N.tolist())), 0.06 * (losses.max() - losses.min())
    along = np.geomspace(D.min() / 1.3, D.max() * 1.3, 100)
    ends = FLOPS * sizes[0] * along[0], FLOPS * sizes[-1] * along[-1]
    budgets = np.geomspace(*ends, 60)

    def least(law: Law) -> Any:
        return law.loss(*law.optimum(budgets))

    curves = [row for n in sizes for row in columns(N=f"{n:,}", flops=FLOPS * n * along, loss=fit.law.loss(n, along))]
    measured = columns(N=[f"{n:,}" for n in N], flops=FLOPS * N * D, loss=losses)
    low, high = fit.interval(least)
    band = columns(flops=budgets, best=least(fit.law), loss=low, high=high)
    x = quantity("flops", f"FLOPs, {FLOPS} N D", {"tickCount": 5, "format": ".0~e"}, type="log", nice=False)
    domain = [float(losses.min() - room), float(losses.max() + room)]
    y = quantity("loss", "validation loss, nats/token", domain=domain, nice=False)
    color = category("N", [f"{n:,}" for n in sizes], PALETTE, {"title": "parameters N", "orient": "right"})
    text = f"dashed: least loss for a budget, with its {INTERVAL:.0%} band"
    layers = [
        layer(curves, "line", {"x": x, "y": y, "color": color}, clip=True, strokeWidth=1.6),
        layer(measured, "point", {"x": x, "y": y, "color": color}, filled=True, size=60, opacity=1),
        layer(band, "area", {"x": x, "y": y, "y2": {"field": "high"}}, color=INK, opacity=0.15, clip=True),
        layer(band, "line", {"x": x, "y": {**y, "field": "best"}}, color=INK, strokeDash=[6, 3], clip=True),
    ]
    return chart(layer=layers, title=text, width=480, height=340)
