"""The display of training on terminals, in plain files and in closed pipes."""

import io
import math
from dataclasses import replace

import pytest

from jaxgpt.display.text import sparkline
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated, Progress, Sampled
from jaxgpt.monitor import terminal
from jaxgpt.monitor.terminal import RunConsole, TrainingDisplay, describe, duration

RESULT = Evaluation(1.5, 0.01, 2.1640, 2.1500, 1000)


def show(is_terminal, *events, width=100, encoding="utf-8", used=lambda speed: None):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = RunConsole(file=out, force_terminal=is_terminal, width=width, color_system=None)
    with TrainingDisplay(console, 100, used) as display:
        for event in events:
            display(event)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_plain_lines_if_the_output_is_not_a_terminal(monkeypatch):
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


def test_a_closed_pipe_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = RunConsole(file=Gone())
    with TrainingDisplay(console, 100) as display:
        assert not console.quiet
        display(Evaluated(0, RESULT))
        assert console.quiet
        display(Evaluated(50, RESULT))


def test_a_closed_terminal_does_not_end_the_run():
    tried = []

    class Gone(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise OSError(5, "Input/output error")

    console = RunConsole(file=Gone(), force_terminal=True, width=100)
    with TrainingDisplay(console, 100) as display:
        display(Progress(50, 100, 2.5, 12_345.6, 75.0))
        display(Evaluated(50, RESULT))
    console.print("done")
    assert any("50/100" in text for text in tried)
    assert tried[-1] == "done\n", "output that failed to print is not kept: it would grow for the rest of the run"


def test_a_terminal_has_a_live_line():
    out = show(True, Progress(50, 100, 2.5, 12_345.6, 75.0), Evaluated(50, RESULT))
    assert "50/100" in out
    assert "loss 2.5000  12,346 tokens/s  1m15s left" in out
    assert "validation loss 1.5000 ± 0.0100" in out


CURVE = [Progress(10 * (i + 1), 100, 4.0 - i / 2, 1e4, 75.0) for i in range(5)]


def test_the_curve_is_computed_once_for_each_progress(monkeypatch):
    """Not at each refresh of the line, ten times a second: a long run has many losses."""
    drawn = []
    monkeypatch.setattr(TrainingDisplay, "curve", lambda self: drawn.append(len(self._losses)) or "loss")
    with TrainingDisplay(RunConsole(file=io.StringIO(), force_terminal=True, width=80), 100) as display:
        for event in CURVE:
            display(event)
            display.refresh()
            display.refresh()
    assert drawn == [1, 2, 3, 4, 5]


def last_drawn(out):
    """The lines of the last frame drawn on a terminal, without escape codes."""
    return out.replace("\x1b[?25h", "").split("\x1b[2K")[-1].replace("\x1b[2m", "").strip("\n").splitlines()


def test_the_curve_the_best_loss_and_the_newest_sample_are_under_the_bar():
    out = show(True, Evaluated(0, RESULT), *CURVE, Sampled(20, "the cat\nsat"), used=lambda speed: speed / 5e4)
    bar, curve, sample = last_drawn(out)
    assert "loss 2.0000  10,000 tokens/s  20% used  1m15s left" in bar
    assert curve == "loss █▆▅▃▁  4.00 to 2.00  best 1.5000 at 0"
    assert sample == "the cat↵sat"


@pytest.mark.parametrize("width", [20, 30, 50, 71, 72, 200])
def test_no_line_is_wider_than_the_terminal(width):
    out = show(True, Evaluated(0, RESULT), *CURVE, Sampled(20, "the cat sat on the mat " * 9), width=width)
    lines = last_drawn(out)
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert "loss 2.0" in lines[0] or width < 30


def test_an_ascii_terminal_has_an_ascii_curve():
    assert "loss #*+-_  4.00 to 2.00" in show(True, *CURVE, encoding="ascii")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    out = show(True, *CURVE, Sampled(20, "the cat"))
    assert "\x1b" not in out
    assert out.splitlines()[-1] == "step     50/100  loss 2.0000  10,000 tokens/s  1m15s left"


def test_a_resumed_run_shows_the_best_loss_before_it():
    before = Evaluated(70, replace(RESULT, loss=1.25))
    out = show(True, *(replace(event, best=before) for event in CURVE), Evaluated(90, RESULT))
    assert last_drawn(out)[1].endswith("best 1.2500 at 70")
    out = show(True, Evaluated(80, RESULT), *(replace(event, best=before) for event in CURVE))
    assert last_drawn(out)[1].endswith("best 1.2500 at 70")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.7, "1m00s"), (75, "1m15s"), (3599.4, "59m59s"), (3600, "1h00m"), (3700, "1h01m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_large_losses_and_small_shares_have_few_digits():
    assert describe(replace(RESULT, loss=3.4e38)).startswith("loss 3.4000e+38 ± 0.0100 nats/token, ")
    file = io.StringIO()
    with TrainingDisplay(RunConsole(file=file, force_terminal=True, width=100), 100, lambda speed: 0.00312) as display:
        display(Progress(50, 100, 3.4e38, 12_345.6, 75.0))
    assert "loss 3.4000e+38  12,346 tokens/s  0.31% used" in file.getvalue()


def test_the_loss_of_a_single_window_has_no_error():
    assert describe(replace(RESULT, standard_error=math.nan)).startswith("loss 1.5000 nats/token, ")


def test_each_character_of_a_curve_is_the_mean_of_its_losses():
    assert sparkline([0, 4, 2, 2, 4, 4], 3) == "▁▁█"
