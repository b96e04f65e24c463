"""Whole programs that `scripts/bench` times: `speedrun` and `startup`, mostly with fake processes."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from jaxgpt.config import UsageError
from jaxgpt.run import Run
from scripts.benchmarks import contest, programs
from scripts.benchmarks.programs import timed


def test_a_process_is_timed_until_it_exits(tmp_path):
    done = timed(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(0.2)"], tmp_path, "cpu")
    assert done["seconds"] > 0.2
    assert 0 <= done["others"] <= 1


def test_a_process_is_timed_until_the_condition_holds(tmp_path):
    path = tmp_path / "created"
    code = f"open({str(path)!r}, 'w').close(); import time; time.sleep(60)"
    assert timed(["timeit", "-n", "1", "-r", "1", code], tmp_path, "cpu", until=path.exists)["seconds"] < 50


@pytest.mark.parametrize("until", [None, lambda: False])
def test_a_failed_process_is_reported_with_its_error(until, tmp_path):
    with pytest.raises(contest.WorkerError, match=r"jaxgpt nonsense: exit code 2: .*"):
        timed(["jaxgpt", "nonsense"], tmp_path, "cpu", until)


def test_speedrun_alternates_runs_and_compares_them(monkeypatch):
    """The ratio is the time of the PyTorch twin divided by that of jaxgpt; losses are compared with the bound."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    ran = []

    def run_jaxgpt(corpus, run, device, name, seed, bound):
        assert bound is None
        ran.append((f"{name} {run.path.name}", seed))
        seconds = (10.0, 20.0, 30.0)[seed - 1337] / (2 if run.path.name == "warm" else 1)
        return {"seconds": seconds, "loss": (1.87, 1.88, 1.89)[seed - 1337], "others": 0.0}

    def run_torch(corpus, folder, device, seed):
        ran.append(("torch", seed))
        return {"seconds": 20.0, "loss": 1.9, "others": 0.5}

    monkeypatch.setattr(programs, "run_ours", run_jaxgpt)
    monkeypatch.setattr(programs, "run_twin", run_torch)
    report = programs.speedrun("text", recipes=("shakespeare-cpu",), repeats=3)
    names = ("torch", "shakespeare-cpu cold", "shakespeare-cpu warm")
    assert ran == [(name, seed) for seed in (1337, 1338, 1339) for name in names]
    torch, cold, warm = report["tables"][0]["rows"]
    assert cold["torch / this"] == {"median": 1.0, "low": pytest.approx(2 / 3), "high": 2.0, "n": 3}
    assert warm["torch / this"]["median"] == 2.0
    assert (cold["reached 1.88"], torch["reached 1.88"]) == ("2 of 3", "0 of 3")
    assert cold["mean loss"] == "1.8800"
    assert "NOT QUIET" in report["notes"][-1]
    with pytest.raises(UsageError, match="no recipe 'nonsense'"):
        programs.speedrun("text", recipes=("nonsense",))


