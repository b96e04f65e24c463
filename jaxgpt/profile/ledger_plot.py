"""The ledger as a picture: what each way to run a step costs first, and what a step costs then."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.display import plots
from jaxgpt.profile.ledger import JIT, STAGES
from jaxgpt.profile.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#009e73")
"""Of the stages, from the palette of Okabe and Ito (2008), which colour-blind readers tell apart."""
STEADY = "#6a6a6a"


def draw(report: Report, path: Path) -> None:
    """Bars for each variant: on the left its stages up to the first step, on the right its steady step with least and
    greatest.

    The file is written whole or not at all.

    Raises:
      UsageError: as `plots.require`.
    """
    plots.require(path)
    from matplotlib.figure import Figure

    figures, steps = report["figures"], report["steps_per_second"]
    names = list(figures)
    figure = Figure(figsize=(11, 1.7 + 0.36 * len(names)), dpi=110, layout="constrained")
    first, then = figure.subplots(1, 2, sharey=True)
    _stages(first, [figures[name]["stages"] for name in names])
    _steady(then, [[1e3 / rate for rate in steps[name]] for name in names])
    first.set_yticks(range(len(names)), names)
    first.set_ylim(len(names) - 0.4, -0.6)
    for label in first.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == JIT else "normal")
    for axes in (first, then):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle(report["tables"][0]["title"].partition(":")[0], fontsize=12)
    plots.save(figure, path)


def _stages(axes: "Axes", stages: list[dict[str, Any]]) -> None:
    left = [0.0] * len(stages)
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        widths = [each[stage]["median"] if stage in each else 0.0 for each in stages]
        axes.barh(range(len(stages)), widths, left=left, height=0.66, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        _say(axes, total, y, f"{total:.1f}")
    axes.set_xlim(0, 1.13 * max(left))
    axes.set_xlabel("seconds until the first step is done")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(STAGES), frameon=False, columnspacing=1.2)


def _steady(axes: "Axes", times: list[list[float]]) -> None:
    """A logarithmic axis: op by op and compiled lie far apart. So points, as bars from nowhere would say nothing."""
    for y, each in enumerate(times):
        low, mid, high = min(each), sorted(each)[len(each) // 2], max(each)
        axes.plot([low, high], [y, y], color=STEADY, linewidth=2.5, alpha=0.6, solid_capstyle="butt")
        axes.plot(mid, y, "o", color="black", markersize=6)
        _say(axes, high, y, f"{mid:,.0f}" if mid >= 100 else f"{mid:.3g}")
    axes.set_xscale("log")
    low, high = min(map(min, times)), max(map(max, times))
    axes.set_xlim(low / 1.3, high * (high / low) ** 0.15 * 1.2)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("ms of each step after it: median, least to greatest; logarithmic")


def _say(axes: "Axes", x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", size=9)
