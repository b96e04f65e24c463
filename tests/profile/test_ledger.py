import dataclasses
import json

import jax
import pytest

from jaxgpt import cli
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError, to_tree
from jaxgpt.display import charts
from jaxgpt.profile import ledger, plots, report, stages
from jaxgpt.profile.ledger import VARIANTS, break_even, choose
from jaxgpt.profile.rounds import series
from jaxgpt.profile.trace import Span
from jaxgpt.recipes import recipe


def test_compiling_is_paid_for_when_both_have_taken_as_long():
    extra, slow, fast = 7.0, 0.9, 0.2
    n = break_even(extra, slow, fast)
    assert n * slow == pytest.approx(extra + n * fast)
    assert break_even(0.0, slow, fast) == 0
    assert break_even(extra, fast, slow) is None
    assert break_even(extra, fast, fast) is None
    assert break_even(-extra, fast, slow) is None


def figures(trace, compile, first=1.0, **given):
    seconds = {"trace": trace, "lower": 0.5, "compile": compile, "first call": first}
    stages = {name: series([each]) for name, each in seconds.items()}
    names = ("programs", "dispatches", "faults", "loss", "step_bytes", "process_bytes")
    nothing = dict.fromkeys(names)
    return {"stages": stages, **nothing, **given}


DONE = {
    "eager": figures(0.0, 3.0, 1.0, programs=300, dispatches=2000.0),
    "jit": figures(1.0, 8.0, 0.5, programs=1, dispatches=1.0, faults=2000.0, step_bytes=70_000_000),
    "scan of 10": figures(1.0, 9.0, 0.5, programs=1, dispatches=0.1, faults=250.0, step_bytes=60_000_000),
    "remat blocks": figures(1.0, 9.0, 0.5, programs=1, dispatches=1.0, step_bytes=77_000_000),
    "ahead of time": figures(0.5, 0.5, 0.5),
}
STEPS = {
    "eager": [1.0, 2.0],
    "jit": [4.0, 8.0],
    "scan of 10": [5.0, 9.0],
    "remat blocks": [3.0, 9.0],
    "ahead of time": [5.0, 10.0],
}


def test_the_tables_hold_what_was_measured():
    first = {row["variant"]: row for row in ledger.first_step_rows(DONE)}
    assert first["jit"]["in all, s"] == 10.0
    assert first["jit"]["compile, s"]["median"] == 8.0
    then = {row["variant"]: row for row in ledger.steady_rows(DONE, STEPS)}
    assert then["jit"]["steady, ms"] == {"median": 187.5, "low": 125.0, "high": 250.0, "n": 2}
    assert then["eager"]["speed, of jit's"]["median"] == 0.25
    assert (then["eager"]["pays after, steps"], then["jit"]["speed, of jit's"]) == (None, None)
    assert then["jit"]["pays after, steps"] == round((10.0 - 4.5) / (1 / 1.5 - 1 / 6))
    assert then["ahead of time"]["pays after, steps"] == 0, "it began sooner, and is faster"
    assert (then["jit"]["dispatches"], then["scan of 10"]["dispatches"]) == (1, 0.1)


def test_the_summary_is_of_these_numbers():
    said = ledger.summary("tiny", 768, DONE, STEPS)
    assert "takes 166.7 ms (4,608 tokens/s)" in said
    assert "traces for 1.00 s, lowers for 0.50 s and compiles for 8.00 s: all in all as long as 60 steps" in said
    assert "4.0 times as long, and the first is done after 4.5 s: against it, compiling has paid off after 11" in said
    assert ledger.summary("tiny", 768, {"eager": DONE["eager"]}, STEPS) == ""


