import xml.etree.ElementTree as ET
from dataclasses import replace

from jaxgpt.display import charts
from jaxgpt.lecture import ladder
from jaxgpt.lecture.ladder import RUNGS, Result

LOSSES = (4.1744, 3.3473, 2.4819, 2.491, 2.392, 2.268, 2.226, 2.072, 2.069, 1.804)
RESULTS = [Result(rung, loss, 65, 1.0, "two\nlines [b]") for rung, loss in zip(RUNGS, LOSSES, strict=True)]


def test_the_chart_has_every_loss_and_every_loss_of_the_lecture():
    spec = ladder.chart(RESULTS)
    rows = [(row["what"], row["loss"]) for row in spec["layer"][0]["data"]["values"]]
    assert sorted(rows) == sorted(
        [(rung.name, loss) for rung, loss in zip(RUNGS, LOSSES, strict=True)]
        + [(rung.name, figure) for rung in RUNGS for figure in rung.lecture]
    )
    drawn = {node.text for node in ET.fromstring(charts.render(spec, ".svg")).iter() if node.tag.endswith("}text")}
    assert {rung.name for rung in RUNGS} | {"2.482", "1.804", *ladder.KINDS} <= drawn


def test_the_lines_of_a_finished_rung_have_its_figures():
    lines = {result.rung.name: ladder.line(result) for result in RESULTS}
    assert lines["bigram counts"] == (
        "bigram counts: how often each pair occurs\n  loss 2.4819, 65 parameters, 1.0s: two↵lines [b]"
    )
    assert "  loss 2.2260 (lecture: 2.24 to 2.27), " in lines["feed-forward"]
    assert "  loss 1.8040 (lecture: 1.48 at 6 layers, 384 channels, context 256), " in lines["dropout and scale"]
    assert len(ladder.line(replace(RESULTS[2], sample="x" * 100)).splitlines()[1]) < 100
