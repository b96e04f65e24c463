import dataclasses
import json

import jax
import pytest

from jaxgpt import cli, cost
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.display import charts
from jaxgpt.monitor.chips import flops_per_token
from jaxgpt.profile import inspection, plots, report, roofline, stages
from jaxgpt.profile.roofline import Machine, Work

CONFIG = Config(
    model=ModelConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16),
    optimizer=OptimizerConfig(warmup_steps=2),
    train=TrainConfig(steps=20, batch_size=4, accumulate=2),
)


def work(flops, n_bytes):
    return Work("it", False, 1, flops, 0, n_bytes, lambda: None)


def test_the_roof_is_the_larger_of_two_times():
    machine = Machine(flops=100.0, bandwidth=10.0)
    assert machine.ridge == 10.0
    assert machine.least(work(1000.0, 100)) == 10.0, "on the ridge both are the same"
    assert machine.least(work(2000.0, 100)) == 20.0
    assert machine.least(work(1000.0, 200)) == 20.0
    rows = inspection.roofline_rows([work(2000.0, 100), work(500.0, 100)], [40.0, 20.0], machine)
    assert [row["bound by"] for row in rows] == ["compute", "memory"]
    assert [row["of the roof, %"] for row in rows] == [50.0, 50.0]
    assert [row["FLOP/byte"] for row in rows] == [20.0, 5.0]


