import io

import pytest
from rich.console import Console

from jaxgpt.monitor.progress import patient_bar


@pytest.mark.parametrize(("terminal", "patience", "seen"), [(True, 0, True), (True, 60, False), (False, 0, False)])
def test_a_bar_is_shown_on_a_terminal_when_it_takes_long(terminal, patience, seen):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with patient_bar(console, patience) as show:
        for tenth in range(11):
            show("encoding", tenth / 10)
    assert ("encoding" in out.getvalue()) == seen
    assert ("100%" in out.getvalue()) == seen
    assert seen or out.getvalue() == ""
