"""`scripts/bench`: its arithmetic, its checks of arguments and the order of its runs, mostly with fake programs."""

import dataclasses
import math
import subprocess
import sys
import types
from functools import partial

import pytest

from jaxgpt import kernels
from jaxgpt.config import ModelConfig, OptimizerConfig, UsageError
from scripts.benchmarks import ablation, attention, contest, contestants, groups, programs, rates
from scripts.benchmarks.programs import Place
from scripts.benchmarks.shapes import config_of


def test_training_ratios_compare_with_the_fastest_torch_variants():
    found = {"jaxgpt float32": [6.0], "torch float32": [1.0], "torch float32+compile": [2.0], "torch bfloat16": [3.0]}
    (row,) = rates.training_ratios(found)
    assert [value["median"] for value in row.values() if isinstance(value, dict)] == [2.0, 3.0, 3.0]
    assert row["the best torch"] == "bfloat16"
    assert rates.training_ratios({"jaxgpt float32": [6.0]})[0]["/ best torch"] is None


def test_the_best_has_the_highest_median():
    found = {"a": [1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [8.0, 8.0, 8.0]}
    assert rates.best(found, ["a", "b", "gone"]) == "b"
    assert rates.best(found, ["gone"]) is None


def test_float32_and_tf32_have_different_settings_on_a_gpu():
    config = config_of("baby", "gpu")
    settings = {name: env for name, (_, env) in rates.training_entrants(config, "gpu", rates.WAYS["gpu"]).items()}
    assert settings["jaxgpt float32"] != settings["jaxgpt tf32"]
    assert {"torch float32", "torch tf32", "torch bfloat16", "torch bfloat16+compile"} <= set(settings)


@pytest.mark.parametrize("case", ["tiny", "tiny:", "tiny:0:5", "tiny:x", "tiny:1:2:3", "huge:1:5"])
def test_malformed_cases_are_refused(case):
    with pytest.raises(UsageError, match=r"expected|no shape"):
        rates.parse_case(case)


def test_parse_case():
    assert rates.parse_case("tiny:64") == ("tiny", 64, 512)
    assert rates.parse_case("baby:1:7") == ("baby", 1, 7)


def test_without_pytorch_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(rates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs torch, which is not installed: pip install --group bench"):
        rates.train()
    code = "import sys; sys.modules['torch'] = None; import scripts.benchmarks.twin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError: the PyTorch twin needs torch" in done.stderr


def test_jaxgpt_and_torch_count_the_same_tokens():
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    tree = dataclasses.asdict(config_of("micro", "cpu"))
    for task, settings in {"train jaxgpt": {}, "train torch": {"way": "float32", "device": "cpu"}}.items():
        contestant = contestants.build(task, tree, **settings)
        assert contestant.run() == 2 * 2 * 8, "2 steps of 2 windows of 8 tokens"
        contestant.wait()
        assert contestant.peak_bytes() > 1e7
        assert contestant.about["compile_seconds"] >= 0


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

    def run_jaxgpt(corpus, place, name, cache, seed, steps):
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


def test_the_load_average_is_that_before_the_measurement(load, monkeypatch):
    monkeypatch.setattr(programs, "require", lambda library: None)
    monkeypatch.setattr(contest, "alternate", lambda *args: load.append(9.0) or ({}, {}))
    monkeypatch.setattr(attention, "measured", lambda *args: load.append(9.0) or [])
    monkeypatch.setattr(ablation, "trained", lambda *args: load.append(9.0) or [(2.0, 0.01)])
    monkeypatch.setattr(ablation, "use_compile_cache", lambda: None)
    monkeypatch.setattr(ablation, "prepare_corpus", lambda *args, **kwargs: types.SimpleNamespace(corpus=None))
    micro = partial(attention.attention, shapes=("micro",))
    for measure in (programs.speedrun, programs.startup, micro, ablation.ablate):
        load[:] = [0.5]
        assert measure()["facts"]["load average before"] == 0.5
        assert load[-1] == 9.0


def test_a_failed_cold_run_skips_the_warm_run(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")

    def run_jaxgpt(corpus, place, name, cache, seed, steps):
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


def test_an_ablation_row_has_means_and_standard_errors():
    baseline = [(2.0, 0.010), (2.2, 0.012)]
    results = [(1.9, 0.020), (2.0, 0.022)]
    row = ablation.row("muon", results, baseline)
    assert row == {"option": "muon", "loss": "1.9500 ± 0.0500", "change": "-0.1500 ± 0.0500", "ms/step": 21.0}
    assert ablation.row("(nothing)", baseline, baseline)["change"] == ""
    assert math.isnan(ablation.standard_error([1.0]))
    with pytest.raises(UsageError, match="seeds is 0"):
        ablation.ablate(seeds=0)


def test_attention_kernels_are_measured_against_the_reference(monkeypatch):
    measure = partial(attention.attention, shapes=("micro",), rounds=1)
    rows = measure()["tables"][0]["rows"]
    assert [(row["dropout"], row["kernel"]) for row in rows] == [
        (rate, kernel) for rate in (0.0, 0.2) for kernel in ("reference", "blocked")
    ]
    assert all(float(row["error"]) < 0.02 and row["repeatable"] for row in rows)
    with pytest.raises(UsageError, match="default device is a cpu, not a gpu"):
        measure("gpu")
    correct = kernels.blocked
    monkeypatch.setattr(kernels, "blocked", lambda *given: 1.1 * correct(*given))
    assert [float(row["error"]) > 0.05 for row in measure()["tables"][0]["rows"]] == [False, True, False, True]
    monkeypatch.setattr(kernels, "blocked", lambda *given: 1 / 0)
    assert measure()["failed"] == dict.fromkeys(
        ["blocked, micro, dropout 0.0", "blocked, micro, dropout 0.2"], "division by zero"
    )


@pytest.mark.parametrize(("base", "changes"), [(ablation.PLAIN, ablation.ADDED), (ablation.ALL, ablation.REMOVED)])
def test_every_ablation_changes_something(base, changes):
    model, optimizer = base
    for name, (more, others) in changes.items():
        assert {**model, **more} != model or {**optimizer, **others} != optimizer, name
        dataclasses.replace(ModelConfig(), **{**model, **more})
        dataclasses.replace(OptimizerConfig(), **{**optimizer, **others})


def test_the_ablation_covers_every_option_of_a_block():
    plain, options = ModelConfig(), {name for model, _ in ablation.ADDED.values() for name in model}
    sizes = {"kind", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights"}
    assert options == set(vars(plain)) - sizes - {"init_scale", "gelu", "remat", "scan_layers", "deterministic"}


def test_run_all_continues_with_the_unmeasured_groups(tmp_path, monkeypatch, capsys):
    fake_groups = [
        groups.Group(name, tuple(line.split()), n)
        for name, line, n in (
            ("first", "startup --help", 1),
            ("broken", "startup --rounds x", 1),
            ("long", "sample --help", 5),
        )
    ]
    monkeypatch.setattr(groups, "GROUPS", {"cpu": fake_groups})
    groups.run_all("cpu", 2, tmp_path)
    out, err = capsys.readouterr()
    assert "usage: scripts/bench startup" in out
    assert "not measured yet: broken, long; call scripts/bench all --device cpu again" in out
    assert "broken failed" in err
    assert (tmp_path / "broken" / "error.txt").read_text()
    measured = []
    monkeypatch.setattr(groups, "_measure", lambda group, *_: measured.append(group.name))
    groups.run_all("cpu", 9, tmp_path)
    assert measured == ["broken", "long"]
