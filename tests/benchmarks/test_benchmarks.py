"""`scripts/bench`: its arithmetic, its checks of arguments and the order of its runs, mostly with fake programs."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import types
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels
from jaxgpt.config import ModelConfig, OptimizerConfig, UsageError
from scripts.benchmarks import ablation, attention, contest, contestants, groups, programs, rates, shapes
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


def test_jaxgpt_and_torch_train_on_the_tokens_that_they_count():
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    tree = dataclasses.asdict(config_of("micro", "cpu"))
    ours = contestants.build("train jaxgpt", tree)
    theirs = contestants.build("train torch", tree, way="float32", device="cpu")
    load, loaded, before = ours.load, [], theirs.training.steps
    ours.load = lambda begin, end: loaded.append((begin, end)) or load(begin, end)
    for contestant in (ours, theirs):
        assert contestant.run() == 2 * 2 * 8, "2 steps of 2 windows of 8 tokens"
        contestant.wait()
        assert contestant.peak_bytes() > 1e7
    ours.run()
    assert loaded == [(2, 4), (4, 6)], "after the steps that warm up"
    assert theirs.training.steps == before + 2
    assert ours.about["compile_seconds"] > 0
    assert theirs.about["compile_seconds"] == 0, "nothing is compiled"
    waited = []
    ours.state = types.SimpleNamespace(block_until_ready=lambda: waited.append(True))
    ours.wait()
    assert waited


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
    assert all(0 < float(row["error"]) < 0.02 and row["repeatable"] for row in rows)
    with pytest.raises(UsageError, match="default device is a cpu, not a gpu"):
        measure("gpu")
    correct = kernels.blocked
    monkeypatch.setattr(kernels, "blocked", lambda *given: 1.1 * correct(*given))
    assert [float(row["error"]) > 0.05 for row in measure()["tables"][0]["rows"]] == [False, True, False, True]
    monkeypatch.setattr(kernels, "blocked", lambda *given: 1 / 0)
    broken = ["blocked, micro, dropout 0.0", "blocked, micro, dropout 0.2"]
    assert measure()["failed"] == dict.fromkeys(broken, "division by zero")
    monkeypatch.setattr(kernels, "blocked", lambda *given: next(iter(())))
    assert measure()["failed"] == dict.fromkeys(broken, "StopIteration")
    with pytest.raises(UsageError, match="the number of rounds is 0, expected 1 or more"):
        measure(rounds=0)


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


@pytest.mark.parametrize(("way", "precision"), [("float32", "highest"), ("tf32", "high"), ("bfloat16", "high")])
def test_torch_uses_tf32_only_where_its_way_says_so(way, precision):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    from scripts.benchmarks import twin

    contestants.TorchContestant("cpu", twin.WAYS[way])
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert found == precision


def test_every_side_samples_the_same_number_of_tokens_with_the_same_settings(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    from jaxgpt import sample
    from scripts.benchmarks import twin

    asked = []

    def ours(config, params, prompt, n_tokens, key, draw):
        asked.append((prompt.shape, n_tokens, draw.temperature, draw.top_k))
        return np.zeros((len(prompt), n_tokens))

    def theirs(model, prompt, n_tokens, temperature, top_k, way):
        asked.append((tuple(prompt.shape), n_tokens, temperature, top_k))
        assert way == twin.WAYS["bfloat16"]

    monkeypatch.setattr(sample, "generate", ours)
    monkeypatch.setattr(twin, "sample", theirs)
    tree = dataclasses.asdict(config_of("micro", "cpu"))
    settings = {"batch_size": 3, "n_tokens": 5, "temperature": 0.7, "top_k": 4}
    for task, more in {"sample jaxgpt": {}, "sample torch": {"way": "bfloat16", "device": "cpu"}}.items():
        contestant = contestants.build(task, tree, **settings, **more)
        asked.clear()
        assert contestant.run() == 3 * 5
        assert asked == [((3, 1), 5, 0.7, 4)]


@pytest.mark.parametrize("way", ["float32", "bfloat16"])
def test_transformers_samples_the_same_model_with_its_cache(way, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    transformers = pytest.importorskip("transformers", reason="needs PyTorch: pip install --group bench")
    asked = {}

    def generate(model, prompt, **given):
        asked.update(given, dtype=model.dtype, sizes=(model.config.n_layer, model.config.n_head, model.config.n_embd))
        return torch.zeros((len(prompt), 1 + given["max_new_tokens"]))

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "generate", generate)
    settings = {"batch_size": 3, "n_tokens": 5, "temperature": 0.7, "top_k": 4, "way": way, "device": "cpu"}
    contestant = contestants.build("sample transformers", dataclasses.asdict(config_of("micro", "cpu")), **settings)
    assert contestant.run() == 3 * 5
    assert (asked["temperature"], asked["top_k"], asked["do_sample"], asked["use_cache"]) == (0.7, 4, True, True)
    assert (asked["dtype"], asked["sizes"]) == (getattr(torch, way), (1, 2, 16))
    assert asked["min_new_tokens"] == 5, "no text ends early"


def test_training_rows_are_per_step_and_of_the_median_round():
    config = config_of("micro", "cpu")
    assert shapes.tokens_per_step(config) == 2 * 8
    told = types.SimpleNamespace(about={"a": {"compile_seconds": 9.0}}, peak_bytes={"a": 5_000_000})
    (row,) = rates.training_rows(config, {"a": [32.0, 64.0, 640.0]}, told)
    assert row["tokens/s"]["median"] == 64.0
    assert row["ms/step"] == 250.0
    assert row["GFLOP/s"] == pytest.approx(shapes.flops_per_step(config) / 0.25 / 1e9)
    assert (row["compiling, s"], row["peak memory, MB"]) == (9.0, 5.0)


def test_a_step_takes_six_flops_for_each_weight_and_token():
    """Two in the forward pass, four in the backward pass; attention adds a sixth to those of GPT-2 124M."""
    config = config_of("small", "gpu")
    assert shapes.flops_per_step(config) == pytest.approx(6 * 124e6 * shapes.tokens_per_step(config) * 7 / 6, rel=0.05)


def test_a_shape_has_the_settings_that_are_asked_for():
    assert [config_of("small", device).train.batch_size for device in ("cpu", "gpu")] == [1, 8]
    assert [config_of("baby", device).train.scan_steps for device in ("cpu", "gpu")] == [1, 50]
    model = config_of("baby", "gpu", "bfloat16", dropout=0.2).model
    assert (model.precision, model.dropout) == ("bfloat16", 0.2)


@pytest.fixture
def compared(monkeypatch):
    """The calls of `rates.compare`, whose contestants all have 6 tokens per second, or those of jaxgpt 12."""
    calls = []

    def compare(device, entrants, rounds, seconds):
        calls.append(({name: spec for name, (spec, _) in entrants.items()}, device, rounds, seconds))
        about = {name: {"compile_seconds": 1.0, "first_seconds": 1.0, "device": device} for name in entrants}
        held = types.SimpleNamespace(about=about, peak_bytes=dict.fromkeys(entrants, 1), others=[0.5])
        held.facts, held.failed = (lambda: {"device": device}), {"gone": "no memory"}
        return held, {name: [12.0 if name.startswith("jaxgpt") else 6.0] for name in entrants}

    monkeypatch.setattr(rates, "compare", compare)
    monkeypatch.setattr(rates, "require", lambda *libraries: None)
    return calls


def test_training_is_compared_with_equal_settings_on_both_sides(compared):
    report = rates.train(shapes=("micro",), rounds=2, seconds=0.5, dropout=0.1, ways=("bfloat16",))
    ((specs, *given),) = compared
    assert given == ["cpu", 2, 0.5]
    assert list(specs) == ["jaxgpt float32", "jaxgpt bfloat16", "torch bfloat16"]
    configs = [spec["config"] for spec in specs.values()]
    assert [config["model"].pop("precision") for config in configs[:2]] == ["float32", "bfloat16"]
    del configs[2]["model"]["precision"]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["model"]["dropout"] == 0.1
    assert report["failed"] == {"micro, gone": "no memory"}
    assert "NOT QUIET" in report["notes"][-1]


def test_sampling_is_compared_with_equal_settings_on_both_sides(compared):
    report = rates.sample(cases=("micro:3:20",), rounds=2, seconds=0.5, ways=("float32",))
    assert [given for _, *given in compared] == [["cpu", 2, 0.5]] * 2
    assert [[spec["n_tokens"] for spec in specs.values()] for specs, *_ in compared] == [[20] * 3, [7] * 3]
    for specs, *_ in compared:
        first, second, theirs = specs.values()
        assert second["config"]["model"].pop("precision") == "bfloat16"
        assert first["config"]["model"].pop("precision") == theirs["config"]["model"].pop("precision") == "float32"
        same = ("config", "batch_size", "n_tokens", "temperature", "top_k")
        assert [first[name] for name in same] == [second[name] for name in same] == [theirs[name] for name in same]
    ratios, each = (table["rows"] for table in report["tables"])
    assert [(row["variant"], row["ratio"]["median"], row["against"]) for row in ratios] == [
        (f"jaxgpt {precision}", 2.0, f"{library} float32")
        for library in ("torch", "transformers")
        for precision in ("float32", "bfloat16")
    ]
    assert len(each) == 6


def test_a_comparison_starts_with_empty_compile_caches_and_the_settings_of_each(monkeypatch):
    started = {}

    class Held(contest.Contest):
        def enter(self, name, arguments, env):
            assert not os.listdir(env["TORCHINDUCTOR_CACHE_DIR"])
            assert not os.listdir(env["TRITON_CACHE_DIR"])
            started[name] = env

        def measure(self, rounds, seconds):
            return {"asked": [rounds, seconds]}

    monkeypatch.setattr(rates, "Contest", Held)
    entrants = rates.training_entrants(config_of("micro", "gpu"), "gpu", ("tf32",))
    assert rates.compare("gpu", entrants, 2, 0.5)[1] == {"asked": [2, 0.5]}
    assert started["jaxgpt float32"]["JAX_DEFAULT_MATMUL_PRECISION"] == "float32", "not TF32"
    assert "JAX_DEFAULT_MATMUL_PRECISION" not in started["jaxgpt tf32"]


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
    monkeypatch.setattr(programs.timing, "others", lambda before, after, seconds: own.append(seconds) or 0.0)
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
            metrics = place.metrics(options["--run"])
            metrics.parent.mkdir(parents=True, exist_ok=True)
            metrics.write_text("".join(f'{{"val_loss": {loss}}}\n' for loss in (4.2, 1.8, 1.9)))
        else:
            Path(options["--out"]).write_text('{"seconds": 5.0, "loss": 1.7}')
        return 8.0, 0.0

    monkeypatch.setattr(Place, "run", run)
    return started


def test_the_warm_run_finds_the_cache_of_the_cold_run_and_is_the_last_in_its_place(processes, tmp_path):
    place = Place(tmp_path / "place", "cpu")
    for cache in ("cold", "warm"):
        found = programs.run_ours("text", place, "shakespeare-cpu", cache, seed=8, steps=5)
        assert place.folder.exists() == (cache == "cold")
        assert found == {"seed": 8, "seconds": 8.0, "loss": 1.9, "others": 0.0}
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

    def run(corpus, place, name, cache, seed, steps):
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
            metrics = place.metrics(words[words.index("--run") + 1])
            metrics.parent.mkdir(parents=True, exist_ok=True)
            seen = [until()]
            for line in ('{"step": 0, "val_loss": 4.2}\n', '{"step": 1, "loss": 4.1, "grad_norm": 1.0}\n'):
                metrics.write_text(line)
                seen.append(until())
            assert seen == [False, False, True]
        return 1.0, 0.0

    monkeypatch.setattr(Place, "run", run)
    programs.startup(corpus="text", recipe="shakespeare-cpu", repeats=1)
    for words in started:
        options = dict(pairwise(words))
        assert (options["train"], options["--corpus"], options["--scan-steps"]) == ("shakespeare-cpu", "text", "1")


def test_an_ablation_changes_one_option_of_its_base_at_a_time(monkeypatch):
    """Each row is compared with the first of its table; below zero is better."""
    trained = []

    def run(corpus, change, seeds, steps, layers):
        assert (corpus, seeds, steps, layers) == ("the corpus", 2, 30, 1)
        trained.append(change)
        loss = 2.0 if change in (ablation.PLAIN, ablation.ALL) else 1.9
        return [(loss, 0.01)] * 2

    monkeypatch.setattr(ablation, "trained", run)
    monkeypatch.setattr(ablation, "use_compile_cache", lambda: None)
    monkeypatch.setattr(ablation, "prepare_corpus", lambda *given, **more: types.SimpleNamespace(corpus="the corpus"))
    report = ablation.ablate(seeds=2, steps=30, layers=1)
    bases = [(ablation.PLAIN, ablation.ADDED), (ablation.ALL, ablation.REMOVED)]
    assert trained == [
        (base[0] | model, base[1] | optimizer)
        for base, changes in bases
        for model, optimizer in [({}, {}), *changes.values()]
    ]
    for table in report["tables"]:
        assert [row["change"] for row in table["rows"][1:]] == ["-0.1000 ± 0.0000"] * (len(table["rows"]) - 1)


def test_an_ablation_trains_each_seed_and_scores_the_validation_split(monkeypatch):
    """The time of a step is the least after the first chunk, which may compile or find its program."""
    clock, configs = [0.0], []

    def train_steps(state, seconds):
        state.seconds = seconds
        return state, None

    def wait(state):
        clock[0] += state.seconds

    def score(model, params, tokens, tokenizer):
        return types.SimpleNamespace(loss=len(configs) if tokens == "val" else math.nan)

    def feed(config, tokens, mesh):
        configs.append(config)
        assert tokens == "train"
        return lambda begin, end: [{0: 3.0, 3: 6.0, 6: 9.0}[begin]]

    monkeypatch.setattr(ablation, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(ablation.jax, "block_until_ready", wait)
    monkeypatch.setattr(ablation, "loader", feed)
    monkeypatch.setattr(ablation, "sharded_init", lambda config, mesh: types.SimpleNamespace(params=None))
    monkeypatch.setattr(ablation, "jit_train_steps", lambda config, mesh: train_steps)
    monkeypatch.setattr(ablation, "evaluate", score)
    tokenizer = types.SimpleNamespace(vocab_size=13)
    corpus = types.SimpleNamespace(tokenizer=tokenizer, split=lambda data: ("train", "val"))
    results = ablation.trained(corpus, ablation.PLAIN, seeds=2, steps=9, n_layer=3)
    assert results == [(1, 2.0), (2, 2.0)]
    assert [config.train.seed for config in configs] == [1337, 1338]
    for config in configs:
        assert (config.model.n_layer, config.model.tie_weights, config.optimizer.schedule) == (3, False, "linear")
        assert config.optimizer.warmup_steps == 3


def test_attention_is_timed_until_the_device_is_done_and_must_repeat_in_every_round(monkeypatch):
    clock, found = [0.0], iter([1.0, 1.0, 2.0, 1.0])

    def wait(value):
        clock[0] += 0.002
        return value

    monkeypatch.setattr(attention, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(attention.jax, "block_until_ready", wait)
    calls = {"steady": lambda x: (x,), "changing": lambda x: (x * next(found),)}
    steady, changing = attention.measured(calls, jnp.ones((1, 3)), (jnp.ones(3),), rounds=3)
    assert (steady[1]["ms"]["median"], changing[1]["ms"]["n"]) == (pytest.approx(2.0), 3)
    assert (steady[1]["repeatable"], changing[1]["repeatable"]) == (True, False)


def test_attention_drops_the_share_of_weights_that_is_asked_for():
    """The first token attends to itself alone: its output is 0 or 1 / 0.8."""
    zeros = jnp.zeros((64, 2, 8, 8))
    out, *_ = attention.compiled(config_of("micro", "cpu").model, "reference", 0.2)(zeros, zeros, zeros + 1, zeros)
    kept = out[:, :, 0]
    assert kept.max() == 1.25
    assert 0.1 < float((kept == 0).mean()) < 0.3


def test_the_error_of_attention_is_the_largest_of_its_output_and_gradients():
    found, exact = [jnp.array([1.0, 4.0]), jnp.array([3.0])], [jnp.array([2.0, 4.0]), jnp.array([2.0])]
    assert attention.error(found, exact) == 0.5
    assert attention.error(found, [found[0], exact[1]]) == 0.5


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
    groups._measure(groups.GROUPS["gpu"][0], "gpu", tmp_path, 60)
    assert (tmp_path / "error.txt").read_text() == "exit code -9"
    assert not (tmp_path / "table.md").exists()


def test_a_group_starts_only_if_it_fits_and_is_stopped_after_twice_its_time(called, tmp_path, monkeypatch, capsys):
    kinds = [("a", 0.5, "broken 0.5"), ("b", 2, "train 3"), ("c", 4, "sample 4"), ("d", 1, "startup 9")]
    monkeypatch.setattr(groups, "GROUPS", {"gpu": [groups._group(*kind) for kind in kinds]})
    groups.run_all("gpu", 6, tmp_path)
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
    groups.run_all("gpu", 4.5, tmp_path)
    assert [(name, seconds) for name, _, seconds in called[3:]] == [("a", 60.0), ("c", 240.0)]


def script(name):
    """A program of scripts/ as a module."""
    path = Path(__file__).parents[2] / "scripts" / name
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def test_every_mode_has_its_function():
    names = {name: run.__name__ for name, run in script("bench").MODES.items()}
    assert names.pop("ablate") == "ablate"
    assert names.pop("all") == "run_all"
    assert all(name == function for name, function in names.items())


def test_bench_saves_the_report_of_its_mode_and_returns_a_status(tmp_path, monkeypatch, capsys):
    bench = script("bench")
    monkeypatch.chdir(tmp_path)

    def train(rounds: int = 5, seconds: float = 1.0) -> dict:
        """Training."""
        if rounds < 1:
            raise UsageError(f"rounds is {rounds}")
        return {"mode": "train", "facts": {}, "failed": {}, "notes": [f"{rounds} of {seconds}"], "tables": []}

    def run_all() -> int:
        """All."""
        return 0

    monkeypatch.setattr(bench, "MODES", {"train": train, "all": run_all})
    assert bench.main("train", "--rounds", "2", "--seconds", "3.5") == 0
    assert "- 2 of 3.5" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench-train.json"]
    assert json.loads(Path("bench-train.json").read_text())["mode"] == "train"
    assert bench.main("train", "--rounds", "0") == 2
    assert capsys.readouterr().err == "scripts/bench: rounds is 0\n"
    assert (bench.main("all"), bench.main("nonsense"), bench.main("--help"), bench.main()) == (0, 2, 0, 0)


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
