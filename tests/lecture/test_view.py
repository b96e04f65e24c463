import xml.etree.ElementTree as ET
from dataclasses import replace

from rich.console import Console

from jaxgpt.display import charts
from jaxgpt.lecture import view
from jaxgpt.lecture.ladder import RUNGS, Result

LOSSES = (4.1744, 3.3473, 2.4819, 2.491, 2.392, 2.268, 2.226, 2.072, 2.069, 1.804)
RESULTS = [Result(rung, loss, 65, 1.0, "two\nlines [b]") for rung, loss in zip(RUNGS, LOSSES, strict=True)]


def test_the_chart_has_every_loss_and_every_loss_of_the_lecture():
    spec = view.chart(RESULTS)
    rows = [(row["what"], row["loss"]) for row in spec["layer"][0]["data"]["values"]]
    assert sorted(rows) == sorted(
        [(rung.name, loss) for rung, loss in zip(RUNGS, LOSSES, strict=True)]
        + [(rung.name, figure) for rung in RUNGS for figure in rung.lecture]
    )
    drawn = {node.text for node in ET.fromstring(charts.render(spec, ".svg")).iter() if node.tag.endswith("}text")}
    assert {rung.name for rung in RUNGS} | {"2.482", "1.804", *view.KINDS} <= drawn


def test_the_table_fits_a_terminal(capsys):
    Console(width=80).print(view.table(RESULTS))
    out = capsys.readouterr().out
    for rung, loss in zip(RUNGS, LOSSES, strict=True):
        assert f" {rung.name} " in out
        assert f"{loss:.4f}" in out
    assert "2.24-2.27" in out
    assert "1.48*" in out
    assert "* at 6 layers, 384 channels, context 256" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_line_of_a_finished_rung():
    assert view.line(RESULTS[2]) == "bigram counts      loss 2.4819    1.0s  two↵lines [b]"
    assert len(view.line(replace(RESULTS[2], sample="x" * 100))) < 100
