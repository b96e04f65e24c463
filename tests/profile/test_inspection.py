import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from jaxgpt import cli, model
from jaxgpt.cli import memory
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.display import charts
from jaxgpt.monitor import cost
from jaxgpt.profile import hlo, inspection, plots, report, roofline
from jaxgpt.profile.inspection import programs, xla_counts
from jaxgpt.profile.roofline import Machine
from jaxgpt.profile.trace import Operation, Span

PLAIN = Config(
    model=ModelConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=128),
    optimizer=OptimizerConfig(warmup_steps=2),
    train=TrainConfig(steps=200, batch_size=8),
)
"""Wide for its context, so that matmuls are most of its work."""


def with_model(**model):
    return dataclasses.replace(PLAIN, model=dataclasses.replace(PLAIN.model, **model))


def instruction(origin, flops, moved):
    return SimpleNamespace(origin=origin, runs=2, flops=flops // 2, bytes=moved // 2)


def test_the_roof_is_the_larger_of_compute_and_memory_time():
    machine = Machine(flops=100.0, bandwidth=10.0)
    assert machine.ridge == 10.0
    known = {
        "dot.1": instruction("jvp(GPT)/mlp/dot", 2000, 100),
        "dot.2": instruction("transpose(jvp(GPT))/mlp/dot", 500, 100),
        "gather": instruction("jvp(GPT)/wpe/gather", 2, 100),
    }
    ran = [Operation("dot.1", 1, 40.0), Operation("dot.2", 1, 20.0), Operation("gather", 1, 0.0)]
    rows = roofline.rows(known, ran, 1, ["mlp", "wpe"], machine)
    assert [row["pass"] for row in rows] == ["forward", "backward"], "a part without measured time has no row"
    assert [row["bound by"] for row in rows] == ["compute", "memory"]
    assert [row["of the roof, %"] for row in rows] == [50.0, 50.0]
    assert [row["FLOP/byte"] for row in rows] == [20.0, 5.0]
    assert [(row["MFLOP"], row["MB"]) for row in rows] == [(2e-3, 1e-4), (5e-4, 1e-4)]
    assert [row["least, ms"] for row in rows] == [20e3, 10e3]
    assert [row["measured, ms"] for row in rows] == [40e3, 20e3]
    assert [row["GFLOP/s"] for row in rows] == pytest.approx([50e-9, 25e-9])


def test_parts_are_those_of_one_step_slowest_first():
    origins = {"dot.1": "jvp(GPT)/mlp/dot", "dot.2": "transpose(jvp(GPT))/mlp/dot", "add": "add"}
    known = {name: instruction(origin, 10, 14) for name, origin in origins.items()}
    seconds = {"dot.1": 8.0, "dot.2": 12.0, "gone": 99.0, "add": 4.0}
    ran = [Operation(name, 4, took) for name, took in seconds.items()]
    rows = roofline.rows(known, ran, 4, ["mlp"], Machine(1.0, 1.0))
    found = [tuple(row[name] for name in ("part", "pass", "MFLOP", "MB", "measured, ms")) for row in rows]
    assert found == [
        ("mlp", "backward", 10e-6, 14e-6, 3e3),
        ("mlp", "forward", 10e-6, 14e-6, 2e3),
        ("optimizer", None, 10e-6, 14e-6, 1e3),
    ]


def test_the_rates_of_the_machine_are_those_of_its_best_round(monkeypatch):
    """A multiply-add is two FLOPs, and a float32 that is scaled in memory is 8 bytes: read and written."""
    seconds = iter([2.0, 4.0, 1.0, 8.0])
    monkeypatch.setattr(roofline, "repeat", lambda run, least: (run(), next(seconds)))
    assert roofline.measure_machine("float32", n=4, streamed=16, rounds=2) == Machine(2 * 4**3, 8 * 16 / 4)


def test_shares_of_matmuls_are_by_flops(monkeypatch):
    monkeypatch.setattr(
        hlo, "matmuls", lambda text: [hlo.Matmul("a", "dot", 2, 6_000_000), hlo.Matmul("b", "dot", 9, 2_000_000)]
    )
    rows = inspection.matmul_rows("")
    assert [(row["MFLOP"], row["share, %"]) for row in rows] == [(6.0, 75.0), (2.0, 25.0)]


def test_times_are_those_of_one_step(monkeypatch):
    monkeypatch.setattr(inspection, "stepper", lambda config, step: lambda: 1)
    monkeypatch.setattr(inspection, "repeat", lambda run, seconds: (4, 2.0))
    monkeypatch.setattr(hlo, "instructions", lambda text: {})
    monkeypatch.setattr(roofline, "measure_machine", lambda precision: Machine(1e9, 1e8))
    spans = [Span("dot", 1e9 * i, 30e6, op="dot") for i in range(5)] + [Span("add", 1e9, 10e6, op="add")]
    monkeypatch.setattr(inspection.trace, "capture", lambda folder, run: [spans[:5], spans[5:]])
    (dot, add), notes, _ = inspection.measure(PLAIN, SimpleNamespace(text="", formula_flops=int(2e8)), None)
    step = "a step of 128 tokens takes 500 (500 to 500) ms, 256 tokens/s"
    assert f"{step}: its matmuls, 2e+08 FLOPs, use 40% of the machine's peak" in notes
    assert notes[-1].startswith("profiled: 32.0 ms of work per step")
    assert (dot["comes from"], dot["times a step"], add["times a step"]) == ("dot", 1.0, 0.2)
    assert [row["ms a step"] for row in (dot, add)] == pytest.approx([30.0, 2.0])
    assert [row["share, %"] for row in (dot, add)] == pytest.approx([93.75, 6.25])


@pytest.mark.parametrize(
    ("origin", "part"),
    [
        ("jvp(GPT)/h_*/attn/dot_general", ("h_*/attn", "forward")),
        ("while/body/transpose(jvp(GPT))/while/body/h/attn/c_proj/transpose", ("h_*/attn/c_proj", "backward")),
        ("checkpoint/rematted_computation/h_*/attn/mul", ("h_*/attn", "backward")),
        ("transpose(jvp(GPT))/jit(_take)/scatter-add", (roofline.OUTSIDE, "backward")),
        ("jvp()/exp", (roofline.OUTSIDE, "forward")),
        ("jit(_where)/select_n", ("optimizer", None)),
        ("", ("unnamed", None)),
    ],
)
def test_an_instruction_belongs_to_the_module_that_it_was_traced_in(origin, part):
    assert roofline.part_of(origin, {"h_*", "attn", "c_proj"}) == part


def test_measuring_the_machine_causes_no_page_faults():
    resource = pytest.importorskip("resource")
    assert min(roofline.measure_machine("float32", n=64, streamed=2**22, seconds=0.0, rounds=1)) > 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    roofline.measure_machine("float32", n=64, streamed=2**22, seconds=0.0, rounds=40)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert pages < 4 * 4 * 2**22 / 4096, "bandwidth is measured, not the allocation of pages"


@pytest.mark.parametrize("stacked", [False, True])
def test_table_of_parameters_matches_the_tree(stacked):
    config = with_model(n_layer=3, bias=True, tie_weights=False, scan_layers=stacked).model
    *rows, whole = inspection.parameter_rows(config)
    params = jax.eval_shape(lambda key: model.init_params(config, key), jax.random.key(0))
    assert whole["count"] == cost.n_params(config) == sum(x.size for x in jax.tree.leaves(params))
    assert sum(row["count"] for row in rows) == whole["count"]
    assert sum(row["share, %"] for row in rows) == pytest.approx(100)
    names = {row["module"]: row for row in rows}
    up = names["h_*/mlp/c_fc/kernel"]
    assert (up["shape"], up["blocks"], up["count"]) == ("128 x 512", 3, 3 * 128 * 512)
    assert names["lm_head/kernel"]["blocks"] is None


@pytest.fixture(scope="module")
def plain_programs():
    return programs(PLAIN)


@pytest.fixture(scope="module")
def inspected(plain_programs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measure_machine", lambda precision: Machine(1e9, 1e8))
        patch.setattr(inspection, "programs", lambda config: plain_programs)
        return inspection.inspect(PLAIN, "small", trace_folder=tmp_path_factory.mktemp("trace"))


def test_the_optimized_program_has_the_matmuls_of_the_formula(plain_programs):
    """With any kernels: no matmul is missing, and none is computed twice."""
    for name, program in plain_programs.items():
        matmuls, passes = hlo.matmuls(program.text), 3 if name in ("gradient", "step") else 1
        assert (
            sum(each.flops for each in matmuls)
            == program.formula_flops
            == passes * plain_programs["forward"].formula_flops
        )
        assert all(each.kernel and "?" not in each.shapes for each in matmuls)


def test_flops_and_bytes_match_the_counts_of_xla(plain_programs):
    for program in plain_programs.values():
        assert 1 < xla_counts(program.lowered)["flops"] / program.formula_flops * 1e6 < 1.1
        each, counts = hlo.instructions(program.text).values(), xla_counts(program.compiled)
        assert sum(i.runs * i.flops for i in each) / 1e6 == pytest.approx(counts["flops"], rel=0.01)
        assert sum(i.runs * i.bytes for i in each) / 1e6 == pytest.approx(counts["bytes accessed"], rel=0.03)


def test_compulsory_bytes_are_those_of_the_arrays(plain_programs):
    B, T, V, n = 8, 16, 64, cost.n_params(PLAIN.model)
    assert plain_programs["forward"].bytes == 4 * (n + B * T + B * T * V)
    assert plain_programs["loss"].bytes == 4 * (n + 2 * B * T + 1)
    assert plain_programs["gradient"].bytes == 4 * (n + 2 * B * T + 1 + n)
    rows = {row["figure"]: row["step"] for row in inspection.program_rows(plain_programs)}
    assert rows["bytes, XLA"] > rows["bytes, XLA, optimized"] > rows["bytes, compulsory"]
    state = 4 * 3 * n
    assert rows["memory, arguments"] == pytest.approx((state + 4 * 2 * B * T) / 1e6, rel=1e-3)
    assert rows["memory, donated"] == pytest.approx(-state / 1e6, rel=1e-3), "the state is donated"
    assert rows["memory, results"] == pytest.approx(state / 1e6, rel=1e-2)
    compiled = plain_programs["step"].compiled
    assert rows["memory, total"] == pytest.approx(sum(memory.compiled_bytes(compiled)) / 1e6)
    assert rows["FLOPs, XLA, optimized"] == xla_counts(compiled)["flops"]


def test_recomputed_matmuls_are_counted(change):
    config = change(with_model(remat="blocks", n_layer=2, scan_layers=True, n_embd=16), algorithm="muon")
    found = programs(config)
    gradient, step = (sum(each.flops for each in hlo.matmuls(found[name].text)) for name in ("gradient", "step"))
    assert gradient > found["gradient"].formula_flops, "remat"
    assert step > gradient, "Muon"


def table(report, title):
    (only,) = [each["rows"] for each in report["tables"] if each["title"].startswith(title)]
    return only


def test_parts_add_up_to_the_whole_step(plain_programs, inspected):
    known = hlo.instructions(plain_programs["step"].text)
    modules = [name for row in table(inspected, "Parameters") for name in row["module"].split("/")]
    ran = [Operation(name, 1, 1.0) for name in known]  # so that every part has a row
    parts = roofline.rows(known, ran, 1, modules, Machine(1e9, 1e8))
    assert sum(part["MB"] for part in parts) == pytest.approx(sum(i.runs * i.bytes for i in known.values()) / 1e6)
    C, tokens = 128, 8 * 16
    for i, direction in enumerate(("forward", "backward"), 1):
        (up,) = [each for each in parts if (each["part"], each["pass"]) == ("h_*/mlp/c_fc", direction)]
        assert up["MFLOP"] * 1e6 == pytest.approx(i * 2 * tokens * 4 * C * C, rel=0.1)
    (update,) = [part for part in parts if part["part"] == "optimizer"]
    n = 4 * cost.n_params(PLAIN.model)
    assert update["MB"] * 1e6 >= 7 * n * 0.9, "reads p, m, v, g; writes p, m, v"
    measured = inspected["roofline"]["rows"]
    assert sum(part["measured, ms"] for part in measured if part["part"] != "unnamed") > 0
    assert {(part["part"], part["pass"]) for part in measured} <= {(part["part"], part["pass"]) for part in parts}


def test_a_config_is_inspected_from_end_to_end(inspected):
    assert table(inspected, "Parameters")[-1]["count"] == cost.n_params(PLAIN.model)
    assert all(row["measured, ms"] > 0 for row in table(inspected, "Roofline"))
    notes = " ".join(inspected["notes"])
    assert "attention: reference" in notes
    assert "the ridge is at 10.0 FLOP/byte" in notes
    assert "a step of 128 tokens takes" in notes
    assert "operations; programs dispatched per step: 1. A fusion" in notes
    assert "**Roofline, part by part**" in report.markdown(json.loads(json.dumps(inspected)))
    longest = table(inspected, "Operations of a step")
    assert longest[0]["ms a step"] >= longest[-1]["ms a step"] > 0
    assert any(row["computed by"] for row in longest), "the kernels come from the HLO of the program"


def test_the_load_average_is_that_before_the_measurement(load, plain_programs, monkeypatch):
    monkeypatch.setattr(inspection, "programs", lambda config: load.append(9.0) or plain_programs)
    report = inspection.inspect(PLAIN, "small", measured=False)
    assert load[-1] == 9.0
    assert report["facts"]["load average before"] == 0.5


def test_the_chart_has_a_point_for_each_pass_of_each_part(inspected, tmp_path):
    spec = plots.roofline(inspected)
    (points,) = [each["data"]["values"] for each in spec["layer"] if each["mark"]["type"] == "point"]
    parts = [part for part in table(inspected, "Roofline") if part["MFLOP"]]
    assert [row["FLOP/byte"] for row in points] == [part["FLOP/byte"] for part in parts]
    assert {row["pass"] for row in points if row["part"].endswith("optimizer")} == {"neither"}
    (roof,) = [each["data"]["values"] for each in spec["layer"] if each["mark"]["type"] == "line"]
    assert [row["GFLOP/s"] for row in roof[1:]] == [1.0, 1.0]
    assert roof[1]["FLOP/byte"] == 10.0
    charts.save(spec, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_without_operations_is_reported_and_not_drawn(inspected, capsys, tmp_path, monkeypatch):
    empty = {**inspected, "roofline": {**inspected["roofline"], "rows": []}}
    monkeypatch.setattr(inspection, "inspect", lambda *args, **kwargs: empty)
    monkeypatch.chdir(tmp_path)
    assert cli.run_command(["inspect", "gpt-demo", "--vocab-size", "13", "--roofline", "a.png"]) == 2
    out, err = capsys.readouterr()
    assert "Parameters of small" in out, "the rest of the report is printed"
    assert "--roofline has nothing to draw: JAX's profiler reported no operation" in err
    assert list(tmp_path.iterdir()) == []


def test_jaxprs_and_hlo_are_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--vocab-size", "13", "--n-layer", "1", "--n-embd", "16", "--block-size", "8", "--batch-size", "2"]
    programs = ["--no-measure", "--jaxpr", "forward", "loss", "--hlo", "forward"]
    assert cli.run_command(["inspect", "gpt-demo", *size, *programs]) == 0
    out = capsys.readouterr().out
    assert "dot_general" in out
    assert "ENTRY" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "which recipe or run?"),
        (
            ["nonsense"],
            "no run 'nonsense' in runs; jaxgpt train gpt-demo makes one; nor is there a recipe of that name",
        ),
        (["gpt-demo", "--no-measure", "--roofline", "a.png"], "--roofline has no effect with --no-measure"),
        (["gpt-demo", "--roofline", "nowhere/a.png"], "there is no folder nowhere"),
        (["gpt-demo", "--n-embd", "30"], "try --n-embd 32"),
        (["gpt-demo", "--jaxpr", "loss", "--roofline", "a.png"], "--roofline has no effect with --jaxpr and --hlo"),
    ],
)
def test_bad_input_compiles_nothing(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspection, "programs", None)
    assert cli.run_command(["inspect", *args]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_cannot_fit_is_refused_before_compilation(monkeypatch):
    monkeypatch.setattr(inspection, "programs", None)
    monkeypatch.setattr(inspection.memory, "available", lambda: 1000)
    with pytest.raises(UsageError, match="a training step needs at least"):
        inspection.inspect(PLAIN, "small")


EMPTY = {"mode": "", "facts": {}, "failed": {}, "tables": [], "notes": []}


def test_a_run_is_inspected_by_its_name(tmp_path, monkeypatch, verse):
    from jaxgpt.cli.runs import start_run

    run, _ = start_run(
        Config(
            data=DataConfig(corpus=str(verse)),
            model=PLAIN.model,
            optimizer=PLAIN.optimizer,
            train=PLAIN.train,
        ),
        "mine",
        tmp_path / "runs",
        tmp_path / "data",
    )
    configs = []
    monkeypatch.setattr(inspection, "inspect", lambda config, name, **kwargs: configs.append(config) or EMPTY)
    monkeypatch.chdir(tmp_path)
    assert cli.run_command(["inspect", "mine"]) == 0
    assert cli.run_command(["inspect", "mine", "--runs-dir", str(tmp_path / "runs"), "--no-measure"]) == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.run_command(["inspect", "mine", "--runs-dir=~/runs"]) == 0
    assert configs == [run.config] * 3
