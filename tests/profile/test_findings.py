import json

import jax
import pytest

from jaxgpt import cli, cost
from jaxgpt.bench import ours, peak, table, worker
from jaxgpt.config import Config, ModelConfig, OptimizerConfig, TrainConfig, UsageError
from jaxgpt.profile import findings, measured, roofline
from jaxgpt.profile import roofline_plot as rooflines
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
    rows = findings.roofline_rows([work(2000.0, 100), work(500.0, 100)], [40.0, 20.0], machine)
    assert [row["bound by"] for row in rows] == ["products", "memory"]
    assert [row["of the roof, %"] for row in rows] == [50.0, 50.0]
    assert [row["FLOP/byte"] for row in rows] == [20.0, 5.0]


def test_training_a_part_takes_three_times_its_products():
    """So all of them together have the products of a step of a micro-batch, forward and backward."""
    works = roofline.works(CONFIG)
    tokens = CONFIG.train.batch_size // CONFIG.train.accumulate * CONFIG.model.block_size
    forward = cost.flops_per_token(CONFIG.model) * tokens
    assert sum(each.times * each.products for each in works if not each.training) == forward
    assert sum(each.times * each.products for each in works if each.training) == 3 * forward
    (optimizer,) = [each for each in works if each.part == "optimizer"]
    n = 4 * cost.n_params(CONFIG.model)
    assert optimizer.bytes == pytest.approx(4 * n + 3 * n, rel=1e-2), "reads p, m, v, g; writes p, m, v"
    head = next(each for each in works if each.part == "head")
    assert head.bytes == 4 * (2 * 8 * 16 + 13 * 16 + 2 * 8 * 13)


def test_the_machine_is_measured_by_its_best_rounds():
    flops, bandwidth = peak.here("float32", n=64, streamed=4096, seconds=0.0)
    assert flops > 1e6
    assert bandwidth > 1e6


def test_memory_is_measured_and_not_the_handing_out_of_pages():
    """An array that is made anew costs a page fault every 4 kB: several times as slow as memory."""
    stream = ours.Stream(2**22)
    before = worker.page_faults()
    for _ in range(4):
        stream.run()
    assert worker.page_faults() - before < 4 * stream.x.nbytes / 4096 / 10


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "here", lambda precision: (1e9, 1e8))
        some = [each for each in roofline.works(CONFIG) if each.part in ("attention", "optimizer")]
        patch.setattr(roofline, "works", lambda config: some)
        return findings.inspect(CONFIG, "small", trace=tmp_path_factory.mktemp("trace"))


def rows(report, title):
    (found,) = [each["rows"] for each in report["tables"] if each["title"].startswith(title)]
    return found


def test_a_config_is_inspected_from_end_to_end(report, capsys):
    assert rows(report, "Parameters")[-1]["count"] == cost.n_params(CONFIG.model)
    assert rows(report, "Products")[-1]["operands"] == "in all"
    parts = rows(report, "Roofline")
    assert all(row["measured, ms"] > 0 for row in parts)
    assert [row["part"] for row in parts] == ["attention", "attention, + backward", "optimizer"]
    said = " ".join(report["notes"])
    assert "attention: reference" in said
    assert "XLA counts the body of a loop" in said, "of the micro-batches"
    assert "the ridge is at 10.0 FLOP/byte" in said
    assert "a step of 32 tokens takes" in said
    text = table.markdown(json.loads(json.dumps(report)))
    assert "**Roofline, part by part**" in text
    from rich.console import Console

    for part in measured.parts(report, 200):
        Console(width=140).print(part)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 140


def test_a_profile_names_the_operations_of_the_step(report):
    found = rows(report, "Operations of a step")
    assert found[0]["ms a step"] >= found[-1]["ms a step"] > 0
    assert any(row["computed by"] for row in found), "they are known by the program's own text"
    assert any("1 programs handed over a step" in note for note in report["notes"])


def test_the_plot_has_a_point_for_each_pass_of_each_part(report, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    rooflines.draw(report, tmp_path / "a.png")
    (axes,) = kept[0].axes
    points = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    assert len(points) == len(report["roofline"]["works"])
    roof = axes.lines[0]
    assert list(roof.get_ydata())[1:] == [1.0, 1.0], "GFLOP/s"
    assert roof.get_xdata()[1] == 10.0
    assert "FLOP/byte" in axes.get_xlabel()
    assert "GFLOP/s" in axes.get_ylabel()


def test_the_seams_are_printed_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--vocab-size", "13", "--n-layer", "1", "--n-embd", "16", "--block-size", "8", "--batch-size", "2"]
    assert cli.run_verb(["inspect", "gpt-demo", *size, "--jaxpr", "forward", "loss", "--to", "seams"]) == 0
    assert capsys.readouterr().out.split() == ["seams/forward.jaxpr.txt", "seams/loss.jaxpr.txt"]
    assert "dot_general" in (tmp_path / "seams" / "forward.jaxpr.txt").read_text()
    assert cli.run_verb(["inspect", "gpt-demo", *size, "--hlo", "forward"]) == 0
    assert "ENTRY" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["seams"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "which recipe or run?"),
        (["nonsense"], "no run 'nonsense' in runs; jaxgpt train gpt-demo makes one; and no recipe of that name"),
        (["gpt-demo", "--no-measure", "--roofline", "a.png"], "a roofline needs what --no-measure leaves out"),
        (["gpt-demo", "--to", "folder"], "what shall go to folder?"),
        (["gpt-demo", "--out", "nowhere/a.json"], "there is no folder nowhere"),
        (["gpt-demo", "--n-embd", "30"], "heads"),
        (["gpt-demo", "--jaxpr", "loss", "--out", "a.json"], "--out has no effect with --jaxpr and --hlo"),
        (["gpt-demo", "--hlo", "step", "--no-measure"], "--measure has no effect with --jaxpr and --hlo"),
    ],
)
def test_bad_input_compiles_nothing(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(findings, "seams", None)
    assert cli.run_verb(["inspect", *args]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_run_is_refused_before_it_is_compiled(monkeypatch):
    monkeypatch.setattr(findings, "seams", None)
    monkeypatch.setattr(findings.memory, "available", lambda: 1000)
    with pytest.raises(UsageError, match="a training step needs at least"):
        findings.inspect(CONFIG, "small")


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
        findings, "inspect", lambda config, name, **given: asked.append(config) or {"tables": [], "notes": []}
    )
    monkeypatch.chdir(tmp_path)
    assert cli.run_verb(["inspect", "mine"]) == 0
    assert cli.run_verb(["inspect", "mine", "--runs-dir", str(tmp_path / "runs"), "--no-measure"]) == 0
    assert asked == [run.config] * 2
