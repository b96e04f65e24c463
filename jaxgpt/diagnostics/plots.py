"""Pictures of diagnoses, one of each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.diagnostics.derivatives import NoiseScale, density
from jaxgpt.diagnostics.diagnose import Attention, Curvature, Influence, Landscape, Lens
from jaxgpt.diagnostics.inside import Scores
from jaxgpt.diagnostics.view import Words
from jaxgpt.display.plots import LECTURE, LIMIT, OURS, QUIET, require, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "cividis"  # for the colour-blind as for others
COLUMNS = 64
"""Characters on a line of a text."""
SHOWN = 48
"""Tokens of a window whose attention is drawn."""


def draw(name: str, found: Any, words: Words, path: Path) -> None:
    """Draw what the diagnosis `name` found; the file is written whole or not at all.

    Raises:
      UsageError: matplotlib is missing, or the name of the file ends in no format.
    """
    require(path)
    from matplotlib.figure import Figure

    pictures: dict[str, Any] = dict(
        noise=_noise, curvature=_curvature, landscape=_landscape, influence=_influence, lens=_lens,
        attention=_attention, tokens=_tokens,
    )  # fmt: skip
    figure = Figure(dpi=90, layout="constrained")
    pictures[name](figure, found, words)
    save(figure, path)


def _noise(figure: "Figure", found: NoiseScale, words: Words) -> None:
    figure.set_size_inches(8.4, 3.3)
    left, right = figure.subplots(1, 2)
    T, B, scale, error = (
        words.config.model.block_size,
        words.config.train.batch_size,
        float(found.scale),
        float(found.standard_error),
    )
    left.hist(np.asarray(found.norms), bins=24, color=OURS, alpha=0.8)
    _label(left, "norm of a window's gradient, nats/token", "training windows")
    if found.signal <= 0:
        right.text(0.5, 0.5, "the noise drowns the gradient", ha="center", transform=right.transAxes, color=QUIET)
        return
    signal = float(np.sqrt(found.signal))
    left.axvline(signal, color=LECTURE, linewidth=2)
    left.margins(y=0.35)
    left.annotate(
        f"norm of the true\ngradient, about {signal:.2g}", (signal, 0.97), (6, 0), ("data", "axes fraction"),
        "offset points", va="top", size=9, color=LECTURE,
    )  # fmt: skip
    sizes = np.geomspace(1, max(16 * scale, 4 * B), 200)
    low, high = (1 / (1 + max(scale + sign * error, 0) / sizes) for sign in (1, -1))
    right.fill_between(sizes, low, high, color=OURS, alpha=0.2, linewidth=0)
    right.plot(sizes, 1 / (1 + scale / sizes), color=OURS, linewidth=2)
    for x, text, color in (
        (B, f"batch_size {B}", LECTURE),
        (scale, f"noise scale\n{scale:,.0f} ± {error:,.0f}", LIMIT),
    ):
        right.plot(x, 1 / (1 + scale / x), "o", color=color, zorder=3)
        right.annotate(
            text, (x, 1 / (1 + scale / x)), (-8, 6), textcoords="offset points", ha="right", size=9, color=color
        )
    right.set_xscale("log")
    right.set_ylim(0, 1)
    _label(right, f"batch size, windows of {T} tokens", "gain per step, share of the largest")


def _curvature(figure: "Figure", found: Curvature, words: Words) -> None:
    figure.set_size_inches(8.4, 3.3)
    left, right = figure.subplots(1, 2)
    values, weights = np.asarray(found.spectrum.values), np.asarray(found.spectrum.weights)
    span = (values[-1] - values[0]) or 1.0  # a loss may be flat
    at = np.linspace(values[0] - 0.2 * span, values[-1] + 0.08 * span, 500)
    heights = density(values[None], weights[None], at, span / 80)
    left.fill_between(at, heights, 1e-12, color=OURS, alpha=0.25, linewidth=0)
    left.plot(at, heights, color=OURS, linewidth=1.5)
    left.set_yscale("log")
    left.set_ylim(max(1e-9, weights[weights > 0].min() / span), 4 * heights.max())
    left.plot(values, [0.03] * len(values), "|", color=LECTURE, markersize=9, transform=left.get_xaxis_transform())
    for value, side in ((values[0], "right"), (values[-1], "center")):
        height = density(values[None], weights[None], [value], span / 80)[0]
        left.annotate(f"{value:.3g}", (value, height), (0, 4), textcoords="offset points", ha=side, color=LECTURE)
    _label(left, "eigenvalue of the Hessian, nats/token", "density of eigenvalues")
    x, middle = np.asarray(found.distances), np.asarray(found.losses)[len(found.distances) // 2]
    right.plot(
        x,
        middle + found.slope * x + 0.5 * values[-1] * x**2,
        "--",
        color=LECTURE,
        label="parabola of the greatest eigenvalue",
    )
    right.plot(x, found.losses, "o-", color=OURS, markersize=4, label="loss")
    right.legend(frameon=False, fontsize=9, loc="upper center")
    right.margins(y=0.25)
    _label(right, "distance along its eigenvector", "loss of the batch, nats/token")


def _landscape(figure: "Figure", found: Landscape, words: Words) -> None:
    figure.set_size_inches(8.4, 3.5)
    left, right = figure.subplots(1, 2)
    shades = left.contourf(found.places, found.places, found.losses, 10, cmap=COLORS)
    lines = left.contour(found.places, found.places, found.losses, 7, colors="white", linewidths=0.7)
    left.clabel(lines, fontsize=8, fmt="%.1f")
    left.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=2)
    figure.colorbar(shades, ax=left, label="loss, nats/token")
    left.set_aspect("equal")
    _label(left, "first direction, filter lengths", "second direction, filter lengths")
    right.plot(found.shares, found.path, color=OURS, linewidth=2)
    for share, text in ((0, "first\nparameters"), (1, "this\ncheckpoint")):
        y = np.interp(share, found.shares, found.path)
        right.plot(share, y, "o", color=LECTURE, zorder=3)
        right.annotate(text, (share, y), (0, 10), textcoords="offset points", ha="center", size=9, color=LECTURE)
    right.margins(y=0.2)
    _label(right, "share of the way", "loss, nats/token")


def _influence(figure: "Figure", found: Influence, words: Words) -> None:
    figure.set_size_inches(8.4, 4.2)
    axes = figure.subplots()
    products = np.asarray(found.products)
    order = np.argsort(products)[::-1]
    chosen = np.concatenate([order[:6], order[-6:]]) if len(order) > 12 else order
    signs = products[chosen] > 0
    axes.barh(range(len(chosen)), products[chosen], color=np.where(signs, OURS, LECTURE))
    axes.axvline(0, color=QUIET, linewidth=0.8)
    labels = [words.window(found.starts[i])[:48].replace("$", r"\$") for i in chosen]
    axes.set_yticks(range(len(chosen)), labels, family="monospace", size=8)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    if len(order) > 12:
        axes.axhline(5.5, color=QUIET, linewidth=0.8, linestyle=":")
    asked = words.text(words.subject.text)[: words.config.model.block_size].replace("$", r"\$")
    figure.suptitle(f"the loss of  {asked[:72]}", family="monospace", size=9, x=0.01, ha="left")
    said = "product of gradients, nats/token per unit of learning rate"
    _label(axes, f"{said}\n(blue: a step on it lowers that loss; orange: raises it)", "")


def _lens(figure: "Figure", found: Lens, words: Words) -> None:
    depths = len(found.losses)
    figure.set_size_inches(8.8, 1.6 + 0.36 * depths)
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    N = min(24, found.text.top.shape[2])
    shades = left.imshow(
        np.asarray(found.text.probability)[:, 0, :N], cmap=COLORS, vmin=0, vmax=1, aspect="auto", origin="lower"
    )
    for (depth, t), p in np.ndenumerate(np.asarray(found.text.probability)[:, 0, :N]):
        token = _cell(words.token(found.text.top[depth, 0, t]))
        left.text(
            t, depth, token, ha="center", va="center", size=9, family="monospace", color="black" if p > 0.5 else "white"
        )
    left.set_xticks(range(N), [_cell(words.token(i)) for i in words.subject.text[:N]], family="monospace")
    left.set_yticks(range(depths))
    _label(left, "token read; in each cell the likeliest next one", "blocks before the head")
    figure.colorbar(shades, ax=left, label="its probability", pad=0.01)
    right.plot(found.losses, range(depths), "o-", color=OURS)
    for depth, loss in enumerate(found.losses):
        right.annotate(
            f"{loss:.2f}", (loss, depth), (7, 0), textcoords="offset points", va="center", size=9, color=OURS
        )
    right.set_yticks(range(depths), [""] * depths)
    right.set_ylim(-0.5, depths - 0.5)
    right.set_xlim(0, 1.45 * float(np.max(found.losses)))
    _label(right, "loss, nats/token", "")


def _attention(figure: "Figure", found: Attention, words: Words) -> None:
    L, H, T = (min(n, most) for n, most in zip(np.shape(found.maps), (6, 6, SHOWN), strict=False))
    figure.set_size_inches(2.9 + 1.1 * H, 0.8 + 1.0 * L)
    left, right = figure.subplots(1, 2, width_ratios=[1.1 * H + 0.5, 2.2])
    tiles = np.full((L, T + 3, H, T + 3), np.nan)  # a map beside a map, with white between them and for the future
    past = np.tril(np.ones((T, T), bool))
    maps = np.where(past, np.asarray(found.maps)[:L, :H, :T, :T], np.nan)
    tiles[:, :T, :, :T] = maps.transpose(0, 2, 1, 3)
    tiles = tiles.reshape(L * (T + 3), H * (T + 3))
    shades = left.imshow(np.sqrt(tiles), cmap=COLORS, vmin=0, vmax=1, interpolation="nearest")
    middles = (T + 3) * np.arange(max(L, H)) + T / 2
    left.set_xticks(middles[:H], [f"head {head}" for head in range(H)])
    left.set_yticks(middles[:L], [f"block {block}" for block in range(L)])
    left.tick_params(length=0)
    bar = figure.colorbar(shades, ax=left, label="weight", pad=0.01)
    bar.set_ticks(np.sqrt([0, 0.1, 0.3, 0.6, 1]).tolist(), labels=["0", "0.1", "0.3", "0.6", "1"])
    _label(left, f"in each: token looked at, the first {T}", "in each: token that looks")
    left.spines[:].set_visible(False)
    entropies, uniform = np.asarray(found.mean.entropy), float(found.mean.uniform)
    for head in range(entropies.shape[1]):
        right.plot(entropies[:, head], range(len(entropies)), "o", color=OURS, alpha=0.7)
    right.axvline(uniform, color=LIMIT, linestyle="--")
    right.annotate(
        "no preference", (uniform, 1), (-4, -4), ("data", "axes fraction"), "offset points",
        rotation=90, ha="right", va="top", size=9, color=LIMIT,
    )  # fmt: skip
    right.set_yticks(range(len(entropies)))
    right.set_ylim(len(entropies) - 0.5, -0.5)
    right.set_xlim(0, 1.1 * uniform)
    _label(right, "entropy of a head, nats", "block")


def _tokens(figure: "Figure", found: Scores, words: Words) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    colors = colormaps["Oranges"]
    shades = ScalarMappable(Normalize(0, 6), colors)
    axes = figure.subplots()
    place = 0
    for i, token in enumerate(map(words.token, words.subject.text[: 6 * COLUMNS])):
        if place // COLUMNS >= 6:
            break
        loss = float(found.losses[i - 1]) if i else 0.0
        for char in token:
            y, x = divmod(place, COLUMNS)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colors(min(loss / 6, 1.0)), linewidth=0))
            axes.text(
                x,
                y,
                char.replace("$", r"\$"),
                ha="center",
                va="center",
                family="monospace",
                size=9,
                color="white" if loss > 4 else "black",
            )
            place += 1
    rows = -(-place // COLUMNS)
    figure.set_size_inches(8.4, 0.7 + 0.26 * rows)
    axes.set_xlim(-0.5, COLUMNS - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_axis_off()
    figure.colorbar(shades, ax=axes, label="loss, nats", extend="max", pad=0.01)


def _cell(token: str) -> str:
    """A token in a cell: its blanks to be seen, no mathematics, no more than fits."""
    return token[:6].replace(" ", "␣").replace("$", r"\$")


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, color=QUIET)
    axes.set_ylabel(y, color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color="#b0b0b0", labelcolor=QUIET)
