"""Charts as Vega-Lite specifications, which vl-convert draws as PNG, SVG or PDF without a browser."""

import json
import math
import re
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import files
from jaxgpt.cli.compile_cache import private_cache
from jaxgpt.config import MissingExtraError, UsageError

VERSION = "6.4"
"""Of Vega-Lite, as vl-convert writes it."""
FORMATS = (".png", ".svg", ".pdf", ".json")
COLOURS = {"ink": "#1d2129", "quiet": "#5c6370", "line": "#e3e6ea", "accent": "#1f5fa8", "warm": "#b3471b"} | {
    f"series-{i}": value for i, value in enumerate(("#1f5fa8", "#b3471b", "#2e7d4f", "#7a4fa3", "#8a6d1a", "#a23b5f"))
}
"""Colours of the light theme, which files use. In a page the names are CSS variables, which follow its theme."""
INK, QUIET, LINE, ACCENT, WARM = (f"var(--{name})" for name in ("ink", "quiet", "line", "accent", "warm"))
SERIES = [f"var(--series-{i})" for i in range(6)]
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
"""For colour-blind readers too (Okabe and Ito 2008, with grey in place of yellow)."""
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
    """A complete specification; a single panel without a width fills its container."""
    fluid = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        **({} if parts.keys() & {"width", "hconcat"} else fluid),
        **parts,
        "config": CONFIG | parts.get("config", {}),
    }


def columns(**values: Any) -> list[Spec]:
    """Rows from columns, broadcast together. Floats are rounded to 6 digits, non-finite ones become None."""
    arrays = np.broadcast_arrays(*map(np.asarray, values.values()))
    rows = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    return [dict(zip(values, map(_rounded, row), strict=True)) for row in rows]


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def layer(rows: list[Spec], mark: str, encoding: Spec, **properties: Any) -> Spec:
    """A mark with its own rows."""
    return {"data": {"values": rows}, "mark": {"type": mark, **properties}, "encoding": encoding}


def quantity(field: str, title: str | None = None, axis: Spec | None = None, **scale: Any) -> Spec:
    """A quantitative channel, whose scale need not include zero by default."""
    scale = {"zero": False, **scale}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis or {}}


def category(field: str, names: list[str], values: Any, legend: Spec | None = None) -> Spec:
    """A nominal channel: the i-th of `names` gets the i-th of `values`, which repeat."""
    scale = {"domain": names, "range": [values[i % len(values)] for i in range(len(names))]}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def label(text: str, x: int, y: int) -> Spec:
    """A text whose right end is at x and y, in pixels."""
    at = {"x": {"value": x}, "y": {"value": y}}
    return layer([{}], "text", at, text=text, color=QUIET, fontSize=11, align="right")


def dots(rows: list[Spec], kinds: list[str], title: str) -> Spec:
    """A line of dots for each name, with its first loss at the right. A row has what (the name), loss, kind (one of at
    most three `kinds`), and optionally low and high, the ends of an error bar."""
    names = list(dict.fromkeys(row["what"] for row in rows))
    y: Spec = {"field": "what", "type": "nominal", "sort": names, "title": None}
    y["axis"] = {"labelLimit": 220, "ticks": False, "domain": False, "grid": True}
    x = quantity("loss", title, {"tickCount": 6}, padding=50)
    present = [kind for kind in kinds if kind in {row["kind"] for row in rows}]
    color = category("kind", present, (ACCENT, QUIET, WARM), {"title": None, "labelLimit": 300})
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
    """The module vl_convert, to be asked for before any work is done for a chart, which is written to `path`. Raises
    MissingExtraError if it is not installed, and UsageError if the suffix of `path` is not one of FORMATS."""
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("a chart", "vl-convert-python", "report") from error
    if path and path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    return vl_convert


def save(spec: Spec, path: Path) -> None:
    """Write a chart to `path`, atomically. Raises as `require`, and OSError if it cannot be written."""
    require(path)
    files.write_atomically(path, render(spec, path.suffix))


def render(spec: Spec, suffix: str) -> bytes:
    """A chart in one of FORMATS: .json is its specification, a PNG has two pixels for each of its width."""
    if suffix == ".json":
        return json.dumps(spec, allow_nan=False).encode() + b"\n"
    text = re.sub(r"var\(--([\w-]+)\)", lambda name: COLOURS[name[1]], json.dumps(spec, allow_nan=False))
    coloured: Spec = json.loads(text) | {"background": "white"}
    if coloured.get("width") == "container":
        coloured["width"] = 760
    convert = require()
    if suffix == ".png":
        return _compressed(bytes(convert.vegalite_to_png(coloured, vl_version=VERSION, scale=2)))
    if suffix == ".pdf":
        return bytes(convert.vegalite_to_pdf(coloured, vl_version=VERSION))
    return str(convert.vegalite_to_svg(coloured, vl_version=VERSION)).encode()


def _compressed(png: bytes) -> bytes:
    """The same picture at zlib's highest level: a third of the size that vl-convert writes."""
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
    """Vega as one script, which defines `vegaEmbed` in a page. The user's cache keeps it: vl-convert takes 3 s."""
    convert = require()

    def bundled() -> str:
        bundle = convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
        return re.sub("</(script)", r"<\\/\1", bundle, flags=re.I)  # must not close its own element

    with suppress(OSError):
        kept = private_cache("compiled-vega") / f"{VERSION}-{convert.__version__}.js"
        if not kept.exists():
            files.write_atomically(kept, bundled().encode())
        return kept.read_text("utf-8")
    return bundled()
