"""Pictures of results, by matplotlib, which is asked for only here and only when a picture is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxgpt.config import UsageError
from jaxgpt.lecture.ladder import Result
from jaxgpt.lecture.model import Rung
from jaxgpt.lecture.view import published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, LECTURE, LIMIT, QUIET = "#1f5fa8", "#d1661c", "#3b8048", "#6a6a6a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
"""Told apart by colour-blind eyes too: Okabe and Ito 2008, with a grey in place of the yellow."""
MARKERS = "osD^vPX*"
FORMATS = (".png", ".svg", ".pdf")


def require(path: Path) -> None:
    """Check, before any work is done for it, that a plot can be drawn to `path`.

    Raises:
      UsageError: matplotlib is missing, or the name ends otherwise than in FORMATS.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("a plot needs matplotlib: pip install 'jaxgpt[plot]'") from error
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")


def ladder(results: Sequence[Result], path: Path) -> None:
    """Draw each rung's loss beside the lecture's figure, and the line of the counted bigram.

    The file is written whole or not at all.

    Raises:
      UsageError: as `require`.
    """
    require(path)
    from matplotlib.figure import Figure  # not pyplot: a figure of one's own has no global state, and draws by Agg

    shown = [(result.rung, result.loss) for result in results if result.loss is not None]
    figure = Figure(figsize=(9, 1.2 + 0.44 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    _rows(axes, [rung for rung, _ in shown])
    for y, (rung, loss) in enumerate(shown):
        if rung.kind == "bigram counts":
            _limit(axes, loss)
        _published(axes, y, rung)
        axes.plot(loss, y, "o", markersize=8, color=OURS, zorder=3)
        _beside(axes, y, f"{loss:.3f}", published(rung))
    _beside(axes, -0.85, "here", "lecture", weight="bold")
    _footnote(axes, [rung.lecture_size for rung, _ in shown if rung.lecture_size])
    save(figure, path)


def save(figure: "Figure", path: Path) -> None:
    """Draw `figure` to `path`, whole or not at all."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        figure.savefig(partial, format=path.suffix[1:])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def plain(axes: "Axes") -> None:
    """The look of a panel with two axes: a pale grid, no frame."""
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#b0b0b0")
    axes.tick_params(labelcolor=QUIET, color="#b0b0b0")


def _rows(axes: "Axes", rungs: Sequence[Rung]) -> None:
    """A row for each rung, the first on top, with its name and what it adds to the left of it."""
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set_yticks(range(len(rungs)), [""] * len(rungs))
    for y, rung in enumerate(rungs):
        for text, up, size, color in ((rung.name, 1, 11, "black"), (rung.about, -11, 8.5, QUIET)):
            axes.annotate(
                text, (0, y), (-8, up), ("axes fraction", "data"), "offset points", ha="right", size=size, color=color
            )
    axes.tick_params(length=0, labelcolor=QUIET)
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.set_xlabel("loss on the validation split, nats per character", color=QUIET)


def _limit(axes: "Axes", loss: float) -> None:
    """The line that no trained bigram is expected to pass: what counting pairs gives."""
    axes.axvline(loss, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    axes.annotate(
        f"bigrams, counted: {loss:.3f}", (loss, 1), (0, 3), ("data", "axes fraction"), "offset points",
        ha="center", size=9, color=LIMIT,
    )  # fmt: skip


def _published(axes: "Axes", y: int, rung: Rung) -> None:
    """The lecture's figure as an upright stroke, or its range as two strokes and a bar; pale for a larger model."""
    if rung.lecture:
        alpha = 0.45 if rung.lecture_size else 1.0
        axes.plot(rung.lecture, [y] * len(rung.lecture), color=LECTURE, linewidth=3, alpha=alpha, zorder=2)
        axes.plot(
            rung.lecture, [y] * len(rung.lecture), "|", markersize=20, markeredgewidth=2.5, color=LECTURE, alpha=alpha
        )


def _beside(axes: "Axes", y: float, ours: str, lecture: str, weight: str = "normal") -> None:
    """Our figure and the lecture's, to the right of row `y`."""
    for text, right, color in ((ours, 48, OURS), (lecture, 125, LECTURE)):
        axes.annotate(
            text, (1, y), (right, 0), ("axes fraction", "data"), "offset points",
            ha="right", va="center", color=color, weight=weight,
        )  # fmt: skip


def _footnote(axes: "Axes", sizes: Sequence[str]) -> None:
    for size in sizes:
        axes.annotate(
            f"* at {size}", (1, 0), (125, -28), "axes fraction", "offset points", ha="right", size=8.5, color=LECTURE
        )
