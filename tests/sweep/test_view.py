"""The display of a sweep."""

from jaxgpt.monitor.terminal import RunConsole, duration
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
    now[0] += 60
    shown(Progress((0, 1), 500, 1000, [3.0, 3.0]))
    assert shown.left() == f", {duration(60 + 60 * costs[1] / costs[0])} left"
    # One diverges and ends; its remaining steps are not counted again.
    lines.append({"member": 1, "step": 500, "val_loss": None, "done": True})
    shown(lines)
    shown(Progress((0, 1), 1000, 1000, [3.0, 3.0]))
    assert shown.left() == f", {duration(60 * costs[1] / costs[0] / 2)} left"
