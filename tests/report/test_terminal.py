import doctest
import io

import pytest

from jaxgpt.report import terminal
from jaxgpt.report.terminal import RunConsole, TrainingDisplay, describe, duration
from jaxgpt.training.evaluate import Evaluation
from jaxgpt.training.journal import Evaluated, Progress

RESULT = Evaluation(1.5, 0.01, 2.1640, 2.1500, 1000)


def show(is_terminal, *events, monkeypatch=None):
    out = io.StringIO()
    console = RunConsole(file=out, force_terminal=is_terminal, width=100, color_system=None)
    with TrainingDisplay(console, 100) as display:
        for event in events:
            display(event)
    return out.getvalue()


def test_plain_lines_where_the_output_is_no_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    out = show(
        False,
        Evaluated(0, RESULT),
        Progress(50, 100, 2.5, None, None),
        Progress(100, 100, 1.25, 12_345.6, 75.0),
    )
    assert out.splitlines() == [
        "step      0  validation loss 1.5000 ± 0.0100 nats/token, 2.1640 bits/char, 2.1500 bits/byte",
        "step     50/100  loss 2.5000",
        "step    100/100  loss 1.2500  12,346 tokens/s  1m15s left",
    ]


def test_plain_lines_are_few():
    out = show(False, *(Progress(step, 100, 1.0, 1e3, 1.0) for step in range(50)))
    assert out == ""


def test_a_reader_that_goes_away_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = RunConsole(file=Gone())
    with TrainingDisplay(console, 100) as display:
        assert not console.quiet
        display(Evaluated(0, RESULT))
        assert console.quiet
        display(Evaluated(50, RESULT))


def test_a_live_line_on_a_terminal():
    out = show(True, Progress(50, 100, 2.5, 12_345.6, 75.0), Evaluated(50, RESULT))
    assert "50/100" in out
    assert "loss 2.5000  12,346 tokens/s  1m15s left" in out
    assert "validation loss 1.5000 ± 0.0100" in out


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59.7, "1m00s"), (75, "1m15s"), (3599.4, "59m59s"), (3700, "1h01m")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_an_evaluation_on_one_line():
    assert describe(RESULT).startswith("loss 1.5000 ± 0.0100 nats/token")


def test_docstrings_say_the_truth():
    assert doctest.testmod(terminal).failed == 0
