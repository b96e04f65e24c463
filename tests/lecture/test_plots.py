import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from jaxgpt.display import charts
from jaxgpt.lecture import plots
from jaxgpt.lecture import view as tables
from jaxgpt.lecture.ladder import RUNGS, Result

LOSSES = (4.1744, 3.3473, 2.4819, 2.491, None, 2.392, 2.268, 2.226, 2.072, 2.069, 1.804)
RESULTS = [Result(rung, loss, 65, 1.0, "two\nlines") for rung, loss in zip(RUNGS, LOSSES, strict=True)]


def words(node, x=0.0, y=0.0):
    """(text, x, y, font size, anchor) of every text of an SVG, in its pixels."""
    moved = re.match(r"translate\(([-\d.]+)[, ]([-\d.]+)\)", node.get("transform", ""))
    x, y = (x + float(moved[1]), y + float(moved[2])) if moved else (x, y)
    if node.tag.endswith("}text") and node.text:
        yield node.text, x, y, float(node.get("font-size").removesuffix("px")), node.get("text-anchor", "start")
    for child in node:
        yield from words(child, x, y)


def test_every_figure_is_in_its_row():
    layers = plots.ladder(RESULTS)["layer"]
    of = {each["mark"]["type"]: each["data"]["values"] for each in layers}
    assert [row["loss"] for row in of["point"]] == [loss for loss in LOSSES if loss is not None]
    expected = [(rung.name, figure) for rung in RUNGS for figure in rung.lecture]
    assert [(row["name"], row["figure"]) for row in of["tick"]] == expected
    assert [each["encoding"]["x"]["datum"] for each in layers if each["mark"]["type"] == "rule"] == [2.4819]
    drawn = {text for text, *_ in words(ET.fromstring(charts.render(plots.ladder(RESULTS), ".svg")))}
    assert {"bigrams, counted: 2.482", "1.804", "1.48*", "* at 6 layers, 384 channels, context 256"} <= drawn


@pytest.mark.parametrize("n", [3, len(LOSSES)])
def test_no_texts_overlap(n):
    root = ET.fromstring(charts.render(plots.ladder(RESULTS[:n]), ".svg"))
    boxes = []
    for text, x, y, size, anchor in words(root):
        width = 0.43 * size * len(text)  # about: letters of a proportional font
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((text, left, left + width, y - size, y))
    for i, (one, left, right, top, bottom) in enumerate(boxes):
        assert -2 <= left < right <= float(root.get("width")) + 2, one
        assert -2 <= top < bottom <= float(root.get("height")) + 2, one
        for other, its_left, its_right, its_top, its_bottom in boxes[i + 1 :]:
            apart = right <= its_left or its_right <= left or bottom <= its_top or its_bottom <= top
            assert apart, f"{one!r} and {other!r}"


def test_tables(capsys):
    from rich.console import Console

    console = Console(width=80)
    console.print(tables.ladder(RESULTS))
    console.print(tables.samples([*RESULTS, replace(RESULTS[0], sample="[bold]\t" * 30)]))
    out = capsys.readouterr().out
    for rung, loss in zip(RUNGS, LOSSES, strict=True):
        assert f" {rung.name} " in out
        assert loss is None or f"{loss:.4f}" in out
    assert "2.24-2.27" in out
    assert "1.48*" in out
    assert "two↵lines" in out
    assert "[bold]·[bold]" in out, "a sample is no markup"
    assert max(map(len, out.splitlines())) <= 80


def test_a_line_as_each_rung_finishes():
    assert tables.line(RESULTS[2]) == "bigram counts      loss 2.4819  1.0s"
    assert tables.line(replace(RESULTS[4], sample="so far")) == "averaging          so far  1.0s"