def test_a_failed_cold_run_skips_the_warm_run(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")

    def run_jaxgpt(corpus, run, *given):
        assert run.path.name == "cold"
        raise contest.WorkerError("no disk")

    monkeypatch.setattr(programs, "run_ours", run_jaxgpt)
    monkeypatch.setattr(programs, "run_twin", lambda *given: {"seconds": 2.0, "loss": 1.9, "others": 0.0})
    report = programs.speedrun("text", recipes=("shakespeare-cpu",), repeats=2)
    assert set(report["failed"]) == {"shakespeare-cpu cold", "shakespeare-cpu warm"}
    assert [row["run"] for row in report["tables"][0]["rows"]] == ["torch"]


def test_startup_measures_help_cold_and_warm_in_each_round(monkeypatch):
    ran = []

    def run(words, folder, device, until=None):
        ran.append((folder.name, words[1], "--run" in words and words[words.index("--run") + 1]))
        return {"seconds": 1.0 if words[1] == "--help" else 3.0, "others": 0.0}

    monkeypatch.setattr(programs, "timed", run)
    report = programs.startup(repeats=2)
    kinds = (("--help", False), ("train", "cold"), ("train", "warm"))
    assert ran == [(turn, *kind) for turn in ("0", "1") for kind in kinds], "warm runs share the folder of cold runs"
    rows = {row["what"]: row["seconds"]["median"] for row in report["tables"][0]["rows"]}
    assert rows == {"help": 1.0, "first step cold": 3.0, "first step warm": 3.0}


def test_a_process_has_its_own_caches(tmp_path):
    code = f"import os; open({str(tmp_path / 'out')!r}, 'w').write(os.environ['XDG_CACHE_HOME'])"
    timed(["timeit", "-n", "1", "-r", "1", code], tmp_path / "own", "cpu")
    assert (tmp_path / "out").read_text() == str(tmp_path / "own" / "cache")


def test_only_the_processor_time_of_this_process_is_not_of_others(tmp_path, monkeypatch):
    own = []
    monkeypatch.setattr(programs, "others", lambda before, seconds: own.append(seconds) or 0.0)
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    for code in (busy, "pass"):
        timed(["timeit", "-n", "1", "-r", "1", code], tmp_path, "cpu")
    assert own[0] >= 0.39
    assert own[1] < 0.39


def test_a_process_that_ends_before_the_condition_holds_has_failed(tmp_path):
    with pytest.raises(contest.WorkerError, match="exit code 0"):
        timed(["timeit", "-n", "1", "-r", "1", "pass"], tmp_path, "cpu", until=lambda: False)


@pytest.fixture
def processes(monkeypatch):
    """The options of each timed process, which writes three losses, the last neither first nor least."""
    started = []

    def run(words, folder, device, until=None):
        options = dict(pairwise(words))
        started.append(options)
        if "jaxgpt" in words:
            made = Run(Path(options["--runs-dir"], options["--run"]))
            made.path.mkdir(parents=True)
            lines = [f'{{"step": {step}, "val_loss": {loss}}}\n' for step, loss in enumerate((4.2, 1.8, 1.9))]
            made.metrics_file.write_text("".join(lines))
            for seconds in (9.0, 0.1, 0.3, 0.2):
                made.event("evaluate", paused=seconds)
        else:
            Path(options["--out"]).write_text('{"seconds": 5.0, "loss": 1.7}')
        return {"seconds": 8.0, "others": 0.0}

    monkeypatch.setattr(programs, "timed", run)
    return started


def test_the_warm_run_finds_the_cache_of_the_cold_run_and_is_the_last_in_its_folder(processes, tmp_path):
    folder = tmp_path / "folder"
    for cache in ("cold", "warm"):
        run = Run(folder / "runs" / cache)
        found = programs.run_ours("text", run, "cpu", "shakespeare-cpu", seed=8, bound=None)
        assert folder.exists() == (cache == "cold")
        assert found == {"seed": 8, "seconds": 8.0, "loss": 1.9, "pause": 0.2, "others": 0.0}
    for options in processes:
        assert (options["train"], options["--corpus"]) == ("shakespeare-cpu", "text")
        assert (options["--seed"], options["--runs-dir"]) == ("8", str(folder / "runs"))
    assert processes[0]["--data-dir"] != processes[1]["--data-dir"], "each prepares its text"


@pytest.mark.parametrize(
    ("device", "theirs"),
    [("cpu", ("shakespeare-cpu", "float32", "cpu")), ("gpu", ("shakespeare-gpu", "bfloat16+compile", "cuda"))],
)
def test_the_twin_runs_as_nanogpt_does_by_default(device, theirs, processes, tmp_path):
    before = time.monotonic()
    found = programs.run_twin("text", tmp_path / "folder", device, seed=8)
    assert found["seconds"] == 5.0, "until its weights are saved, not until its loss is computed"
    (options,) = processes
    assert (options["--recipe"], options["--way"], options["--device"]) == theirs
    assert (options["--data"], options["--seed"]) == ("text", "8")
    assert before <= float(options["--began"]) <= time.monotonic()


def test_each_seed_of_a_speedrun_starts_without_caches(monkeypatch):
    found = []

    def done(folder, cache):
        found.append((folder, cache))
        return {"seconds": 1.0, "loss": 1.0, "others": 0.0}

    monkeypatch.setattr(programs, "require", lambda library: None)
    monkeypatch.setattr(programs, "run_ours", lambda corpus, run, *given: done(run.path.parents[1], run.path.name))
    monkeypatch.setattr(programs, "run_twin", lambda corpus, folder, *given: done(folder, "twin"))
    programs.speedrun("text", recipes=("shakespeare-cpu", "speedrun-cpu"), repeats=2)
    of = {kind: [folder for folder, cache in found if cache == kind] for kind in ("cold", "warm", "twin")}
    assert of["cold"] == of["warm"]
    assert len({*of["cold"], *of["twin"]}) == 6


@pytest.mark.parametrize(("bound", "expected"), [(1.8, [False, False, True, True]), (1.0, [False] * 3 + [True])])
def test_a_run_is_over_at_its_first_evaluation_that_reaches_the_bound(bound, expected, monkeypatch, tmp_path):
    """Or with its last step; its loss is the least so far."""
    over = []

    made = Run(tmp_path / "runs" / "cold")

    def run(words, folder, device, until):
        lines = '{"step": 0, "val_loss": null}\n'
        made.path.mkdir(parents=True)
        over.append(until())
        for step, loss in ((1, 1.9), (2, 1.75)):
            lines += f'{{"step": {step}, "val_loss": {loss}}}\n'
            made.metrics_file.write_text(lines + '{"step": 3, "val_loss": 0')  # the next line is being written
            over.append(until())
        made.event("end")
        over.append(until())
        return {"seconds": 8.0, "others": 0.0}

    monkeypatch.setattr(programs, "timed", run)
    found = programs.run_ours("text", made, "cpu", "speedrun-cpu", seed=8, bound=bound)
    assert over == expected
    assert found["loss"] == 1.75


def test_a_speedrun_may_stop_at_the_bound_without_the_twin(monkeypatch):
    bounds = []

    def run(corpus, run, device, name, seed, bound):
        bounds.append(bound)
        return {"seconds": 3.0, "loss": 1.4, "pause": 0.5, "others": 0.0}

    monkeypatch.setattr(programs, "run_ours", run)
    monkeypatch.delattr(programs, "require")
    monkeypatch.delattr(programs, "run_twin")
    report = programs.speedrun("text", recipes=("speedrun-cpu",), repeats=2, bound=1.5, stop=True)
    (table,) = report["tables"]
    assert bounds == [1.5] * 4
    assert table["title"] == "From process start to a loss of 1.5, 2 seeds"
    assert [row["run"] for row in table["rows"]] == ["speedrun-cpu cold", "speedrun-cpu warm"]
    for row in table["rows"]:
        assert (row["torch / this"], row["pause, s"]["median"], row["reached 1.5"]) == (None, 0.5, "2 of 2")


def test_the_first_step_is_over_once_its_gradient_is_in_the_metrics(monkeypatch):
    started = []

    def run(words, folder, device, until=None):
        if until:
            started.append(words)
            metrics = Run(folder / "runs" / words[words.index("--run") + 1]).metrics_file
            metrics.parent.mkdir(parents=True, exist_ok=True)
            seen = [until()]
            for line in ('{"step": 0, "val_loss": 4.2}\n', '{"step": 1, "loss": 4.1, "grad_norm": 1.0}\n'):
                metrics.write_text(line)
                seen.append(until())
            assert seen == [False, False, True]
        return {"seconds": 1.0, "others": 0.0}

    monkeypatch.setattr(programs, "timed", run)
    programs.startup(tokenizer="byte", recipe="shakespeare-cpu", repeats=1)
    for words in started:
        options = dict(pairwise(words))
        assert (options["train"], options["--scan-steps"]) == ("shakespeare-cpu", "1")
        assert options["--tokenizer"] == "byte"
