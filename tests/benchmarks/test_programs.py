"""Whole programs that `scripts/bench` times: `speedrun` and `startup`, mostly with fake processes."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from jaxgpt.config import UsageError
from scripts.benchmarks import contest, programs
from scripts.benchmarks.programs import Place


def test_a_process_is_timed_until_it_exits(tmp_path):
    seconds, others = Place(tmp_path, "cpu").run(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(0.2)"])
    assert seconds > 0.2
    assert 0 <= others <= 1


def test_a_process_is_timed_until_the_condition_holds(tmp_path):
    path = tmp_path / "created"
    code = f"open({str(path)!r}, 'w').close(); import time; time.sleep(60)"
    seconds, _ = Place(tmp_path, "cpu").run(["timeit", "-n", "1", "-r", "1", code], until=path.exists)
    assert seconds < 50


@pytest.mark.parametrize("until", [None, lambda: False])
def test_a_failed_process_is_reported_with_its_error(until, tmp_path):
    with pytest.raises(contest.WorkerError, match=r"jaxgpt nonsense: exit code 2: .*"):
        Place(tmp_path, "cpu").run(["jaxgpt", "nonsense"], until)


def test_speedrun_alternates_runs_and_compares_them(monkeypatch):
    """The ratio is the time of the PyTorch twin divided by that of jaxgpt; losses are compared with the bound."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    ran = []

    def run_jaxgpt(corpus, place, name, cache, seed, steps, bound):
        assert bound is None
        ran.append((f"{name} {cache}", seed))
        seconds = (10.0, 20.0, 30.0)[seed - 7] / (2 if cache == "warm" else 1)
        return {"seconds": seconds, "loss": (1.87, 1.88, 1.89)[seed - 7], "others": 0.0}

    def run_torch(corpus, place, seed, steps):
        ran.append(("torch", seed))
        return {"seconds": 20.0, "loss": 1.9, "others": 0.5}

    monkeypatch.setattr(programs, "run_ours", run_jaxgpt)
    monkeypatch.setattr(programs, "run_twin", run_torch)
    report = programs.speedrun("text", recipes=("shakespeare-cpu",), repeats=3, seed=7)
    names = ("torch", "shakespeare-cpu cold", "shakespeare-cpu warm")
    assert ran == [(name, seed) for seed in (7, 8, 9) for name in names]
    torch, cold, warm = report["tables"][0]["rows"]
    assert cold["torch / this"] == {"median": 1.0, "low": pytest.approx(2 / 3), "high": 2.0, "n": 3}
    assert warm["torch / this"]["median"] == 2.0
    assert (cold["within torch's time"], warm["within torch's time"]) == (False, True)
    assert (cold["reached 1.88"], torch["reached 1.88"]) == ("2 of 3", "0 of 3")
    assert cold["mean loss"] == "1.8800"
    assert "NOT QUIET" in report["notes"][-1]
    with pytest.raises(UsageError, match="no recipe 'nonsense'"):
        programs.speedrun("text", recipes=("nonsense",))


