from jaxgpt.profile import rounds
from jaxgpt.profile.rounds import Contest, WorkerError, alternate, disturbance, ratio, series

COUNTER = """
from jaxgpt.profile import rounds

class Counter:
    about = {"device": "cpu"}
    run = staticmethod(lambda: print("no answer") or 3)
    wait = staticmethod(lambda: None)
    peak_bytes = staticmethod(rounds.peak_resident_bytes)

rounds.answer_rounds(Counter)
"""


def test_all_take_turns():
    asked = []

    def ask(name):
        asked.append(name)
        return float(len(asked))

    rates, failed = alternate(["a", "b", "c"], 3, ask)
    assert asked == ["a", "b", "c"] * 3
    assert rates == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}
    assert failed == {}


def test_one_that_fails_drops_out_and_the_others_continue():
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


def test_ratios_are_taken_round_by_round():
    """A machine that slows down to a tenth in the middle changes every rate, and no ratio."""
    theirs = [100.0, 10.0, 100.0]
    ours = [2 * rate for rate in theirs]
    assert series(ours) == {"median": 200.0, "low": 20.0, "high": 200.0, "n": 3}
    assert ratio(ours, theirs) == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert ratio([3.0, 1.0, 8.0, 4.0], [1.0, 1.0, 2.0, 2.0])["median"] == 2.5


def test_the_load_of_other_programs_is_reported():
    assert rounds.others((0.0, 0.0), (4.0, 10.0), 4.5) == 0.0
    assert disturbance([0.01, 0.02, 0.03]) == "other programs took 2% of the machine (3% at most)"
    assert disturbance([0.01, 0.3, 0.02]).startswith("NOT QUIET: other programs took 2% of the machine (30% at most)")
    assert "unknown" in disturbance([])


def test_work_is_repeated_until_the_time_is_over_and_at_least_once():
    done = []
    assert rounds.repeat(lambda: done.append(1) or 2, 0.0, lambda: done.append("wait"))[0] == 2
    assert done == [1, "wait"]
    units, seconds = rounds.repeat(lambda: 1, 0.01)
    assert units > 1
    assert seconds >= 0.01


def test_a_worker_answers_until_its_input_ends():
    with Contest("cpu", log=lambda line: None) as contest:
        contest.enter("counter", ["-c", COUNTER])
        contest.enter("broken", ["-c", "raise SystemExit('no such device')"])
        assert contest.failed == {"broken": "exit code 1: no such device"}
        assert contest.facts() == {"device": "cpu"}
        (rates,) = contest.measure(rounds=2, seconds=0.01).values()
        assert len(rates) == 2
        assert min(rates) > 0
        assert contest.peak_bytes["counter"] > 1e6
        process = contest.workers["counter"]._process
    assert process.returncode == 0


def test_a_measured_process_sees_none_of_jaxs_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    found = rounds.environment("cpu")
    assert {name for name in found if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert rounds.environment("gpu")["JAX_PLATFORMS"] == "cuda"


def test_nothing_heavy_is_imported_by_the_process_that_asks():
    assert not {"torch", "jax", "numpy"} & set(vars(rounds))
