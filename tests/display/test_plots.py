import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from jaxgpt.config import UsageError
from jaxgpt.display import plots
from jaxgpt.lecture import view as tables
from jaxgpt.lecture.ladder import RUNGS, Result

LOSSES = (4.1744, 3.3473, 2.4819, 2.491, None, 2.392, 2.268, 2.226, 2.072, 2.069, 1.804)
RESULTS = [Result(rung, loss, 65, 1.0, "two\nlines") for rung, loss in zip(RUNGS, LOSSES, strict=True)]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the plot that is about to be drawn."""
    from matplotlib.figure import Figure

    kept = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (kept.append(self), savefig(self, *args, **kwargs))
    )
    return kept


def test_every_figure_stands_where_it_belongs(tmp_path, drawn):
    plots.ladder(RESULTS, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    ours = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert ours == [loss for loss in LOSSES if loss is not None]
    strokes = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    assert strokes == [rung.lecture for rung in RUNGS if rung.lecture]
    assert [line.get_xdata() for line in axes.lines if line.get_linestyle() == "--"] == [[2.4819, 2.4819]]
    said = [text.get_text() for text in axes.texts]
    assert {"bigrams, counted: 2.482", "1.804", "1.48*", "* at 6 layers, 384 channels, context 256"} <= set(said)


@pytest.mark.parametrize("n", [3, len(LOSSES)])
def test_no_words_overlap(tmp_path, drawn, n):
    plots.ladder(RESULTS[:n], tmp_path / "a.png")
    (axes,) = drawn[0].axes
    drawn[0].canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts if text.get_text()]
    for i, (one, box) in enumerate(boxes):
        for other, another in boxes[i + 1 :]:
            assert not box.overlaps(another), f"{one!r} and {other!r}"
        assert -2 <= box.x0 < box.x1 <= drawn[0].bbox.width + 2, one
        assert -2 <= box.y0 < box.y1 <= drawn[0].bbox.height + 2, one


def test_the_file_is_small_whole_and_of_the_kind_its_name_says(tmp_path):
    plots.ladder(RESULTS, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size < 150_000
    plots.ladder(RESULTS, tmp_path / "a.svg")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    with pytest.raises(UsageError, match=r"'\.txt', expected one of \.png"):
        plots.ladder(RESULTS, tmp_path / "a.txt")
    with pytest.raises(OSError, match="No such file"):
        plots.ladder(RESULTS, tmp_path / "nowhere" / "a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg"}


def test_no_global_state_is_touched(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plots.ladder(RESULTS, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'jaxgpt\[plot\]'"):
        plots.ladder(RESULTS, tmp_path / "a.png")


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
