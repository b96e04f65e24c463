from jaxgpt.profile import timing
from jaxgpt.profile.timing import ratio, series


def test_ratios_are_taken_round_by_round():
    """A machine that slows down to a tenth in the middle changes every rate, and no ratio."""
    theirs = [100.0, 10.0, 100.0]
    ours = [2 * rate for rate in theirs]
    assert series(ours) == {"median": 200.0, "low": 20.0, "high": 200.0, "n": 3}
    assert ratio(ours, theirs) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert ratio([3.0, 1.0, 8.0, 4.0], [1.0, 1.0, 2.0, 2.0])["median"] == 2.5


def test_repeat_runs_at_least_once_and_until_the_time_is_over():
    done = []
    assert timing.repeat(lambda: done.append(1) or 2, 0.0, lambda: done.append("wait"))[0] == 2
    assert done == [1, "wait"]
    units, seconds = timing.repeat(lambda: 1, 0.01)
    assert units > 1
    assert seconds >= 0.01