def test_a_failed_cold_run_skips_the_warm_run(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")

    def run_jaxgpt(corpus, place, name, cache, seed, steps, bound):
        assert cache == "cold"
        raise contest.WorkerError("no disk")

    monkeypatch.setattr(programs, "run_ours", run_jaxgpt)
    monkeypatch.setattr(programs, "run_twin", lambda *given: {"seconds": 2.0, "loss": 1.9, "others": 0.0})
    report = programs.speedrun("text", recipes=("shakespeare-cpu",), repeats=2)
    assert set(report["failed"]) == {"shakespeare-cpu cold", "shakespeare-cpu warm"}
    assert [row["run"] for row in report["tables"][0]["rows"]] == ["torch"]


def test_startup_measures_help_cold_and_warm_in_each_round(monkeypatch):
    ran = []

    def run(place, args, until=None):
        ran.append((place.folder.name, args[1], "--run" in args and args[args.index("--run") + 1]))
        return (1.0 if args[1] == "--help" else 3.0), 0.0

    monkeypatch.setattr(Place, "run", run)
    report = programs.startup(repeats=2)
    kinds = (("--help", False), ("train", "cold"), ("train", "warm"))
    assert ran == [(turn, *kind) for turn in ("0", "1") for kind in kinds], "warm runs share the folder of cold runs"
    rows = {row["what"]: row["seconds"]["median"] for row in report["tables"][0]["rows"]}
    assert rows == {"help": 1.0, "first step cold": 3.0, "first step warm": 3.0}


def test_a_process_has_its_own_caches_and_the_time_of_its_start(tmp_path):
    code = "import os, sys; open(sys.argv[-1], 'w').write(os.environ['XDG_CACHE_HOME'] + ' {began}')"
    (tmp_path / "own").mkdir()
    before = time.monotonic()
    words = ["timeit", "-n", "1", "-r", "1", code.replace("sys.argv[-1]", repr(str(tmp_path / "out")))]
    seconds, _ = Place(tmp_path / "own", "cpu").run(words)
    cache, began = (tmp_path / "out").read_text().split()
    assert cache == str(tmp_path / "own" / "cache")
    assert before <= float(began) <= time.monotonic() - seconds + 0.1


def test_only_the_processor_time_of_this_process_is_not_of_others(tmp_path, monkeypatch):
    own = []
    monkeypatch.setattr(programs.load, "others", lambda before, after, seconds: own.append(seconds) or 0.0)
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    for code in (busy, "pass"):
        Place(tmp_path, "cpu").run(["timeit", "-n", "1", "-r", "1", code])
    assert own[0] >= 0.39
    assert own[1] < 0.39


def test_a_process_that_ends_before_the_condition_holds_has_failed(tmp_path):
    with pytest.raises(contest.WorkerError, match="exit code 0"):
        Place(tmp_path, "cpu").run(["timeit", "-n", "1", "-r", "1", "pass"], until=lambda: False)


@pytest.fixture
def processes(monkeypatch):
    """The options of each process of `Place.run`, which writes three losses, the last neither first nor least."""
    started = []

    def run(place, words, until=None):
        options = dict(pairwise(words))
        started.append(options)
        if "jaxgpt" in words:
            made = place.opened(options["--run"])
            made.path.mkdir(parents=True, exist_ok=True)
            made.metrics_file.write_text("".join(f'{{"val_loss": {loss}}}\n' for loss in (4.2, 1.8, 1.9)))
            for seconds in (9.0, 0.1, 0.3, 0.2):
                made.event("evaluate", paused=seconds)
        else:
            Path(options["--out"]).write_text('{"seconds": 5.0, "loss": 1.7}')
        return 8.0, 0.0

    monkeypatch.setattr(Place, "run", run)
    return started


def test_the_warm_run_finds_the_cache_of_the_cold_run_and_is_the_last_in_its_place(processes, tmp_path):
    place = Place(tmp_path / "place", "cpu")
    for cache in ("cold", "warm"):
        found = programs.run_ours("text", place, "shakespeare-cpu", cache, seed=8, steps=5, bound=None)
        assert place.folder.exists() == (cache == "cold")
        assert found == {"seed": 8, "seconds": 8.0, "loss": 1.9, "pause": 0.2, "others": 0.0}
    for options in processes:
        assert (options["train"], options["--corpus"]) == ("shakespeare-cpu", "text")
        assert (options["--seed"], options["--steps"]) == ("8", "5")
    assert processes[0]["--data-dir"] != processes[1]["--data-dir"], "each prepares its text"


@pytest.mark.parametrize(
    ("device", "theirs"),
    [("cpu", ("shakespeare-cpu", "float32", "cpu")), ("gpu", ("shakespeare-gpu", "bfloat16+compile", "cuda"))],
)
def test_the_twin_runs_as_nanogpt_does_by_default(device, theirs, processes, tmp_path):
    found = programs.run_twin("text", Place(tmp_path / "place", device), seed=8, steps=5)
    assert found["seconds"] == 5.0, "until its weights are saved, not until its loss is computed"
    (options,) = processes
    assert (options["--recipe"], options["--way"], options["--device"]) == theirs
    assert (options["--data"], options["--seed"], options["--steps"]) == ("text", "8", "5")
    assert options["--began"] == "{began}"


def test_each_seed_of_a_speedrun_starts_without_caches(monkeypatch):
    found = []

    def run(corpus, place, name, cache, seed, steps, bound=None):
        found.append((place.folder, cache, steps))
        return {"seconds": 1.0, "loss": 1.0, "others": 0.0}

    monkeypatch.setattr(programs, "require", lambda library: None)
    monkeypatch.setattr(programs, "run_ours", run)
    monkeypatch.setattr(programs, "run_twin", lambda corpus, place, *given: run(corpus, place, "", "twin", *given))
    programs.speedrun("text", recipes=("shakespeare-cpu", "speedrun-cpu"), repeats=2, steps=30, twin_steps=20)
    of = {kind: [place for place, cache, _ in found if cache == kind] for kind in ("cold", "warm", "twin")}
    assert of["cold"] == of["warm"]
    assert len({*of["cold"], *of["twin"]}) == 6
    assert {(cache, steps) for _, cache, steps in found} == {("cold", 30), ("warm", 30), ("twin", 20)}


@pytest.mark.parametrize(("bound", "expected"), [(1.8, [False, False, True, True]), (1.0, [False] * 3 + [True])])
def test_a_run_is_over_at_its_first_evaluation_that_reaches_the_bound(bound, expected, monkeypatch, tmp_path):
    """Or with its last step; its loss is the least so far."""
    over = []

    def run(place, words, until):
        made, lines = place.opened("cold"), '{"val_loss": null}\n'
        made.path.mkdir(parents=True)
        over.append(until())
        for loss in (1.9, 1.75):
            lines += f'{{"val_loss": {loss}}}\n'
            made.metrics_file.write_text(lines + '{"val_loss": 0')  # the next line is being written
            over.append(until())
        made.event("end")
        over.append(until())
        return 8.0, 0.0

    monkeypatch.setattr(Place, "run", run)
    found = programs.run_ours("text", Place(tmp_path, "cpu"), "speedrun-cpu", "cold", seed=8, steps=0, bound=bound)
    assert over == expected
    assert found["loss"] == 1.75


def test_a_speedrun_without_the_twin_may_stop_at_the_bound(monkeypatch):
    bounds = []

    def run(corpus, place, name, cache, seed, steps, bound):
        bounds.append(bound)
        return {"seconds": 3.0, "loss": 1.4, "pause": 0.5, "others": 0.0}

    monkeypatch.setattr(programs, "run_ours", run)
    monkeypatch.delattr(programs, "require")
    monkeypatch.delattr(programs, "run_twin")
    report = programs.speedrun("text", recipes=("speedrun-cpu",), repeats=2, bound=1.5, stop=True, twin=False)
    (table,) = report["tables"]
    assert bounds == [1.5] * 4
    assert table["title"] == "From process start to a loss of 1.5, 2 seeds"
    assert [row["run"] for row in table["rows"]] == ["speedrun-cpu cold", "speedrun-cpu warm"]
    for row in table["rows"]:
        assert (row["torch / this"], row["pause, s"]["median"], row["reached 1.5"]) == (None, 0.5, "2 of 2")


def test_a_row_of_a_speedrun_compares_every_seed():
    runs = [{"loss": loss} for loss in (1.88, 1.9, 2.1)]
    row = programs.speedrun_row("ours", [1.0, 3.0, 1.0], [2.0, 2.0, 2.0], runs, 1.88)
    assert row["within torch's time"] is False
    assert row["mean loss"] == "1.9600"
    assert row["reached 1.88"] == "1 of 3"


def test_the_first_step_is_over_once_its_gradient_is_in_the_metrics(monkeypatch):
    started = []

    def run(place, words, until=None):
        if until:
            started.append(words)
            metrics = place.opened(words[words.index("--run") + 1]).metrics_file
            metrics.parent.mkdir(parents=True, exist_ok=True)
            seen = [until()]
            for line in ('{"step": 0, "val_loss": 4.2}\n', '{"step": 1, "loss": 4.1, "grad_norm": 1.0}\n'):
                metrics.write_text(line)
                seen.append(until())
            assert seen == [False, False, True]
        return 1.0, 0.0

    monkeypatch.setattr(Place, "run", run)
    programs.startup(corpus="text", tokenizer="byte", recipe="shakespeare-cpu", repeats=1)
    for words in started:
        options = dict(pairwise(words))
        assert (options["train"], options["--corpus"], options["--scan-steps"]) == ("shakespeare-cpu", "text", "1")
        assert options["--tokenizer"] == "byte"