OPTIONS = [
    {},
    {"bias": True, "tie_weights": False, "scan_layers": True},
    {"norm": "rms", "mlp": "swiglu", "bias": True},
    {"mlp": "relu2", "n_kv_head": 2, "n_head": 4, "value_embed": True},
    {"position": "rope", "qk_norm": True, "smear": True, "bigram_embed": True},
    {"softcap": 15.0, "window": 3, "precision": "bfloat16"},
    {"kind": "bigram"},
]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_the_parts_have_the_matmuls_of_the_model(change):
    """All parts together: those of a forward pass, and three times those with the backward pass."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, n_layer=2, **change))
    tokens = CONFIG.train.batch_size // CONFIG.train.accumulate * CONFIG.model.block_size
    forward = flops_per_token(config.model) * tokens
    works = roofline.works(config)
    assert sum(each.times * each.matmul_flops for each in works if not each.training) == forward
    assert sum(each.times * each.matmul_flops for each in works if each.training) == 3 * forward


def test_the_memory_traffic_of_parts():
    works = {each.part: each for each in roofline.works(CONFIG) if not each.training or each.part == "optimizer"}
    n = 4 * cost.n_params(CONFIG.model)
    assert works["optimizer"].bytes == pytest.approx(4 * n + 3 * n, rel=1e-2), "reads p, m, v, g; writes p, m, v"
    assert works["MLP"].bytes == 4 * (2 * 2 * 8 * 16 + 2 * 16 * 64), "input, output, two kernels"


def test_the_machine_is_measured_by_its_best_rounds():
    machine = roofline.measure_machine("float32", n=64, streamed=2**22, seconds=0.0, rounds=1)
    assert min(machine) > 1e6
    before = stages.page_faults()
    roofline.measure_machine("float32", n=64, streamed=2**22, seconds=0.0, rounds=40)
    assert stages.page_faults() - before < 4 * 4 * 2**22 / 4096, "memory is measured, not the allocation of pages"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measure_machine", lambda precision: Machine(1e9, 1e8))
        some = [each for each in roofline.works(CONFIG) if each.part in ("attention", "optimizer")]
        patch.setattr(roofline, "works", lambda config: some)
        return inspection.inspect(CONFIG, "small", trace_folder=tmp_path_factory.mktemp("trace"))


def rows(found, title):
    (only,) = [each["rows"] for each in found["tables"] if each["title"].startswith(title)]
    return only


def test_a_config_is_inspected_from_end_to_end(found, capsys):
    assert rows(found, "Parameters")[-1]["count"] == cost.n_params(CONFIG.model)
    assert rows(found, "Matmuls")[-1]["operands"] == "in all"
    parts = rows(found, "Roofline")
    assert all(row["measured, ms"] > 0 for row in parts)
    assert [row["part"] for row in parts] == ["attention", "attention, + backward", "optimizer"]
    said = " ".join(found["notes"])
    assert "attention: reference" in said
    assert "a step needs at least" in said
    assert "the ridge is at 10.0 FLOP/byte" in said
    assert "a step of 32 tokens takes" in said
    text = report.markdown(json.loads(json.dumps(found)))
    assert "**Roofline, part by part**" in text
    from rich.console import Console

    for part in report.renderables(found, 200):
        Console(width=140).print(part)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 140


def test_a_profile_names_the_operations_of_the_step(found):
    longest = rows(found, "Operations of a step")
    assert longest[0]["ms a step"] >= longest[-1]["ms a step"] > 0
    assert any(row["computed by"] for row in longest), "they are known by the program's own text"
    assert any("1 programs dispatched per step" in note for note in found["notes"])


def test_the_chart_has_a_point_for_each_pass_of_each_part(found, tmp_path):
    spec = plots.roofline(found)
    rows = [
        row for each in spec["layer"] if each["mark"]["type"] in ("point", "square") for row in each["data"]["values"]
    ]
    works = found["roofline"]["works"]
    assert sorted(row["intensity"] for row in rows) == sorted(work["flops"] / work["bytes"] for work in works)
    (roof,) = [each["data"]["values"] for each in spec["layer"] if each["mark"]["type"] == "line"]
    assert [row["rate"] for row in roof[1:]] == [1.0, 1.0], "GFLOP/s"
    assert roof[1]["intensity"] == 10.0
    charts.save(spec, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_jaxprs_and_hlo_are_printed_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--vocab-size", "13", "--n-layer", "1", "--n-embd", "16", "--block-size", "8", "--batch-size", "2"]
    assert cli.run_verb(["inspect", "gpt-demo", *size, "--jaxpr", "forward", "loss", "--to", "texts"]) == 0
    assert capsys.readouterr().out.split() == ["texts/forward.jaxpr.txt", "texts/loss.jaxpr.txt"]
    assert "dot_general" in (tmp_path / "texts" / "forward.jaxpr.txt").read_text()
    assert cli.run_verb(["inspect", "gpt-demo", *size, "--hlo", "forward"]) == 0
    assert "ENTRY" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "which recipe or run?"),
        (
            ["nonsense"],
            "no run 'nonsense' in runs; jaxgpt train gpt-demo makes one; nor is there a recipe of that name",
        ),
        (["gpt-demo", "--no-measure", "--roofline", "a.png"], "--roofline needs measurements"),
        (["gpt-demo", "--to", "folder"], "--to needs --jaxpr or --hlo"),
        (["gpt-demo", "--out", "nowhere/a.json"], "there is no folder nowhere"),
        (["gpt-demo", "--n-embd", "30"], "heads"),
        (["gpt-demo", "--jaxpr", "loss", "--out", "a.json"], "--out has no effect with --jaxpr and --hlo"),
        (["gpt-demo", "--hlo", "step", "--no-measure"], "--measure has no effect with --jaxpr and --hlo"),
    ],
)
def test_bad_input_compiles_nothing(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspection, "programs", None)
    assert cli.run_verb(["inspect", *args]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_refused_before_it_is_compiled(monkeypatch):
    monkeypatch.setattr(inspection, "programs", None)
    monkeypatch.setattr(inspection.memory, "available", lambda: 1000)
    with pytest.raises(UsageError, match="a training step needs at least"):
        inspection.inspect(CONFIG, "small")


def test_a_run_is_inspected_by_its_name(tmp_path, monkeypatch, verse):
    from jaxgpt.cli.runs import start

    run, _ = start(
        Config(
            data=type(CONFIG.data)(corpus=str(verse)),
            model=CONFIG.model,
            optimizer=CONFIG.optimizer,
            train=CONFIG.train,
        ),
        "mine",
        tmp_path / "runs",
        tmp_path / "data",
    )
    asked = []
    monkeypatch.setattr(
        inspection, "inspect", lambda config, name, **given: asked.append(config) or {"tables": [], "notes": []}
    )
    monkeypatch.chdir(tmp_path)
    assert cli.run_verb(["inspect", "mine"]) == 0
    assert cli.run_verb(["inspect", "mine", "--runs-dir", str(tmp_path / "runs"), "--no-measure"]) == 0
    assert asked == [run.config] * 2
