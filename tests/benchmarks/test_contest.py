"""Contestants take turns, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.config import UsageError
from scripts.benchmarks import contest
from scripts.benchmarks.contest import WorkerError, alternate, compare, environment, worker

COUNTER = """
from scripts.benchmarks.contestants import Contestant, answer_rounds, peak_resident_bytes

answer_rounds(lambda: Contestant({"device": "cpu"}, lambda: print("no answer") or 3, lambda: None, peak_resident_bytes))
"""


@pytest.mark.parametrize("measure", [lambda: alternate(["a"], 0, float), lambda: compare("cpu", {}, 0, 1.0)])
def test_a_contest_has_a_round(measure):
    with pytest.raises(UsageError, match="the number of rounds is 0, expected 1 or more"):
        measure()


def test_alternate_asks_each_contestant_once_per_round():
    asked = []

    def ask(name):
        asked.append(name)
        return float(len(asked))

    rates, failed = alternate(["a", "b", "c"], 3, ask)
    assert asked == ["a", "b", "c"] * 3
    assert rates == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}
    assert failed == {}


def test_a_failed_contestant_drops_out_and_the_others_continue(capsys):
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
    assert capsys.readouterr().err == "b: failed, no more memory\n"


def test_contestants_are_compared_and_those_that_fail_are_reported():
    late = "print('{}', flush=True); input(); 1 / 0"
    programs = {"counter": COUNTER, "broken": "raise SystemExit('no such device')", "late": late}
    entrants = {name: (["-c", code], {}) for name, code in programs.items()}
    found, failed, others = compare("cpu", entrants, rounds=2, seconds=0.01)
    assert list(found) == ["counter"]
    assert found["counter"]["device"] == "cpu"
    assert len(found["counter"]["rates"]) == 2
    assert min(found["counter"]["rates"]) > 0
    assert found["counter"]["peak_bytes"] > 1e6
    assert failed == {
        "broken": "exit code 1: no such device",
        "late": "exit code 1: ZeroDivisionError: division by zero",
    }
    assert len(others) == 2


def test_a_process_inherits_no_jax_settings(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    found = environment("cpu")
    assert {name for name in found if name.startswith("JAX_")} == {"JAX_PLATFORMS"}
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert environment("gpu")["JAX_PLATFORMS"] == "cuda"
    assert environment("gpu")["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false", "idle workers share its memory"


def test_the_parent_process_imports_no_heavy_package():
    code = "import sys, scripts.benchmarks.contest; print({'torch', 'jax', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True) == "set()\n"


def test_a_rate_is_the_work_of_a_round_divided_by_the_seconds_that_it_took(monkeypatch):
    """The processor time of a contestant is not the load of other programs."""
    done = '{"units": 6, "seconds": 2.0, "cpu_seconds": 3.0, "peak_bytes": 5}'
    own = []
    monkeypatch.setattr(contest, "others", lambda before, seconds: own.append(seconds) or 0.1)
    code = f"print('{{}}', flush=True)\nwhile input() == '1.5': print('{done}', flush=True)"
    found, _, others = compare("cpu", {"a": (["-c", code], {})}, rounds=2, seconds=1.5)
    assert found == {"a": {"rates": [3.0, 3.0], "peak_bytes": 5}}
    assert (own, others) == ([3.0, 3.0], [0.1, 0.1])


def test_a_round_includes_the_wait_for_the_device_and_only_its_own_processor_time():
    begin = "import time\nwhile time.process_time() < 0.1: pass\n"
    slow = begin + COUNTER.replace("lambda: None", "lambda: time.sleep(0.1)")
    with worker(["-c", slow], environment("cpu")) as answer:
        assert answer() == {"device": "cpu"}
        done = answer("0.0\n")
    assert done["seconds"] > 0.1
    assert done["cpu_seconds"] < 0.1


def test_contestants_start_with_empty_compile_caches_and_their_own_variables():
    keys = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    about = f"{{'caches': [os.listdir(os.environ[key]) for key in {keys}], 'precision': os.environ['PRECISION']}}"
    code = f"import json, os; print(json.dumps({about}), flush=True)\n"
    code += "while input(): print(json.dumps(dict(units=1, seconds=1, cpu_seconds=0, peak_bytes=0)), flush=True)"
    found, failed, _ = compare("cpu", {"a": (["-c", code], {"PRECISION": "float32"})}, rounds=1, seconds=1.0)
    assert failed == {}
    assert found["a"] == {"caches": [[], []], "precision": "float32", "rates": [1.0], "peak_bytes": 0}


def test_an_interrupted_contest_does_not_wait_for_its_contestants():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    held = worker(["-c", code], environment("cpu"))
    process = held.__enter__()()
    interrupt = KeyboardInterrupt()
    assert not held.__exit__(KeyboardInterrupt, interrupt, None)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
