import dataclasses
import errno
import json
from unittest import mock

import jax
import pytest

from jaxgpt import cli
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.display import charts
from jaxgpt.profile import ledger, plots, report
from jaxgpt.profile.ledger import VARIANTS, choose
from jaxgpt.recipes import recipe


def figures(*stages, **given):
    stages = dict(zip(ledger.STAGES[-len(stages) :], stages, strict=True))
    return {"stages": stages, **dict.fromkeys(("programs", "dispatches", "loss", "step_bytes")), **given}


DONE = {
    "eager": figures(4.5, programs=300, dispatches=2000.0, steps_per_second=[1.0, 2.0]),
    "jit": figures(1.0, 0.5, 8.0, 0.5, programs=1, dispatches=1.0, step_bytes=70_000_000, steps_per_second=[4.0, 8.0]),
    "scan of 10": figures(
        1.0, 0.5, 9.0, 0.5, programs=1, dispatches=0.1, step_bytes=60_000_000, steps_per_second=[5.0, 9.0]
    ),
    "cache, full": figures(0.5, 0.5, 0.5, 0.5, steps_per_second=[5.0, 10.0]),
}


def test_tables_show_the_measurements():
    first, then = ({row["variant"]: row for row in rows} for rows in ledger.rows(DONE))
    assert first["jit"]["total, s"] == 10.0
    assert (first["jit"]["compile, s"], first["eager"]["compile, s"]) == (8.0, None)
    assert then["jit"]["steady, ms"] == {"median": 187.5, "low": 125.0, "high": 250.0, "n": 2}
    assert then["eager"]["speed relative to jit"]["median"] == 0.25
    assert (then["eager"]["pays off after, steps"], then["jit"]["speed relative to jit"]) == (None, None)
    assert then["jit"]["pays off after, steps"] == round((10.0 - 4.5) / (1 / 1.5 - 1 / 6))
    assert then["cache, full"]["pays off after, steps"] == 0, "it starts earlier and is faster"
    assert (then["jit"]["dispatches"], then["scan of 10"]["dispatches"]) == (1, 0.1)
    assert (first["eager"]["programs"], first["jit"]["programs"]) == (300, 1)
    assert (then["eager"]["step, MB"], then["jit"]["step, MB"]) == (None, 70.0)


def test_variants_are_chosen_by_name():
    assert list(choose(["jit", "eager"])) == ["eager", "jit"], "in the order of the ledger"
    assert list(choose(["cache, full"])) == ["cache, empty", "cache, full"], "the other variant fills the cache"
    with pytest.raises(UsageError, match="no variant 'fast', expected some of 'op by op', "):
        choose(["fast"])


def test_each_variant_differs_from_jit_in_one_thing(tiny, change):
    config = change(tiny, precision="auto", remat="blocks", accumulate=2)
    jit = dataclasses.asdict(ledger.varied(config, VARIANTS["jit"]))
    assert (jit["model"]["precision"], jit["model"]["remat"], jit["train"]["accumulate"]) == ("float32", "none", 2)
    for name, variant in VARIANTS.items():
        found = dataclasses.asdict(ledger.varied(config, variant))
        changed = {
            key: value
            for section, fields in found.items()
            for key, value in fields.items()
            if value != jit[section][key]
        }
        expected = {"precision": variant.precision, "remat": variant.remat, "scan_steps": variant.steps}
        same = {"precision": "float32", "remat": "none", "scan_steps": 1}
        assert changed == {key: value for key, value in expected.items() if value != same[key]}, name
        differences = [
            not variant.compiled,
            variant.donated,
            variant.cache,
            bool({"precision", "remat"} & set(changed)),
        ]
        assert sum(differences) == (name != "jit"), name


VARIED = ("eager", "jit", "scan of 10", "cache, empty", "cache, full")
BIGRAM = Config(
    model=ModelConfig(kind="bigram", vocab_size=13, block_size=8),
    optimizer=OptimizerConfig(warmup_steps=2, grad_clip=0.0),
    train=TrainConfig(steps=20, batch_size=2, scan_steps=5, eval_every=0),
)
"""A bigram, whose few operations compile quickly one by one."""


