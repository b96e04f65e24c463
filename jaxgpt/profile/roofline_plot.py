"""The roofline as a picture: how fast each part runs, under what this machine can do at most."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.display import plots
from jaxgpt.profile.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#b87d00", "#009e73", "#b0568a", "#2f8fc4", "#d55e00", "#6a6a6a", "#000000")
"""After the palette of Okabe and Ito (2008), for colour-blind readers, dark enough for white figures; each part has a
number too."""


def draw(report: Report, path: Path) -> None:
    """Each part's rate against its operations per byte: circles forward, squares with the backward pass, numbered as in
    the legend; the roof above them.

    The file is written whole or not at all.

    Raises:
      UsageError: as `plots.require`.
    """
    plots.require(path)
    from matplotlib.figure import Figure

    found, title = report["roofline"], report["mode"].removeprefix("inspecting ")
    peak, bandwidth, works = found["peak_flops"], found["bandwidth"], found["works"]
    figure = Figure(figsize=(10.5, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    points = [(work["flops"] / work["bytes"], work["flops"] / work["seconds"] / 1e9) for work in works]
    ridge, top = peak / bandwidth, peak / 1e9
    low, high = min(ridge / 10, *(x for x, _ in points)) / 1.6, max(ridge * 10, *(x for x, _ in points)) * 1.6
    axes.plot([low, ridge, high], [low / ridge * top, top, top], color="black", linewidth=1.6)
    axes.axvline(ridge, color="#b0b0b0", linestyle=(0, (4, 3)), linewidth=1)
    _say(axes, high, top, f"products: {top:,.0f} GFLOP/s", (-2, 5), "right", "bottom")
    _say(axes, low * 1.4, low * 1.4 / ridge * top, f"memory: {bandwidth / 1e9:.1f} GB/s", (8, -4), "left", "top")
    _say(axes, ridge, min(low / ridge * top, *(y for _, y in points)), f"ridge: {ridge:.1f}", (4, 0), "left", "bottom")
    parts = list(dict.fromkeys(work["part"] for work in works))
    for work, (x, y) in zip(works, points, strict=True):
        n = parts.index(work["part"])
        colour, first = COLOURS[n % len(COLOURS)], not work["training"] or work["part"] == "optimizer"
        face, ink = ("white", colour) if work["training"] else (colour, "white")
        axes.plot(
            x, y, "s" if work["training"] else "o", markersize=12, markerfacecolor=face, markeredgecolor=colour,
            markeredgewidth=1.5, linestyle="", label=f"{n + 1}  {work['part']}" if first else None,
        )  # fmt: skip
        axes.annotate(str(n + 1), (x, y), ha="center", va="center_baseline", size=8, color=ink, weight="bold")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("operations per byte that is moved at least (FLOP/byte)")
    axes.set_ylabel("billions of operations per second (GFLOP/s)")
    axes.grid(which="major", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}: circles forward, squares with the backward pass", fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    plots.save(figure, path)


def _say(axes: "Axes", x: float, y: float, text: str, by: tuple[int, int], ha: str, va: str) -> None:
    axes.annotate(text, (x, y), by, textcoords="offset points", ha=ha, va=va, size=9, color="#404040")
