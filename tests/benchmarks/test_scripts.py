"""The commands `scripts/bench`, its groups, and `scripts/compare_bytes`, with fake programs."""

import functools
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro

from jaxgpt.config import UsageError
from jaxgpt.recipes import RECIPES
from scripts.benchmarks import groups, rates, shapes


def test_run_all_continues_with_the_unmeasured_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fakes = {"first": (1, "startup --help"), "broken": (1, "startup --rounds x"), "long": (5, "sample --help")}
    monkeypatch.setattr(groups, "GROUPS", {"cpu": fakes})
    groups.run_all("cpu", 2)
    out, err = capsys.readouterr()
    assert "usage: scripts/bench startup" in out
    assert "not measured yet: broken, long; call scripts/bench all --device cpu again" in out
    assert "broken failed" in err
    assert Path("bench-all-cpu/broken/error.txt").read_text()
    measured = []
    monkeypatch.setattr(groups, "measure", lambda line, folder, seconds: measured.append(folder.name))
    groups.run_all("cpu", 9)
    assert measured == ["broken", "long"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_group_is_a_valid_call(device):
    modes = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "bench"))["MODES"]
    for minutes, line in groups.GROUPS[device].values():
        mode, *options = line.split()
        call = functools.wraps(modes[mode])(lambda **given: given)
        given = tyro.cli(call, args=[*options, "--device", device])
        assert given["device"] == device
        assert minutes <= 9, "a call of the default length starts it"
        assert set(given.get("shapes", ())) <= set(shapes.SHAPES)
        assert {*given.get("recipes", ()), given.get("recipe", "gpt-demo")} <= set(RECIPES)
        for case in given.get("cases", ()):
            rates.parse_case(case)


