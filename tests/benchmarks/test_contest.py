"""Contestants take turns, each in its own process."""

import subprocess
import sys
from pathlib import Path

from scripts.benchmarks import contest
from scripts.benchmarks.contest import Contest, WorkerError, alternate

COUNTER = """
from scripts.benchmarks import contest

class Counter:
    about = {"device": "cpu"}
    run = staticmethod(lambda: print("no answer") or 3)
    wait = staticmethod(lambda: None)
    peak_bytes = staticmethod(contest.peak_resident_bytes)

contest.answer_rounds(Counter)
"""


def test_alternate_asks_each_contestant_once_per_round():
    asked = []

    def ask(name):
        asked.append(name)
        return float(len(asked))

    rates, failed = alternate(["a", "b", "c"], 3, ask)
    assert asked == ["a", "b", "c"] * 3
    assert rates == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}
    assert failed == {}


def test_a_failed_contestant_drops_out_and_the_others_continue():
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


def test_a_worker_answers_until_its_input_ends():
    with Contest("cpu", log=lambda line: None) as held:
        held.enter("counter", ["-c", COUNTER])
        held.enter("broken", ["-c", "raise SystemExit('no such device')"])
        assert held.failed == {"broken": "exit code 1: no such device"}
        assert held.facts() == {"device": "cpu"}
        (rates,) = held.measure(rounds=2, seconds=0.01).values()
        assert len(rates) == 2
        assert min(rates) > 0
        assert held.peak_bytes["counter"] > 1e6
        process = held.workers["counter"]._process
    assert process.returncode == 0


def test_a_worker_inherits_no_jax_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    found = contest.environment("cpu")
    assert {name for name in found if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert contest.environment("gpu")["JAX_PLATFORMS"] == "cuda"


def test_the_parent_process_imports_no_heavy_package():
    code = "import sys, scripts.benchmarks.contest; print({'torch', 'jax', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True) == "set()\n"
