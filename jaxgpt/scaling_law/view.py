"""A scaling law as lines of text, and as a plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.display import plots
from jaxgpt.display.plots import COLOURS, MARKERS, QUIET, plain
from jaxgpt.scaling_law.law import FLOPS, INTERVAL, Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, int, float]
"""Parameters, tokens, loss in nats per token."""


def lines(found: Fit, points: Sequence[Point], flops: Sequence[float]) -> Iterator[str]:
    """A fit to `points`, and the best size and amount of text for budgets of FLOPs."""
    trained = [FLOPS * N * D for N, D, _ in points]
    least, most = min(trained), max(trained)
    E, A, B, a, b = found.law
    yield f"L(N, D) = {E:.3f} + {A:.3g} / N^{a:.3f} + {B:.3g} / D^{b:.3f} nats/token"
    yield f"  residuals of {found.error:.2%} (root mean square); {INTERVAL:.0%} intervals by bootstrap:"
    for name in found.law._fields:
        low, high = found.interval(lambda law, name=name: getattr(law, name))
        yield f"  {name}  {getattr(found.law, name):>8.3g}  {low:.3g} to {high:.3g}"
    if bounded := found.bounded:
        they, which = ("is at its bound", "it") if len(bounded) == 1 else ("are at their bounds", "them")
        yield f"  {' and '.join(bounded)} {they}: these runs do not determine {which}"
    yield f"best parameters and tokens for a budget of {FLOPS} N D FLOPs:"
    for budget in flops:
        N, D = found.law.optimum(budget)
        low_N, high_N = found.interval(lambda law, budget=budget: law.optimum(budget)[0])
        beyond = "" if least <= budget <= most else ", extrapolated"
        yield (
            f"  {budget:.0e}  {N:>13,.0f} parameters ({low_N:,.0f} to {high_N:,.0f}), {D:,.0f} tokens, "
            f"loss {found.law.loss(N, D):.3f}{beyond}"
        )


def draw(found: Fit, points: Sequence[Point], folder: Path) -> list[Path]:
    """Draw the law through its points into `folder`; the file.

    Raises:
      UsageError: as `plots.require`.
    """
    plots.require(folder / "law.png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.2, 4.6), dpi=110, layout="constrained")
    by_tokens, by_compute = figure.subplots(1, 2, sharey=True)
    sizes = sorted({N for N, _, _ in points})
    D = np.array([D for _, D, _ in points])
    along = np.geomspace(D.min() / 1.3, D.max() * 1.3, 100)
    for i, N in enumerate(sizes):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        mine = [(D, loss) for n, D, loss in points if n == N]
        for axes, scale in ((by_tokens, 1), (by_compute, FLOPS * N)):
            axes.plot([scale * D for D, _ in mine], [loss for _, loss in mine], marker, color=colour, markersize=6)
            axes.plot(scale * along, found.law.loss(N, along), color=colour, linewidth=1.4)
        by_tokens.plot([], [], color=colour, marker=marker, label=f"{N:,}")
    _frontier(by_compute, found, FLOPS * min(sizes) * along[0], FLOPS * max(sizes) * along[-1])
    for axes, label in ((by_tokens, "tokens D"), (by_compute, f"operations, {FLOPS} N D")):
        axes.set_xscale("log")
        axes.set_xlabel(label, color=QUIET)
        plain(axes)
    amounts = sorted(set(D.tolist()))
    if len(amounts) <= 8:
        by_tokens.set_xticks(amounts, [_short(n) for n in amounts])
        by_tokens.minorticks_off()
    by_tokens.set_ylabel("validation loss, nats/token", color=QUIET)
    figure.legend(title="parameters N", loc="outside right upper", frameon=False, labelcolor=QUIET)
    losses = [loss for _, _, loss in points]
    room = 0.06 * (max(losses) - min(losses))
    by_tokens.set_ylim(min(losses) - room, max(losses) + room)
    plots.save(figure, folder / "law.png")
    return [folder / "law.png"]


def _short(n: float) -> str:
    """A number of tokens on an axis.

    >>> _short(122_880), _short(1_536_000)
    ('123k', '1.54M')
    """
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def _frontier(axes: "Axes", found: Fit, low: float, high: float) -> None:
    """The least loss for each budget, and the band of the resampled laws."""
    budgets = np.geomspace(low, high, 60)
    each = [[law.loss(*law.optimum(budget)) for budget in budgets] for law in found.resampled]
    if each:
        band = np.quantile(each, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
        axes.fill_between(budgets, *band, color="black", alpha=0.15, linewidth=0)
    best = [found.law.loss(*found.law.optimum(budget)) for budget in budgets]
    label = f"least loss, {INTERVAL:.0%} band"
    axes.plot(budgets, best, color="black", linestyle=(0, (4, 2)), linewidth=1.8, label=label)