@pytest.fixture
def called(monkeypatch):
    """The calls of `groups`, each of which takes the minutes that it names, with their limits in seconds."""
    clock, calls = [0.0], []

    def run(words, cwd, timeout, **given):
        name, minutes = words[2], float(words[3])
        calls.append((cwd.name, words[2:], timeout))
        clock[0] += 60 * minutes
        if 60 * minutes > timeout:
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, int(name == "broken"), f"table of {name}", "a warning\nno disk\n")

    monkeypatch.setattr(groups, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(groups.subprocess, "run", run)
    return calls


def test_a_group_whose_process_was_killed_has_failed(monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -9, "", "\n")
    monkeypatch.setattr(groups.subprocess, "run", lambda *args, **given: killed)
    groups.measure("attention --device gpu", tmp_path, 60)
    assert (tmp_path / "error.txt").read_text() == "exit code -9"
    assert not (tmp_path / "table.md").exists()


def test_a_group_starts_only_if_it_fits_and_is_stopped_after_twice_its_time(called, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kinds = {"a": (0.5, "broken 0.5"), "b": (2, "train 3"), "c": (4, "sample 4"), "d": (1, "startup 9")}
    monkeypatch.setattr(groups, "GROUPS", {"gpu": kinds})
    groups.run_all("gpu", 6)
    assert called == [
        ("a", ["broken", "0.5", "--device", "gpu"], 60.0),
        ("b", ["train", "3", "--device", "gpu"], 240.0),
        ("d", ["startup", "9", "--device", "gpu"], 120.0),
    ]
    out, err = capsys.readouterr()
    assert "table of train" in out
    assert "not measured yet: a, c, d" in out
    assert "a failed: no disk" in err
    assert "d failed: stopped after 120 s" in err
    groups.run_all("gpu", 4.5)
    assert [(name, seconds) for name, _, seconds in called[3:]] == [("a", 60.0), ("c", 240.0)]


def script(name):
    """A program of scripts/ as a module."""
    path = Path(__file__).parents[2] / "scripts" / name
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def test_bench_saves_the_report_of_its_mode_and_returns_a_status(tmp_path, monkeypatch, capsys):
    bench = script("bench")
    monkeypatch.chdir(tmp_path)

    def train(rounds: int = 5, seconds: float = 1.0) -> dict:
        """Training."""
        if rounds < 1:
            raise UsageError(f"rounds is {rounds}")
        return {"mode": "train", "facts": {}, "failed": {}, "notes": [f"{rounds} of {seconds}"], "tables": []}

    def run_all() -> None:
        """All."""

    monkeypatch.setattr(bench, "MODES", {"train": train, "all": run_all})
    assert bench.main("train", "--rounds", "2", "--seconds", "3.5") == 0
    assert "- 2 of 3.5" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench-train.json"]
    assert json.loads(Path("bench-train.json").read_text())["mode"] == "train"
    assert bench.main("train", "--rounds", "0") == 2
    assert capsys.readouterr().err == "scripts/bench: rounds is 0\n"
    assert bench.main("all") == 0
    for words, status in ((["nonsense"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as found:
            bench.main(*words)
        assert found.value.code == status


def test_compare_bytes_names_the_first_different_line():
    compare = script("compare_bytes").compare
    assert compare({"a": b"1\n2\n"}, {"a": b"1\n2\n"}) == []
    assert compare({"a": b"1\n2\n", "b": b""}, {"a": b"1\n3\n", "c": b""}) == [
        "b is only here",
        "c is only in the base",
        "a, line 2:\n    base b'3\\n'\n    here b'2\\n'",
    ]
    assert compare({"a": b"1"}, {"a": b"1\n2"}) == ["a, line 1:\n    base b'1\\n'\n    here b'1'"]
    (long,) = compare({"a": b"x" * 999 + b"1"}, {"a": b"x" * 999 + b"2"})
    assert long == f"a, line 1:\n    base b'{'x' * 100}2'\n    here b'{'x' * 100}1'"


@pytest.mark.parametrize("different", [None, "bigram", "gpt-demo"])
def test_compare_bytes_fails_if_one_of_its_cases_differs(different, monkeypatch, capsys):
    tool, asked = script("compare_bytes"), []

    def produce(tree, case, work):
        asked.append((tree == tool.ROOT, case))
        return {"a": b"here" if case == different and tree == tool.ROOT else b"base"}

    monkeypatch.setattr(tool, "produce", produce)
    monkeypatch.setattr(tool.subprocess, "run", lambda *words, **given: None)
    monkeypatch.setattr(sys, "argv", ["compare_bytes", "HEAD~1", "--only", "bigram", "gpt-demo"])
    assert tool.main() == (1 if different else 0)
    assert asked == [(tree, case) for case in ("bigram", "gpt-demo") for tree in (True, False)]
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    assert lines == [
        f"{case}: {'DIFFERENT' if case == different else 'equal'} (1 files)" for case in ("bigram", "gpt-demo")
    ]


def test_compare_bytes_runs_the_package_of_its_tree_and_stops_at_a_failure(tmp_path, monkeypatch):
    tool, trees = script("compare_bytes"), []
    run = subprocess.run

    def fake(words, **given):
        if given.get("shell"):
            trees.append(given["env"]["PYTHONPATH"])
            return subprocess.CompletedProcess(words, len(trees) - 1, "", "no such recipe")
        return run(words, **given)

    monkeypatch.setattr(tool.subprocess, "run", fake)
    with pytest.raises(SystemExit, match="exit code 1\nno such recipe"):
        tool.produce(tmp_path / "base", "resume", tmp_path / "work")
    assert trees == [str(tmp_path / "base")] * 2


def test_compare_bytes_fails_if_a_case_writes_no_file(tmp_path, monkeypatch):
    tool = script("compare_bytes")
    monkeypatch.setattr(tool, "CASES", {"none": (["recipes"], ["runs/r", "verse.txt"])})
    with pytest.raises(SystemExit, match="none wrote no runs/r"):
        tool.produce(tool.ROOT, "none", tmp_path / "work")
