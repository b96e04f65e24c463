"""The display of a sweep."""

import pytest

from jaxgpt.monitor.terminal import RunConsole
from jaxgpt.sweep import view as sweeps
from jaxgpt.sweep.grid import Member
from jaxgpt.sweep.program import Progress


def test_the_time_left_is_that_of_the_work_left(tiny, change, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: now[0])
    small, large = (Member(change(tiny, steps=1000, n_layer=n), {}) for n in (1, 4))
    costs = [sweeps.flops_of_a_step(member.config) for member in (small, large)]
    lines = []
    shown = sweeps.SweepDisplay(RunConsole(), [small, small, large], lines)
    shown(Progress((0, 1), 250, 1000, [3.0, 3.0]))
    now[0] += 30
    shown(Progress((0, 1), 500, 1000, [3.0, 3.0]))
    assert shown._bar.tasks[0].time_remaining == pytest.approx(60 + 60 * costs[1] / costs[0], abs=1)
    # One diverges and ends; its remaining steps are not counted again.
    lines.append({"member": 1, "step": 500, "val_loss": None, "done": True})
    shown(lines)
    now[0] += 60
    shown(Progress((0,), 1000, 1000, [3.0]))
    assert shown.left().endswith(" left")
    assert shown._bar.tasks[0].completed == 2000 * costs[0]