def test_what_runs_is_known_before_anything_starts(tiny, change):
    asked = change(tiny, precision="auto", remat="blocks", accumulate=2)
    small = ledger.baseline(asked)
    assert small == change(tiny, accumulate=2)
    assert "precision auto and remat blocks apply only to" in ledger._own_settings(asked)[0]
    assert ledger._own_settings(small) == []
    assert ledger.spec(small, VARIANTS["jit"])["config"]["train"]["accumulate"] == 2
    ledger.require_not_varied(change(asked, precision="float32", n_layer=3), asked)
    assert list(choose(["jit", "eager"])) == ["eager", "jit"], "in the order of the ledger"
    assert list(choose(["cache, full"])) == ["cache, empty", "cache, full"], "which is filled by the other"
    with pytest.raises(UsageError, match="no variant 'fast', expected some of 'op by op', "):
        choose(["fast"])
    with pytest.raises(UsageError, match="no variants are named"):
        choose([])
    with pytest.raises(UsageError, match=r"2 processes at a time need about .* 1.0 MB are free: name fewer"):
        ledger.require_room(small, dict.fromkeys(["a", "b"]), 1_000_000)


CACHED = {"JAX_COMPILATION_CACHE_DIR": "here", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def test_the_cache_is_asked_for_in_words_that_jax_knows():
    assert all(name.lower() in jax.config.values for name in CACHED)


def test_each_variant_differs_from_jit_in_one_thing(tiny):
    jit = ledger.spec(tiny, VARIANTS["jit"])
    for name, variant in VARIANTS.items():
        if name == "jit":
            continue
        found, env = ledger.spec(tiny, variant), ledger.environment(variant, "here")
        changed = {
            key: value
            for section, fields in found["config"].items()
            for key, value in fields.items()
            if value != jit["config"][section][key]
        }
        assert (found["way"] != "jit") + bool(variant.model) + bool(env) == 1, name
        assert env == (CACHED if name.startswith("cache") else {})
        assert changed == dict(variant.model) | ({"scan_steps": variant.steps} if variant.way == "scan" else {})


WAYS = ("jit", "scan", "eager", "op by op")
TABLE = Config(
    model=ModelConfig(kind="bigram", vocab_size=13, block_size=8),
    optimizer=OptimizerConfig(warmup_steps=2, grad_clip=0.0),
    train=TrainConfig(steps=20, batch_size=2, scan_steps=5, eval_every=0),
)
"""A bigram: few operations, which are compiled one by one."""


@pytest.fixture(scope="module")
def run():
    """Each way: {way: Stages}."""
    jax.config.update("jax_disable_most_optimizations", True)
    return {way: stages.Stages(to_tree(TABLE), way) for way in WAYS}


def test_every_way_is_the_same_step(run):
    losses = [run[way].about["loss"] for way in WAYS]
    assert losses == pytest.approx([losses[0]] * len(WAYS), abs=1e-6)
    assert 2.0 < losses[0] < 3.0


def test_a_scan_hands_over_one_program_for_all_its_steps(run):
    assert run["jit"].about["dispatches"] == 1.0
    assert run["scan"].about["dispatches"] == 1 / 5
    assert 30 < run["eager"].about["dispatches"] < run["op by op"].about["dispatches"]


def test_faults_are_counted_a_step(run, monkeypatch):
    monkeypatch.setattr(stages, "page_faults", iter([100, 1100]).__next__)
    assert run["scan"].faults(4) == 1000 / 4 / 5


def test_stages_are_those_of_what_was_compiled(run):
    assert run["jit"].about["programs"] == run["scan"].about["programs"] == 1
    assert run["eager"].about["programs"] > 20
    for way in ("jit", "scan"):
        assert min(run[way].about["stages"].values()) > 0
        assert run[way].about["compiled_bytes"] > 0
    assert run["eager"].about["compiled_bytes"] is None


def test_what_runs_has_been_compiled(run):
    for way in ("jit", "scan", "eager"):
        with stages.compile_spans() as spans:
            assert run[way].run() == (5 if way == "scan" else 1)
        assert [span for span in spans if span.name == "compile"] == [], way


def test_a_stage_inside_another_counts_once():
    spans = [Span("trace", 1.0, 1.0), Span("compile", 2.5, 0.5), Span("trace", 0.0, 4.0), Span("lower", 4.0, 2.0)]
    assert stages.stage_seconds(spans) == {"trace": 3.5, "lower": 2.0, "compile": 0.5}


@pytest.fixture(scope="module")
def found():
    """Of a real process; a bigram, so that it compiles in a second."""
    return ledger.measure(TABLE, "bigram", ["jit"], rounds=2, seconds=0.01)


def test_a_report_of_a_real_process(found):
    assert found["failed"] == {}
    (first,), (then,) = (each["rows"] for each in found["tables"])
    assert first["variant"] == then["variant"] == "jit"
    assert first["in all, s"] > first["compile, s"]["median"] > 0
    assert then["steady, ms"]["n"] == 2
    assert then["step, MB"] < then["process, MB"]
    assert found["story"] in report.markdown(json.loads(json.dumps(found)))


def test_the_chart_shows_every_stage(tmp_path):
    whole = {"figures": DONE, "steps_per_second": STEPS, "tables": [{"title": "A step of tiny: first"}]}
    spec = plots.ledger(whole)
    charts.save(spec, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (bars, totals), (times, *_) = (panel["layer"] for panel in spec["hconcat"])
    assert [row["seconds"] for row in totals["data"]["values"]] == [4.5, 10.0, 11.0, 11.0, 2.0]
    assert sum(row["seconds"] for row in bars["data"]["values"]) == 38.5
    assert [row["variant"] for row in times["data"]["values"]] == list(DONE)
    assert "seconds" in bars["encoding"]["x"]["title"]
    assert "ms of each step" in times["encoding"]["x"]["title"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "which recipe?"),
        (["nonsense"], "no recipe 'nonsense'"),
        (["gpt-demo", "--rounds", "0"], "rounds is 0, expected 1 or more"),
        (["gpt-demo", "--variants", "fast"], "no variant 'fast'"),
        (["gpt-demo", "--out", "nowhere/a.json"], "there is no folder nowhere"),
        (["gpt-demo", "--plot", "a.txt"], "ends in '.txt'"),
        (["gpt-demo", "--n-head", "3"], "heads"),
        (["gpt-demo", "--precision", "bfloat16"], "--precision bfloat16: the variants set precision"),
        (["gpt-demo", "--precision", "auto"], "--precision auto: the variants set precision"),
        (["gpt-demo", "--remat", "blocks"], "compare jit with remat matmuls, remat blocks (--variants)"),
        (["gpt-demo", "--scan-steps", "20"], "compare jit with scan of 10, scan of 50 (--variants)"),
    ],
)
def test_bad_input_starts_nothing(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "Contest", None)
    more = ["--vocab-size", "13"] if args else []
    assert cli.run_verb(["ledger", *args, *more]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_table_a_plot_and_json(capsys, tmp_path, monkeypatch, found):
    asked = {}

    def measure(config, name, *given):
        asked.update(config=config, name=name, given=given)
        return found

    monkeypatch.setattr(ledger, "measure", measure)
    monkeypatch.chdir(tmp_path)
    line = ["ledger", "gpt-demo", "--vocab-size", "13", "--variants", "jit", "eager", "--plot", "a.svg", "--markdown"]
    assert cli.run_verb(line) == 0
    assert capsys.readouterr().out.startswith("## the ledger of bigram")
    assert json.loads((tmp_path / "ledger-gpt-demo.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "a.svg").exists()
    assert asked["given"][:2] == (("jit", "eager"), "cpu")
    assert asked["config"] == dataclasses.replace(
        recipe("gpt-demo").config, model=dataclasses.replace(recipe("gpt-demo").config.model, vocab_size=13)
    )


def test_the_process_that_asks_imports_no_jax():
    assert "jax" not in vars(ledger)
