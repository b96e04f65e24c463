import sys
import time

import pytest

from jaxgpt.bench import ruler
from jaxgpt.bench.processes import Timed
from jaxgpt.bench.ruler import Contest, Worker, WorkerError, alternate, best, disturbance, ratio, series
from jaxgpt.bench.shapes import config_of
from jaxgpt.config import to_tree


def test_everyone_is_asked_in_turn():
    asked = []

    def ask(name):
        asked.append(name)
        return float(len(asked))

    rates, failed = alternate(["a", "b", "c"], 3, ask)
    assert asked == ["a", "b", "c"] * 3
    assert rates == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}
    assert failed == {}


def test_who_fails_drops_out_and_the_others_go_on():
    asked = []

    def ask(name):
        asked.append(name)
        if name == "b" and asked.count("b") == 2:
            raise WorkerError("no more memory")
        return 1.0

    rates, failed = alternate(["a", "b", "c"], 3, ask)
    assert "".join(asked) == "abcabcac"
    assert failed == {"b": "no more memory"}
    assert rates == {"a": [1.0] * 3, "c": [1.0] * 3}


def test_the_first_round_is_whole_however_late_it_is():
    rates, _ = alternate(["a", "b"], 5, lambda name: 1.0, until=time.monotonic() - 1)
    assert rates == {"a": [1.0], "b": [1.0]}


def test_ratios_are_taken_round_by_round():
    """A machine that slows down to a tenth in the middle changes every rate, and no ratio."""
    theirs = [100.0, 10.0, 100.0]
    ours = [2 * rate for rate in theirs]
    assert series(ours) == {"median": 200.0, "low": 20.0, "high": 200.0, "n": 3}
    assert ratio(ours, theirs) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert ratio([3.0, 1.0, 8.0, 4.0], [1.0, 1.0, 2.0, 2.0])["median"] == 2.5


def test_the_best_has_the_highest_median():
    rates = {"a": [1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [8.0, 8.0, 8.0]}
    assert best(rates, ["a", "b", "gone"]) == "b"
    assert best(rates, ["gone"]) is None


def test_what_others_took_is_said():
    assert ruler.others(None, None, 1.0) is None
    assert ruler.others((0.0, 0.0), (4.0, 10.0), 4.5) == 0.0
    assert disturbance([0.01, 0.02, 0.03]) == "other programs took 2% of the machine (3% at most)"
    assert disturbance([0.01, 0.3, 0.02]).startswith("NOT QUIET: other programs took 2% of the machine (30% at most)")
    assert "not known" in disturbance([])


def test_a_turn_that_was_disturbed_is_repeated_and_the_quietest_counts():
    """By what others took, not by speed: the fastest of these is left out."""
    turns = iter([(0.5, 90.0), (0.3, 70.0), (0.4, 80.0), (0.05, 60.0)])
    contest = Contest("cpu")
    contest.workers["it"] = None
    contest._turn = lambda name, seconds: next(turns)
    assert contest.measure(rounds=2, seconds=0, patience=2) == {"it": [70.0, 60.0]}
    assert contest.others == [0.3, 0.05]
    assert contest.quiet().endswith("; 2 turns were repeated because they took more")


def test_a_worker_answers_until_its_input_ends():
    """A real process: what jaxgpt trains in it is counted in tokens."""
    with Contest("cpu") as contest:
        contest.enter("ours", {"task": "train-jaxgpt", "config": to_tree(config_of("micro", "cpu"))})
        assert contest.failed == {}
        worker = contest.workers["ours"]
        assert worker.about["compile_seconds"] > 0
        answer = worker.round(0.0)
        assert answer["units"] == 2 * 2 * 8, "a piece: 2 steps of 2 windows of 8 tokens"
        assert answer["seconds"] > 0
        assert answer["peak_bytes"] > 1e7
        (rates,) = contest.measure(rounds=2, seconds=0.01).values()
        assert len(rates) == 2
        assert min(rates) > 0
    assert worker._process.returncode == 0


def test_why_a_worker_ended_is_told():
    with (
        pytest.raises(WorkerError, match="exit code 1: ValueError: no task 'nonsense'"),
        Worker({"task": "nonsense"}, "cpu") as worker,
    ):
        worker.start()


def test_a_measured_process_sees_none_of_jaxs_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    found = ruler.environment("cpu")
    assert {name for name in found if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert ruler.environment("gpu")["JAX_PLATFORMS"] == "cuda"


def test_a_process_is_timed_to_its_end():
    timed = Timed(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(0.2)"], "cpu", {}).run()
    assert 0.2 < timed.seconds < 5
    assert "1 loop" in timed.output


def test_a_process_is_timed_until_something_holds(tmp_path):
    path = tmp_path / "there"
    code = f"open({str(path)!r}, 'w').close(); import time; time.sleep(60)"
    timed = Timed(["timeit", "-n", "1", "-r", "1", code], "cpu", {}).run(path.exists)
    assert timed.seconds < 30


@pytest.mark.parametrize("until", [None, lambda: False])
def test_a_process_that_fails_is_told(until):
    with pytest.raises(WorkerError, match=r"jaxgpt nonsense: exit code 2: .*"):
        Timed(["jaxgpt", "nonsense"], "cpu", {}).run(until)


def test_nothing_heavy_is_imported_by_the_one_who_asks():
    assert sys.modules["jaxgpt.bench.ruler"] is ruler
    assert not {"torch", "jax", "numpy"} & set(vars(ruler))