@pytest.fixture(scope="module")
def bigram_report():
    """A real report. Measuring must restore the settings of the compile cache."""
    names = [name for name in jax.config.values if "cache" in name]
    before = {name: jax.config.values[name] for name in names}
    report = ledger.measure(BIGRAM, "bigram", choose(VARIED), rounds=2, seconds=0.01)
    assert {name: jax.config.values[name] for name in names} == before
    return report


def test_every_variant_takes_the_same_step(bigram_report):
    losses = [each["loss"] for each in bigram_report["figures"].values()]
    assert losses == pytest.approx([losses[0]] * len(VARIED), abs=1e-6)
    assert 2.0 < losses[0] < 3.0


def test_a_scan_dispatches_one_program_for_all_its_steps(bigram_report):
    each = {name: figures["dispatches"] for name, figures in bigram_report["figures"].items()}
    assert (each["jit"], each["scan of 10"]) == (1.0, 0.1)
    alone = ledger.Runner(BIGRAM, VARIANTS["op by op"], []).figures
    assert alone["loss"] == pytest.approx(bigram_report["figures"]["jit"]["loss"], abs=1e-6)
    assert 30 < each["eager"] < alone["dispatches"]


def test_each_variant_reports_its_own_stages_and_programs(bigram_report):
    each = bigram_report["figures"]
    assert each["jit"]["programs"] == each["scan of 10"]["programs"] == 1
    assert each["eager"]["programs"] > 20, "a variant does not reuse the programs of others"
    for name in ("jit", "scan of 10"):
        assert list(each[name]["stages"]) == list(ledger.STAGES)
        assert min(each[name]["stages"].values()) > 0
    assert each["jit"]["step_bytes"] > each["scan of 10"]["step_bytes"] > 2e6, "all tokens, and a state donated or not"
    assert each["eager"]["step_bytes"] is None
    assert each["cache, full"]["stages"]["compile"] < each["cache, empty"]["stages"]["compile"]


def test_variants_share_one_train_state(change, monkeypatch):
    alive, repeat = [], ledger.repeat

    def count(*args):
        alive.append(sum(array.shape == (17, 17) for array in jax.live_arrays()))
        return repeat(*args)

    monkeypatch.setattr(ledger, "repeat", count)
    ledger.measure(change(BIGRAM, vocab_size=17), "bigram", choose(["jit", "scan of 10"]), 2, 0.0)
    assert set(alive) == {3}, "the table and its two moments"


def test_rates_are_steps_per_second(monkeypatch):
    class Runner:
        wait = None

        def __init__(self, config, variant, state):
            self.run = lambda: variant.steps
            self.figures = DONE["jit"] | {"loss": 2.5, "steps_per_second": []}

    monkeypatch.setattr(ledger, "Runner", Runner)
    monkeypatch.setattr(ledger, "repeat", lambda run, seconds, wait: (3 * run(), 2.0))
    report = ledger.measure(BIGRAM, "bigram", choose(["jit", "scan of 10"]), rounds=2, seconds=0.1)
    rates = {name: found["steps_per_second"] for name, found in report["figures"].items()}
    assert rates == {"jit": [1.5, 1.5], "scan of 10": [15.0, 15.0]}


def test_the_load_average_is_that_before_the_measurement(load, monkeypatch):
    run = ledger.Runner.run
    monkeypatch.setattr(ledger.Runner, "run", lambda runner: load.append(9.0) or run(runner))
    report = ledger.measure(BIGRAM, "bigram", choose(["jit"]), rounds=1, seconds=0.0)
    assert load[-1] == 9.0
    assert report["facts"]["load average before"] == 0.5


def test_the_report_is_complete(bigram_report):
    first, then = (each["rows"] for each in bigram_report["tables"])
    assert (
        [row["variant"] for row in first]
        == [row["variant"] for row in then]
        == sorted(VARIED, key=list(VARIANTS).index)
    )
    assert all(row["steady, ms"]["n"] == 2 for row in then)
    assert "until the first is done**" in report.markdown(json.loads(json.dumps(bigram_report)))


