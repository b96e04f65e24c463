"""`scripts/bench`: rates, ratios, the settings of both sides, ablations and attention kernels."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import kernels
from jaxgpt.config import ModelConfig, UsageError, differences
from scripts.benchmarks import ablation, attention, contestants, programs, rates
from scripts.benchmarks.shapes import config_of


def test_ratios_are_against_the_fastest_torch_variants():
    found = {"jaxgpt float32": [6.0], "torch float32": [1.0], "torch float32+compile": [2.0], "torch bfloat16": [3.0]}
    (row,) = rates.against_torch(found)
    assert (row["/ the best"]["median"], row["the best"]) == (2.0, "torch bfloat16")
    assert row["/ the best of its precision"]["median"] == 3.0
    assert rates.against_torch({"jaxgpt float32": [6.0]})[0]["/ the best"] is None


def test_the_fastest_has_the_highest_median():
    found = {"a": [1.0, 9.0, 1.0], "b": [2.0, 2.0, 2.0], "c": [8.0, 8.0, 8.0]}
    assert rates.fastest(found, ["a", "b"]) == "b"
    assert rates.fastest(found, []) is None


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_float32_and_tf32_have_different_settings_on_a_gpu(mode):
    config = config_of("baby", "gpu")
    found = rates.entrants(mode, "torch", config, "gpu", ("float32", "bfloat16"), rates.WAYS["gpu"])
    settings = {name: env for name, (_, env) in found.items()}
    assert settings["jaxgpt float32"] == {"JAX_DEFAULT_MATMUL_PRECISION": "float32"}
    assert settings["jaxgpt tf32"] == settings["jaxgpt bfloat16"] == {}
    assert {"torch float32", "torch tf32", "torch bfloat16", "torch bfloat16+compile"} <= set(settings)


@pytest.mark.parametrize("case", ["tiny", "tiny:", "tiny:64", "tiny:0:5", "tiny:1:x", "tiny:1:2:3", "huge:1:5"])
def test_malformed_cases_are_refused(case):
    with pytest.raises(UsageError, match=r"expected|no shape"):
        rates.parse_case(case)


def test_parse_case():
    assert rates.parse_case("baby:1:7") == ("baby", 1, 7)


def test_without_pytorch_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(rates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs torch, which is not installed: pip install --group bench"):
        rates.train()
    code = "import sys; sys.modules['torch'] = None; import scripts.benchmarks.twin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError: the PyTorch twin needs torch" in done.stderr


def test_jaxgpt_trains_on_the_tokens_that_it_counts(monkeypatch):
    from jaxgpt import data

    load, loaded, waited = data.loader, [], []

    def loader(*given):
        read = load(*given)
        return lambda begin, end: loaded.append((begin, end)) or read(begin, end)

    monkeypatch.setattr(data, "loader", loader)
    ours = contestants.build("train jaxgpt", dataclasses.asdict(config_of("micro", "cpu")))
    assert [ours.run(), ours.run()] == [2 * 2 * 8] * 2, "2 steps of 2 windows of 8 tokens"
    assert loaded == [(0, 2), (0, 2), (2, 4), (4, 6)], "after compiling and the steps that warm up"
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    ours.wait()
    assert len(waited) == 1
    assert ours.peak_bytes() > 1e7
    assert min(ours.about["init_seconds"], ours.about["compile_seconds"]) > 0


def test_torch_trains_on_the_tokens_that_it_counts(monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    from scripts.benchmarks import twin

    steps, step = [], twin.Training.step
    monkeypatch.setattr(twin.Training, "step", lambda training: steps.append(training.steps) or step(training))
    theirs = contestants.build(
        "train torch", dataclasses.asdict(config_of("micro", "cpu")), way="float32", device="cpu"
    )
    assert steps == [0, 1, 2], "one that may compile, and a scan"
    assert theirs.run() == 2 * 2 * 8
    assert len(steps) == 5
    assert theirs.about == {"device": "cpu"}, "nothing is compiled"
    assert theirs.peak_bytes() > 1e7


def test_the_peak_memory_of_a_device_is_not_what_it_holds_now(monkeypatch):
    stats = {"bytes_in_use": 3, "peak_bytes_in_use": 7}
    device = types.SimpleNamespace(memory_stats=lambda: stats, device_kind="chip")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    ours = contestants.of_jax(int, int)
    assert ours.peak_bytes() == 7
    stats.clear()
    assert 1e6 < ours.peak_bytes() < 1e11, "of the process"


def test_the_load_average_is_that_before_the_measurement(load, monkeypatch):
    monkeypatch.setattr(programs, "require", lambda library: None)
    monkeypatch.setattr(programs, "alternate", lambda *args: load.append(9.0) or ({}, {}))
    monkeypatch.setattr(attention, "measured", lambda *args: load.append(9.0) or ({}, {}))
    monkeypatch.setattr(ablation, "trained", lambda *args: load.append(9.0) or [2.0])
    monkeypatch.setattr(ablation, "use_compile_cache", lambda: None)
    monkeypatch.setattr(ablation, "prepare_corpus", lambda *args, **kwargs: types.SimpleNamespace(corpus=None))
    micro = partial(attention.attention, shapes=("micro",))
    for measure in (programs.speedrun, programs.startup, micro, ablation.ablate):
        load[:] = [0.5]
        assert measure()["facts"]["load average before"] == 0.5
        assert load[-1] == 9.0


def test_an_ablation_row_has_means_and_standard_errors():
    baseline = [2.0, 2.2]
    row = ablation.row("muon", [1.9, 2.0], baseline)
    assert row == {"option": "muon", "loss": "1.9500 ± 0.0500", "change": "-0.1500 ± 0.0500"}
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


def test_the_ablation_covers_every_option_of_a_block():
    options = {name for change in ablation.ADDED.values() for name in change} & set(vars(ModelConfig()))
    sizes = {"kind", "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights"}
    assert options == set(vars(ModelConfig())) - sizes - {"init_scale", "gelu", "remat", "scan_layers", "deterministic"}


@pytest.mark.parametrize(("way", "precision"), [("float32", "highest"), ("tf32", "high"), ("bfloat16", "high")])
def test_torch_uses_tf32_only_where_its_way_says_so(way, precision):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    contestants.of_torch(way, "cpu")
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    assert found == precision


def test_every_side_samples_the_same_number_of_tokens_with_the_same_settings(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    from jaxgpt import sample
    from scripts.benchmarks import twin

    asked = []

    def ours(config, params, prompt, n_tokens, key, draw):
        asked.append((prompt.shape, n_tokens, draw.temperature, draw.top_k))
        return np.zeros((len(prompt), n_tokens))

    def theirs(model, prompt, n_tokens, temperature, top_k, way):
        asked.append((tuple(prompt.shape), n_tokens, temperature, top_k))
        assert way == "bfloat16"
        return torch.zeros((len(prompt), 1 + n_tokens))

    monkeypatch.setattr(sample, "generate", ours)
    monkeypatch.setattr(twin, "sample", theirs)
    tree = dataclasses.asdict(config_of("micro", "cpu"))
    for task, more in {"sample jaxgpt": {}, "sample torch": {"way": "bfloat16", "device": "cpu"}}.items():
        contestant = contestants.build(task, tree, batch_size=3, n_tokens=5, **more)
        asked.clear()
        assert contestant.run() == 3 * 5
        assert asked == [((3, 1), 5, 0.8, 40)]


@pytest.mark.parametrize("way", ["float32", "bfloat16"])
def test_transformers_samples_the_same_model_with_its_cache(way, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    transformers = pytest.importorskip("transformers", reason="needs PyTorch: pip install --group bench")
    asked = {}

    def generate(model, prompt, **given):
        asked.update(given, dtype=model.dtype, sizes=(model.config.n_layer, model.config.n_head, model.config.n_embd))
        return torch.zeros((len(prompt), 1 + given["max_new_tokens"]))

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "generate", generate)
    settings = {"batch_size": 3, "n_tokens": 5, "way": way, "device": "cpu"}
    contestant = contestants.build("sample transformers", dataclasses.asdict(config_of("micro", "cpu")), **settings)
    assert contestant.run() == 3 * 5
    assert (asked["temperature"], asked["top_k"], asked["do_sample"], asked["use_cache"]) == (0.8, 40, True, True)
    assert (asked["dtype"], asked["sizes"]) == (getattr(torch, way), (1, 2, 16))
    assert asked["min_new_tokens"] == 5, "no text ends early"


def test_a_shape_has_the_settings_that_are_asked_for():
    assert [config_of("small", device).train.batch_size for device in ("cpu", "gpu")] == [1, 16]
    assert config_of("small", "gpu", batch_size=32).train.batch_size == 32
    assert [config_of("baby", device).train.scan_steps for device in ("cpu", "gpu")] == [1, 50]
    model = config_of("baby", "gpu", precision="bfloat16", dropout=0.2).model
    assert (model.precision, model.dropout) == ("bfloat16", 0.2)


@pytest.fixture
def compared(monkeypatch):
    """The calls of `rates.compare`, whose contestants all have 6 tokens per second, or those of jaxgpt 12."""
    calls = []

    def compare(device, entrants, rounds, seconds):
        calls.append(({name: json.loads(words[-1]) for name, (words, _) in entrants.items()}, device, rounds, seconds))
        about = {"compile_seconds": 9.0, "init_seconds": 3.0, "device": "NVIDIA H200", "peak_bytes": 5_000_000}
        found = {name: about | {"rates": [12.0 if name.startswith("jaxgpt") else 6.0]} for name in entrants}
        return found, {"gone": "no memory"}, [0.5]

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
    assert [name.endswith(", gone") for name in report["failed"]] == [True]
    assert "NOT QUIET" in report["notes"][-1]
    assert report["facts"]["device"] == "cpu, NVIDIA H200"


def test_rows_of_training_are_per_step(compared):
    """A step takes six FLOPs for each weight and token; attention adds a sixth to those of GPT-2 124M."""
    report = rates.train("gpu", shapes=("small",), precisions=("bfloat16",), ways=("bfloat16",))
    row, _ = report["tables"][1]["rows"]
    assert (row["tokens/s"]["median"], row["ms/step"]) == (12.0, 1000 * 16 * 1024 / 12)
    assert row["MFU, %"] == pytest.approx(100 * 6 * 124e6 * 7 / 6 * 12 / 989e12, rel=0.05)
    assert (row["initial state, s"], row["compiling, s"], row["peak memory, MB"]) == (3.0, 9.0, 5.0)


def test_only_the_precisions_that_are_asked_for_are_measured(compared):
    chosen = {"rounds": 1, "precisions": ("bfloat16",), "ways": ("tf32",)}
    rates.train(shapes=("micro",), batch_size=6, **chosen)
    rates.sample(cases=("micro:3:20",), **chosen)
    assert [list(specs) for specs, *_ in compared] == [
        ["jaxgpt bfloat16", f"{library} tf32"] for library in ("torch", "torch", "transformers")
    ]
    for spec in compared[0][0].values():
        assert spec["config"]["train"]["batch_size"] == 6


def test_sampling_is_compared_with_equal_settings_on_both_sides(compared):
    report = rates.sample(cases=("micro:3:20",), rounds=2, seconds=0.5, ways=("float32",))
    assert [given for _, *given in compared] == [["cpu", 2, 0.5]] * 2
    assert [[spec["n_tokens"] for spec in specs.values()] for specs, *_ in compared] == [[20] * 3, [7] * 3]
    for specs, *_ in compared:
        first, second, theirs = specs.values()
        assert second["config"]["model"].pop("precision") == "bfloat16"
        assert first["config"]["model"].pop("precision") == theirs["config"]["model"].pop("precision") == "float32"
        same = ("config", "batch_size", "n_tokens")
        assert [first[name] for name in same] == [second[name] for name in same] == [theirs[name] for name in same]
    ratios, each = (table["rows"] for table in report["tables"])
    assert [(row["variant"], row["/ the best"]["median"], row["the best"]) for row in ratios] == [
        (f"jaxgpt {precision}", 2.0, f"{library} float32")
        for library in ("torch", "transformers")
        for precision in ("float32", "bfloat16")
    ]
    assert len(each) == 6


def test_an_ablation_changes_one_option_of_its_base_at_a_time(monkeypatch):
    """Each row is compared with the first of its table; below zero is better."""
    trained = []

    def run(corpus, fields, seeds, steps):
        assert (corpus, seeds, steps) == ("the corpus", 2, 30)
        trained.append(ablation.short_run(fields, steps))
        return [2.0 if fields in (ablation.PLAIN, ablation.ALL) else 1.9] * 2

    monkeypatch.setattr(ablation, "trained", run)
    monkeypatch.setattr(ablation, "use_compile_cache", lambda: None)
    monkeypatch.setattr(ablation, "prepare_corpus", lambda *given, **more: types.SimpleNamespace(corpus="the corpus"))
    report = ablation.ablate(seeds=2, steps=30)
    plain, modern = (ablation.short_run(fields, 30) for fields in (ablation.PLAIN, ablation.ALL))
    n = 1 + len(ablation.ADDED)
    assert (trained[0], trained[n]) == (plain, modern)
    assert (len(trained), plain in trained[1:], modern in trained[n + 1 :]) == (n + 10, False, False)
    for name, config in zip(ablation.LEFT_OUT, trained[n + 1 :], strict=True):
        fields = set(ablation.ADDED[name])
        assert {field for field, _, _ in differences(config, modern)} <= fields, "nothing else changes"
        assert not fields & {field for field, _, _ in differences(config, plain)}
    for table in report["tables"]:
        assert [row["change"] for row in table["rows"][1:]] == ["-0.1000 ± 0.0000"] * (len(table["rows"]) - 1)


def test_an_ablation_trains_each_seed_and_scores_the_validation_split(monkeypatch):
    configs = []

    def score(model, params, tokens, tokenizer):
        assert (params, tokens) == ("after", "val")
        return types.SimpleNamespace(loss=len(configs))

    def feed(config, tokens, mesh):
        configs.append(config)
        assert tokens == "train"
        return lambda begin, end: [begin, end]

    def train_steps(state, begin, end):
        assert (state, begin, end) == ("before", 0, 9)
        return types.SimpleNamespace(params="after"), None

    monkeypatch.setattr(ablation, "loader", feed)
    monkeypatch.setattr(ablation, "sharded_init", lambda config, mesh: "before")
    monkeypatch.setattr(ablation, "jit_train_steps", lambda config, mesh: train_steps)
    monkeypatch.setattr(ablation, "evaluate", score)
    tokenizer = types.SimpleNamespace(vocab_size=13)
    corpus = types.SimpleNamespace(tokenizer=tokenizer, split=lambda data: ("train", "val"))
    assert ablation.trained(corpus, ablation.PLAIN, seeds=2, steps=9) == [1, 2]
    assert [config.train.seed for config in configs] == [1337, 1338]
    for config in configs:
        assert (config.model.n_layer, config.model.tie_weights, config.optimizer.schedule) == (2, False, "linear")
        assert (config.model.vocab_size, config.optimizer.warmup_steps) == (13, 3)


def test_attention_is_timed_until_the_device_is_done_and_must_repeat_in_every_round(monkeypatch):
    clock, found = [0.0], iter([1.0, 1.0, 2.0, 1.0])

    def wait(value):
        clock[0] += 0.002
        return value

    monkeypatch.setattr(attention, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(attention.jax, "block_until_ready", wait)
    calls = {"steady": lambda x: (x,), "changing": lambda x: (x * next(found),)}
    results, failed = attention.measured(calls, jnp.ones((1, 3)), rounds=3)
    (_, steady, repeated), (_, changing, changed) = results.values()
    assert (steady["median"], changing["n"]) == (pytest.approx(2.0), 3)
    assert (repeated, changed, failed) == (True, False, {})


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
