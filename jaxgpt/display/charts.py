"""Charts as Vega-Lite specifications in plain values; vl-convert draws them as PNG, SVG or PDF without a browser."""

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files
from jaxgpt.config import MissingExtraError, UsageError

VERSION = "6.4"
"""Version of Vega-Lite, as vl-convert names it."""
FORMATS = (".png", ".svg", ".pdf", ".json")
COLOURS = {"ink": "#1d2129", "quiet": "#5c6370", "line": "#e3e6ea", "accent": "#1f5fa8", "warm": "#b3471b"} | {
    f"series-{i}": value for i, value in enumerate(("#1f5fa8", "#b3471b", "#2e7d4f", "#7a4fa3", "#8a6d1a", "#a23b5f"))
}
"""Colours by name. In a page the names are CSS variables, which follow its theme; files use these, the light theme."""
INK, QUIET, LINE, ACCENT, WARM = (f"var(--{name})" for name in ("ink", "quiet", "line", "accent", "warm"))
SERIES = [f"var(--series-{i})" for i in range(6)]
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
"""Distinguishable for colour-blind readers (Okabe and Ito 2008, with grey in place of yellow)."""
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left")
MONO = "ui-monospace, 'DejaVu Sans Mono', monospace"

Spec = dict[str, Any]
"""A Vega-Lite specification, or a part of one."""
CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **{f"{name}Color": QUIET for name in ("label", "title")},
        **{f"{name}Color": LINE for name in ("grid", "domain", "tick")},
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 400,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": INK,
        "titleColor": QUIET,
        "titleFontWeight": 400,
        "labelFontSize": 13,
        "orient": "top",
        "symbolOpacity": 1,
    },
    "header": {"labelColor": QUIET, "titleColor": QUIET},
    "title": {"color": INK, "fontSize": 13, "fontWeight": 400, "anchor": "start"},
}


def chart(**parts: Any) -> Spec:
    """A whole specification; without a width, and of one panel, it fills the width that it is given."""
    fluid = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        **({} if parts.keys() & {"width", "hconcat"} else fluid),
        **parts,
        "config": CONFIG | parts.get("config", {}),
    }


def columns(**values: Any) -> list[Spec]:
    """Rows from equally long columns; scalars repeat. Floats are rounded to 6 digits, non-finite ones become None."""
    arrays = np.broadcast_arrays(*(np.asarray(each) for each in values.values()))
    return [dict(zip(values, map(_plain, row), strict=True)) for row in zip(*map(np.ravel, arrays), strict=True)]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def layer(rows: list[Spec], mark: str, encoding: Spec, **properties: Any) -> Spec:
    """One mark over its own rows."""
    return {"data": {"values": rows}, "mark": {"type": mark, **properties}, "encoding": encoding}


def quantity(field: str, title: str | None = None, axis: Spec | None = None, **scale: Any) -> Spec:
    """A quantitative channel; unless `zero` is given, its scale need not start at zero."""
    scale = {"zero": False, **scale}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis or {}}


