"""Contestants take turns, each in its own process."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxgpt.config import UsageError
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


def test_a_contest_has_a_round():
    with pytest.raises(UsageError, match="the number of rounds is 0, expected 1 or more"):
        alternate(["a"], 0, float)


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
    assert contest.environment("gpu")["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false", "idle workers share its memory"


def test_the_parent_process_imports_no_heavy_package():
    code = "import sys, scripts.benchmarks.contest; print({'torch', 'jax', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True) == "set()\n"


def test_a_rate_is_the_work_of_a_round_divided_by_the_seconds_that_it_took(monkeypatch):
    """The processor time of a contestant is not the load of other programs."""
    done = {"units": 6, "seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 5}
    readings = iter([(0.0, 0.0), (4.0, 10.0)])
    monkeypatch.setattr(contest, "machine_seconds", lambda: next(readings))
    held = Contest("cpu", log=lambda line: None)
    held.workers["a"] = types.SimpleNamespace(ask=lambda seconds: done)
    assert held.measure(rounds=1, seconds=1.0) == {"a": [3.0]}
    assert held.others == [0.1]
    assert held.peak_bytes == {"a": 5}


def test_a_contestant_that_fails_in_a_round_is_reported():
    with Contest("cpu", log=lambda line: None) as held:
        held.enter("broken", ["-c", "print('{}', flush=True); input(); 1 / 0"])
        assert held.measure(rounds=2, seconds=0.0) == {}
        assert held.failed == {"broken": "exit code 1: ZeroDivisionError: division by zero"}
        assert not held.workers


def test_a_round_includes_the_wait_for_the_device_and_only_its_own_processor_time():
    begin = "import time\nwhile time.process_time() < 0.1: pass\n"
    slow = begin + COUNTER.replace("lambda: None", "lambda: time.sleep(0.1)")
    with Contest("cpu", log=lambda line: None) as held:
        held.enter("slow", ["-c", slow])
        done = held.workers["slow"].ask(0.0)
    assert done["seconds"] > 0.1
    assert done["cpu_seconds"] < 0.1


def test_a_contestant_has_the_variables_of_its_own():
    code = "import json, os; print(json.dumps({'device': os.environ['JAX_DEFAULT_MATMUL_PRECISION']}), flush=True)"
    with Contest("cpu", log=lambda line: None) as held:
        held.enter("float32", ["-c", code], {"JAX_DEFAULT_MATMUL_PRECISION": "float32"})
        assert held.about == {"float32": {"device": "float32"}}


def test_an_interrupted_contest_does_not_wait_for_its_contestants():
    held = Contest("cpu", log=lambda line: None)
    held.enter("busy", ["-c", "import time; print('{}', flush=True); time.sleep(5)"])
    held.__exit__(KeyboardInterrupt)
    assert held.workers["busy"]._process.returncode != 0


def test_the_peak_memory_of_a_device_is_not_what_it_holds_now():
    contestant = object.__new__(contest.JaxContestant)
    stats = {"bytes_in_use": 3, "peak_bytes_in_use": 7}
    contestant.device = types.SimpleNamespace(memory_stats=lambda: stats)
    assert contestant.peak_bytes() == 7
    stats.clear()
    assert 1e6 < contestant.peak_bytes() < 1e11, "of the process"
