"""Pictures of a sweep: the loss against each setting, and the loss as it fell."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.display import plots
from jaxgpt.display.plots import COLOURS, MARKERS, QUIET, plain
from jaxgpt.sweep.grid import describe
from jaxgpt.sweep.results import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL = "validation loss, nats/token"


def draw(found: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw what there is to see of the outcomes, best first, into `folder`; the files.

    Raises:
      UsageError: as `plots.require`.
    """
    plots.require(folder / "settings.png")
    found = [outcome for outcome in found if not math.isnan(outcome.mean)]
    made = []
    names = [name for name in (found[0].setting if found else {}) if len({o.setting[name] for o in found}) > 1]
    if names:
        hyperparameters(found, names, folder / "settings.png")
        made.append(folder / "settings.png")
    if found and len(found[0].curve) > 1:
        curves(found, folder / "curves.png")
        made.append(folder / "curves.png")
    return made


def hyperparameters(found: Sequence[Outcome], names: Sequence[str], path: Path) -> None:
    """A panel for each setting: mean and standard error over seeds against its value, a line for each combination of
    the others; where these are too many for the colours, a line through the best of them, and dots for all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 4.6 * len(names), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _panel(axes, found, name)
    panels[0].set_ylabel(LABEL, color=QUIET)
    low, high = _limits([outcome.mean for outcome in found], [outcome.standard_error for outcome in found])
    panels[0].set_ylim(low, high)
    if above := sum(outcome.mean > high for outcome in found):
        panels[0].annotate(
            f"↑ {above} above", (0, 1), (6, -12), "axes fraction", "offset points", size=8.5, color=QUIET
        )
    plots.save(figure, path)


def curves(found: Sequence[Outcome], path: Path) -> None:
    """Loss by step of the best settings, as many as there are colours: the mean over seeds, and a band of its standard
    error to both sides."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    shown = found[: len(COLOURS)]
    for outcome, colour, marker in zip(shown, COLOURS, MARKERS, strict=False):
        steps, means, errors = zip(*outcome.curve, strict=True)
        axes.plot(
            steps,
            means,
            marker=marker,
            markersize=4,
            color=colour,
            label=describe(outcome.setting) or "as it is",
            linewidth=1.6,
        )
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    n = len(found[0].losses)
    over = f", mean ± standard error of {n} seeds" if n > 1 else ""
    axes.set_ylabel(LABEL, color=QUIET)
    axes.set_xlabel(f"step{over}", color=QUIET)
    plain(axes)
    if len(shown) > 1 or describe(shown[0].setting):
        title = f"the {len(shown)} best of {len(found)}" if len(found) > len(shown) else None
        figure.legend(title=title, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor=QUIET)
    plots.save(figure, path)


def _panel(axes: "Axes", found: Sequence[Outcome], name: str) -> None:
    values = sorted({outcome.setting[name] for outcome in found}, key=_order)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if numbers else i for i, value in enumerate(values)}
    lines: dict[str, list[Outcome]] = {}
    for outcome in found:
        others = {other: value for other, value in outcome.setting.items() if other != name}
        lines.setdefault(describe(others), []).append(outcome)
    if len(lines) > len(COLOURS):
        axes.plot(
            [place[o.setting[name]] for o in found], [o.mean for o in found], "o", color="#b0b0b0", markersize=3.5
        )
        best = [min((o for o in found if o.setting[name] == value), key=lambda o: o.mean) for value in values]
        lines = {"the best of the others": best}
    for (label, outcomes), colour, marker in zip(sorted(lines.items()), COLOURS, MARKERS, strict=False):
        outcomes = sorted(outcomes, key=lambda o: place[o.setting[name]])
        axes.errorbar(
            [place[o.setting[name]] for o in outcomes],
            [o.mean for o in outcomes],
            [0 if math.isnan(o.standard_error) else o.standard_error for o in outcomes],
            color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.5, label=label or None,
        )  # fmt: skip
    if not numbers:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlim(-0.4, len(values) - 0.6)
    elif values[0] > 0 and values[-1] / values[0] >= 4:
        axes.set_xscale("log")
    if numbers and len(values) <= 6:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    axes.set_xlabel(name, color=QUIET)
    plain(axes)
    if len(lines) > 1 or any(lines):
        _legend(axes)


def _order(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)


def _limits(means: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Of the y axis: all of it, unless some settings learnt so little that the others would lie on each other."""
    low = min(mean - (0 if math.isnan(error) else error) for mean, error in zip(means, errors, strict=True))
    high = max(mean + (0 if math.isnan(error) else error) for mean, error in zip(means, errors, strict=True))
    middle = sorted(means)[len(means) // 2]
    high = min(high, low + max(4 * (middle - low), 0.05))
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=QUIET)