def ticks(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis, few of them.

    >>> ticks(0.6, 4.2), ticks(0.01, 900)
    ([1.0, 2.0], [0.01, 0.1, 1.0, 10.0, 100.0])
    """
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    parts = (1, 2, 5) if high < 100 * low else (1,)
    return [n * power for power in powers for n in parts if low <= n * power <= high]


def category(field: str, names: list[str], values: Any, legend: Spec | None = None) -> Spec:
    """A nominal channel that shows each of `names` by the value in the same place."""
    scale = {"domain": names, "range": [values[i % len(values)] for i in range(len(names))]}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def label(text: str, x: Spec, y: Spec, colour: str = QUIET, **properties: Any) -> Spec:
    """One text at a place: channels such as {"datum": 3} in units of the axis, or {"value": 10} in pixels."""
    encoding = {"x": x, "y": y}
    return layer([{}], "text", encoding, text=text.split("\n"), color=colour, **{"fontSize": 11, **properties})


def dots(rows: list[Spec], kinds: list[str], title: str) -> Spec:
    """A line of dots for each name, in the order of `rows`: dicts of what, loss and kind, one of at most three `kinds`,
    and optionally low and high, the ends of an error bar. The first loss of each name stands at the right."""
    names = list(dict.fromkeys(row["what"] for row in rows))
    y: Spec = {"field": "what", "type": "nominal", "sort": names, "title": None}
    y["axis"] = {"labelLimit": 220, "ticks": False, "domain": False, "grid": True}
    x = quantity("loss", title, {"tickCount": 6}, padding=50)
    present = {row["kind"] for row in rows}
    colours = {kind: c for kind, c in zip(kinds, (ACCENT, QUIET, WARM), strict=False) if kind in present}
    color = category("kind", list(colours), list(colours.values()), {"title": None, "labelLimit": 300})
    at = {"x": x, "y": y, "color": color}
    tooltip = [{"field": "what", "title": "what"}, {"field": "loss", "format": ".4f", "title": title}]
    first = list({row["what"]: row for row in reversed(rows)}.values())
    text = {"x": {"value": {"expr": "width - 6"}}, "y": y, "text": {"field": "loss", "format": ".3f"}}
    bars = [row for row in rows if "low" in row]
    layers = [
        layer(rows[::-1], "point", {**at, "tooltip": tooltip}, filled=True, size=110, opacity=1),
        layer(bars, "rule", {**at, "x": {**x, "field": "low"}, "x2": {"field": "high"}}, strokeWidth=3, opacity=0.4),
        layer(first, "text", text, align="right", color=INK),
    ]
    return chart(layer=layers, height=26 * len(names))


def require(path: Path | None = None) -> Any:
    """The module vl_convert. Called before any work is done for a chart, to `path` if one is given.

    Raises:
      MissingExtraError: vl-convert is not installed.
      UsageError: the suffix of `path` is not one of FORMATS.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("a chart", "vl-convert-python", "report") from error
    if path and path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    return vl_convert


def save(spec: Spec, path: Path, width: int = 760) -> None:
    """Write a chart to `path`, atomically, in the colours of the light theme; as .json, its specification. Raises as
    `require`, and UsageError if it cannot be written."""
    require(path)
    drawn = render(spec, path.suffix, width)
    try:
        files.write_atomically(path, drawn)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def render(spec: Spec, suffix: str, width: int = 760) -> bytes:
    """A chart in one of FORMATS; PNG has two pixels for each of `width`."""
    if suffix == ".json":
        return json.dumps(spec, allow_nan=False).encode() + b"\n"
    convert, named = require(), json.dumps(spec, allow_nan=False)
    filled: Spec = json.loads(re.sub(r"var\(--([\w-]+)\)", lambda name: COLOURS[name[1]], named))
    filled |= {"background": "white"} | ({"width": width} if filled.get("width") == "container" else {})
    if suffix == ".png":
        return _compressed(bytes(convert.vegalite_to_png(filled, vl_version=VERSION, scale=2)))
    if suffix == ".pdf":
        return bytes(convert.vegalite_to_pdf(filled, vl_version=VERSION))
    svg: str = convert.vegalite_to_svg(filled, vl_version=VERSION)
    return svg.encode()


def _compressed(png: bytes) -> bytes:
    """The same picture at zlib's highest level: a third of the bytes that vl-convert writes."""
    head, pixels, at = png[:33], b"", 33  # signature and IHDR
    while (kind := png[at + 4 : at + 8]) != b"IEND":
        size = int.from_bytes(png[at : at + 4])
        if kind == b"IDAT":
            pixels += png[at + 8 : at + 8 + size]
        at += 12 + size
    data = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    return head + (len(data) - 4).to_bytes(4) + data + zlib.crc32(data).to_bytes(4) + png[at:]


@cache
def script() -> str:
    """All of Vega as one script, which defines `vegaEmbed` in a page."""
    bundle: str = require().javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    return re.sub("</(script)", r"<\\/\1", bundle, flags=re.I)  # it must not close the element that it stands in
