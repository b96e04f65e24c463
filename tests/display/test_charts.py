import json
import math
import struct
import sys
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from jaxgpt.config import MissingExtraError, UsageError
from jaxgpt.display import charts

SPEC = charts.chart(
    **charts.layer(
        charts.columns(x=np.arange(3), y=[1.0, math.nan, 2.0]),
        "line",
        {"x": charts.quantity("x", "step"), "y": charts.quantity("y", "loss")},
        color=charts.ACCENT,
    ),
    height=200,
)


def test_the_suffix_of_a_file_chooses_its_format(tmp_path):
    for suffix in charts.FORMATS:
        charts.save(SPEC, tmp_path / f"a{suffix}")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert json.loads((tmp_path / "a.json").read_text()) == SPEC
    svg = (tmp_path / "a.svg").read_bytes()
    assert ET.fromstring(svg).get("width") == "760"
    assert charts.COLOURS["accent"].encode() in svg
    assert b"var(--" not in svg, "a file has no CSS variables"
    assert {path.name for path in tmp_path.iterdir()} == {f"a{suffix}" for suffix in charts.FORMATS}


def test_a_png_is_small_and_valid(tmp_path):
    charts.save(SPEC, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert len(data) < 30_000
    at, kinds, pixels = 8, [], b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + body),)
        kinds, pixels, at = [*kinds, kind], pixels + (body if kind == b"IDAT" else b""), at + 12 + size
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1520, "a PNG has two pixels per unit of width"
    assert len(zlib.decompress(pixels)) == height * (1 + 4 * width)


def test_a_bad_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'\.txt', expected one of \.png"):
        charts.save(SPEC, tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.png"):
        charts.save(SPEC, tmp_path / "nowhere" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_vl_convert_is_an_error_with_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"a chart needs vl-convert-python, .*'jaxgpt\[report\]'"):
        charts.save(SPEC, tmp_path / "a.png")


def test_the_script_of_a_page_is_bundled_once_for_all_processes(tmp_path, monkeypatch):
    """Only if no one else can write to it: it runs in the page."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = charts.script.__wrapped__()
    (kept,) = (tmp_path / "jaxgpt" / "compiled-vega").iterdir()
    assert kept.read_text("utf-8") == first
    assert "window.vegaEmbed" in first
    assert "</script" not in first.lower()
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda *args, **more: "bundled again")
    assert charts.script.__wrapped__() == first
    kept.parent.chmod(0o777)
    assert charts.script.__wrapped__() == "bundled again"
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert charts.script.__wrapped__() == "bundled again", "a folder that cannot be made"


def test_columns_repeat_scalars_and_replace_nan_by_none():
    rows = charts.columns(name="a", x=np.float32([0.1, 2]), y=[math.inf, 1.23456789])
    assert rows == [{"name": "a", "x": 0.1, "y": None}, {"name": "a", "x": 2.0, "y": 1.23457}]


def test_dots_are_in_order_with_the_first_loss_of_each_name():
    rows = [{"what": what, "loss": loss, "kind": kind} for what, loss, kind in (
        ("b", 2.0, "run"), ("b", 1.5, "baseline"), ("a", 1.0, "baseline")
    )]  # fmt: skip
    rows[0] |= {"low": 1.5, "high": 2.5}
    points, bars, texts = charts.dots(rows, ["run", "baseline"], "nats")["layer"]
    assert points["encoding"]["y"]["sort"] == ["b", "a"]
    scale = points["encoding"]["color"]["scale"]
    assert scale == {"domain": ["run", "baseline"], "range": [charts.ACCENT, charts.QUIET]}
    assert bars["data"]["values"] == rows[:1]
    assert (bars["encoding"]["x"]["field"], bars["encoding"]["x2"]) == ("low", {"field": "high"})
    assert {row["what"]: row["loss"] for row in texts["data"]["values"]} == {"b": 2.0, "a": 1.0}