def test_the_chart_shows_every_stage(tmp_path):
    spec = plots.ledger({"figures": DONE, "mode": "the ledger of tiny"})
    charts.save(spec, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (bars,), (times, _) = (panel["layer"] for panel in spec["hconcat"])
    assert sum(row["seconds"] for row in bars["data"]["values"]) == 27.5
    assert [row["variant"] for row in times["data"]["values"]] == list(DONE)
    assert "seconds" in bars["encoding"]["x"]["title"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "which recipe?"),
        (["nonsense"], "no recipe 'nonsense'"),
        (["gpt-demo", "--rounds", "0"], "rounds is 0, expected 1 or more"),
        (["gpt-demo", "--variants", "fast"], "no variant 'fast'"),
        (["gpt-demo", "--out", "nowhere/a.json"], "there is no folder nowhere"),
        (["gpt-demo", "--plot", "a.txt"], "ends in '.txt'"),
        (["gpt-demo", "--plot", "ledger-gpt-demo.json"], "ledger-gpt-demo.json is for another result: name another"),
        (
            ["gpt-demo", "--out", "./a.json", "--plot", "a.json"],
            "a.json is for another result: name another file, --plot",
        ),
        (["gpt-demo", "--n-head", "3"], "try --n-embd 126"),
        (["gpt-demo", "--precision", "bfloat16"], "--precision has no effect on variants, which set it themselves"),
        (["gpt-demo", "--remat", "blocks"], "--variants jit 'remat matmuls' 'remat blocks'): leave it out"),
        (["gpt-demo", "--scan-steps", "20"], "--scan-steps has no effect on variants, which set it themselves"),
        (["gpt-demo", "--scan-steps", "20"], "--variants jit 'scan of 10' 'scan of 50'): leave it out"),
    ],
)
def test_bad_input_starts_nothing(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ledger, "measure", None)
    vocabulary = ["--vocab-size", "13"] if args else []
    assert cli.run_command(["ledger", *args, *vocabulary]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_tables_a_plot_and_json(capsys, tmp_path, monkeypatch, bigram_report):
    arguments = []
    monkeypatch.setattr(ledger, "measure", lambda *args: arguments.extend(args) or bigram_report)
    monkeypatch.chdir(tmp_path)
    command = ["ledger", "gpt-demo", "--vocab-size", "13", "--variants", "jit", "eager", "--plot", "a.svg"]
    assert cli.run_command(command) == 0
    assert capsys.readouterr().out.startswith("## the ledger of bigram")
    assert json.loads((tmp_path / "ledger-gpt-demo.json").read_text()) == json.loads(json.dumps(bigram_report))
    assert (tmp_path / "a.svg").exists()
    config = recipe("gpt-demo").config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=13))
    assert arguments == [config, "gpt-demo", choose(["eager", "jit"]), 5]
    monkeypatch.setattr(charts, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, "disk full", "a.svg")))
    assert cli.run_command(command) == 1
    assert capsys.readouterr().out.startswith("## the ledger of bigram"), "the chart is the last result"


@pytest.mark.parametrize("name", ["jit", "scan of 10"])
def test_variant_pays_off_once_its_total_time_is_below_that_of_eager(name):
    then = {row["variant"]: row for row in ledger.rows(DONE)[1]}
    pays = then[name]["pays off after, steps"]
    start, step = ({each: of(each) for each in ("eager", name)} for of in (first_call, median_step))

    def ahead(later):
        """By how much the variant is ahead of eager after the first step and `later` more."""
        in_first = VARIANTS[name].steps - 1  # of the later steps
        return start["eager"] + later * step["eager"] - start[name] - (later - in_first) * step[name]

    assert ahead(pays - 1) < 0 < ahead(pays + 1)


@pytest.mark.parametrize("first", [3.0, 6.0])
def test_a_variant_that_is_slower_than_eager_never_pays_off(first):
    """Whether its first step is done earlier or later."""
    for rate in (1.0, 2.0):
        jit = figures(0.0, 0.0, first, 0.0, steps_per_second=[rate])
        found = {"eager": figures(4.5, steps_per_second=[2.0]), "jit": jit}
        assert ledger.rows(found)[1][1]["pays off after, steps"] == "never"


def first_call(name):
    return sum(DONE[name]["stages"].values())


def median_step(name):
    return 2 / sum(DONE[name]["steps_per_second"])
