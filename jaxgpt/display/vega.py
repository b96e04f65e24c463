"""Vega and Vega-Lite draw the charts: their scripts for a page, and pictures without a browser, by vl-convert."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jaxgpt import files as disk
from jaxgpt.config import MissingExtraError, UsageError

VERSION = "6.4"
"""Of Vega-Lite, as vl-convert calls it."""
COLOURS = {"ink": "#1d2129", "quiet": "#5c6370", "line": "#e3e6ea", "accent": "#1f5fa8", "warm": "#b3471b"} | {
    f"series-{i}": value for i, value in enumerate(("#1f5fa8", "#b3471b", "#2e7d4f", "#7a4fa3", "#8a6d1a", "#a23b5f"))
}
"""What the names of colours stand for in a picture: the light theme of page.css."""
FORMATS = (".png", ".svg")


def require() -> Any:
    """The module vl_convert.

    Raises:
      MissingExtraError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("a report", "vl-convert-python", "report") from error
    return vl_convert


@cache
def script() -> str:
    """All of Vega as one script, which makes `vegaEmbed` known to the page."""
    bundle: str = require().javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    return re.sub("</(script)", r"<\\/\1", bundle, flags=re.I)  # it must not end the element that it stands in


def picture(spec: dict[str, Any], path: Path, width: int = 760) -> None:
    """Draw a chart of `charts` to `path`, whole or not at all, in the colours of the light theme.

    Raises:
      UsageError: the name ends otherwise than in FORMATS, or it cannot be written.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    drawn = render(spec, path.suffix, width)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(path, drawn)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def render(spec: dict[str, Any], suffix: str, width: int = 760) -> bytes:
    """A chart as PNG (of twice the resolution) or SVG."""
    convert, plain = require(), filled(spec)
    if plain.get("width") == "container":
        plain["width"] = width
    plain["background"] = "white"
    if suffix == ".png":
        drawn: bytes = convert.vegalite_to_png(plain, vl_version=VERSION, scale=2)
        return drawn
    svg: str = convert.vegalite_to_svg(plain, vl_version=VERSION)
    return svg.encode()


def filled(spec: dict[str, Any]) -> dict[str, Any]:
    """`spec` with colours in place of their names."""

    def colour(name: re.Match[str]) -> str:
        return COLOURS[name[1]]

    plain: dict[str, Any] = json.loads(re.sub(r"var\(--([\w-]+)\)", colour, json.dumps(spec)))
    return plain
