from jaxgpt.profile import timing
from jaxgpt.profile.timing import disturbance, ratio, series


def test_ratios_are_taken_round_by_round():
    """A machine that slows down to a tenth in the middle changes every rate, and no ratio."""
    theirs = [100.0, 10.0, 100.0]
    ours = [2 * rate for rate in theirs]
    assert series(ours) == {"median": 200.0, "low": 20.0, "high": 200.0, "n": 3}
    assert ratio(ours, theirs) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert ratio([3.0, 1.0, 8.0, 4.0], [1.0, 1.0, 2.0, 2.0])["median"] == 2.5


def test_a_machine_that_waits_for_a_disk_is_not_busy(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text("cpu  400 100 300 5000 1000 0 200 0 0 0\ncpu0 ...\n")  # idle 5000, waiting 1000
    monkeypatch.setattr(timing, "Path", lambda name: tmp_path / "stat")
    monkeypatch.setattr(timing.os, "sysconf", lambda name: 100)
    assert timing.machine_seconds() == (10.0, 70.0)


def test_the_load_of_other_programs_is_reported():
    assert timing.others((0.0, 0.0), (4.0, 10.0), 4.5) == 0.0
    assert disturbance([0.01, 0.02, 0.03]) == "other programs took 2% of the machine (3% at most)"
    assert disturbance([0.01, 0.3, 0.02]).startswith("NOT QUIET: other programs took 2% of the machine (30% at most)")
    assert "unknown" in disturbance([])


def test_repeat_runs_at_least_once_and_until_the_time_is_over():
    done = []
    assert timing.repeat(lambda: done.append(1) or 2, 0.0, lambda: done.append("wait"))[0] == 2
    assert done == [1, "wait"]
    units, seconds = timing.repeat(lambda: 1, 0.01)
    assert units > 1
    assert seconds >= 0.01
