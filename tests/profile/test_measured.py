"""Measurements on a terminal."""

import io

import pytest

from jaxgpt.monitor.terminal import RunConsole
from jaxgpt.profile import measured

REPORT = {
    "tables": [
        {
            "title": "Parts",
            "rows": [
                {"part": "attention", "bound by": "memory", **{f"share number {i}": 12345.6 + i for i in range(8)}},
                {"part": "a block", "bound by": "a long tale of words that may be folded", "the last of all": 1.5},
            ],
        },
        {"title": "Empty", "rows": []},
    ],
    "failed": {"tiny": "exit code 1"},
    "notes": ["one"],
}


@pytest.mark.parametrize("width", [30, 80, 300])
def test_numbers_stay_whole_on_any_terminal(width):
    console = RunConsole(file=io.StringIO(), width=width)
    for part in measured.parts(REPORT, width):
        console.print(part)
    told = console.file.getvalue()
    (attention,) = (line for line in told.splitlines() if line.startswith(" attention"))
    assert attention.split() == ["attention", "memory", *(f"12,3{46 + i}" for i in range(8)), "-"]
    for word in ("share", "number", "last", "folded"):
        assert word in told
    assert "Empty" not in told
    assert told.endswith("tiny was not measured: exit code 1\n- one\n")
