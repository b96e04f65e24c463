"""The command sweep: an interrupted one resumes to the same results; its best setting is a recipe."""

import json
import sys

import pytest

from jaxgpt.cli import run_command
from jaxgpt.recipes import recipe
from jaxgpt.run import Run
from jaxgpt.sweep.cli import save_charts
from jaxgpt.sweep.results import SweepError, SweepFolder


@pytest.fixture
def sweep(tmp_path, verse, monkeypatch):
    """sweep(NAME, more...): two learning rates and two seeds of a bigram, two members at a time."""
    monkeypatch.chdir(tmp_path)
    options = [
        "--steps=20",
        "--scan-steps=10",
        "--eval-every=10",
        "--batch-size=4",
        "--block-size=8",
        "--eval-batches=0",
    ]

    def run(name, *more):
        rates = () if "--lr" in more else ("--lr", "1e-3,1e-1")
        command = ["sweep", "bigram", "--name", name, "--corpus", str(verse), "--seeds", "2", *rates, "--at-once", "2"]
        return run_command([*command, *options, *more])

    return run


def test_an_interrupted_sweep_resumes_to_the_same_results(sweep, tmp_path, monkeypatch, capsys):
    assert sweep("whole") == 0
    out = capsys.readouterr().out
    assert "best: learning_rate 0.1: " in out
    assert "jaxgpt train sweeps/whole/best.json --run whole-best" in " ".join(out.split())
    whole = (tmp_path / "sweeps/whole/results.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [(line["member"], line["step"]) for line in lines] == [
        (member, step) for pair in ((0, 1), (2, 3)) for step in (0, 10, 20) for member in pair
    ]

    add, calls = SweepFolder.add, []

    def interrupt_sixth(folder, scores):
        calls.append([score.member for score in scores])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return add(folder, scores)

    monkeypatch.setattr(SweepFolder, "add", interrupt_sixth)
    assert sweep("cut") == 130
    assert "done and kept: 2 of 4 members; the same command again trains the others" in capsys.readouterr().out
    monkeypatch.setattr(SweepFolder, "add", lambda *args: calls.append([0]) or add(*args))
    assert len((tmp_path / "sweeps/cut/results.jsonl").read_bytes().splitlines()) == 10
    assert sweep("cut") == 0
    assert len(calls) == 6 + 3, "the first two members were not trained again"
    assert "finished already: 2\n" in capsys.readouterr().out
    assert (tmp_path / "sweeps/cut/results.jsonl").read_bytes() == whole
    assert sweep("cut") == 0
    assert len(calls) == 6 + 3, "no member of a finished sweep is trained again"
    capsys.readouterr()

    # Other settings are refused, and the results stay.
    assert sweep("cut", "--lr", "1e-3,1e-2", "--beta2", "0.9") == 2
    error = capsys.readouterr().err
    assert "values.learning_rate: [0.001, 0.1] there, [0.001, 0.01] given" in error
    assert "config.optimizer.beta2: 0.99 there, 0.9 given" in error
    assert (tmp_path / "sweeps/cut/results.jsonl").read_bytes() == whole

    # The best is a recipe, and its run reaches the loss of its member.
    best = tmp_path / "sweeps/cut/best.json"
    assert recipe(str(best)).config.optimizer.learning_rate == 0.1
    assert run_command(["train", str(best), "--run", "cut-best"]) == 0
    last = [line for line in Run(tmp_path / "runs/cut-best").metrics() if "val_loss" in line][-1]
    (member,) = [line for line in lines if line["member"] == 2 and line["done"]]
    assert last["val_loss"] == pytest.approx(member["val_loss"], abs=1e-5)
    for plot in ("settings.png", "curves.png"):
        assert (best.parent / plot).read_bytes().startswith(b"\x89PNG")


def test_a_member_that_diverged_is_not_scored_again(sweep, tmp_path):
    """It trains along with the unfinished member of its chunk."""
    assert sweep("mixed", "--lr", "1e-1,1e38", "--weight-decay", "1", "--seeds", "1") == 0
    results = tmp_path / "sweeps/mixed/results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    scores = [json.loads(line) for line in lines]
    assert [(each["member"], each["step"], each["done"]) for each in scores] == [
        (0, 0, False), (1, 0, False), (0, 10, False), (1, 10, True), (0, 20, True),
    ]  # fmt: skip
    results.write_bytes(b"".join(lines[:4]))
    assert sweep("mixed", "--lr", "1e-1,1e38", "--weight-decay", "1", "--seeds", "1") == 0
    assert results.read_bytes() == b"".join(lines[i] for i in (1, 3, 0, 2, 4)), "the finished member comes first"


def test_a_damaged_result_is_reported(sweep, tmp_path, capsys):
    assert sweep("hurt", "--lr", "1e-1", "--steps", "10") == 0
    for text in ("{}\n", "null\n", "{"):
        (tmp_path / "sweeps/hurt/results.jsonl").write_text(text)
        assert sweep("hurt", "--lr", "1e-1", "--steps", "10") == 2
        assert "results.jsonl is damaged: " in capsys.readouterr().err


def test_a_refused_sweep_leaves_nothing_behind(sweep, tmp_path, capsys):
    assert sweep("bad", "--set", "n_embed=1,2") == 2
    assert "did you mean 'n_embd'?" in capsys.readouterr().err
    assert sweep("bad", "--lr", "1e-3:1e-2") == 2
    wanted = "jaxgpt: lr=1e-3:1e-2: expected lr=VALUE,VALUE or lr=LOW:HIGH:HOW-MANY, values"
    assert wanted in capsys.readouterr().err
    assert sweep("bad", "--set", "vocab_size=8,32") == 2
    assert "no setting 'vocab_size'" in capsys.readouterr().err
    assert run_command(["sweep"]) == 2
    assert run_command(["sweep", "nowhere.json"]) == 2
    assert "nowhere.json cannot be read" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"model": {"n_layers": 3}}')
    assert run_command(["train", str(tmp_path / "odd.json")]) == 2
    assert "did you mean 'n_layer'" in capsys.readouterr().err
    for name in ("../x", "/tmp/x", "a/b", ".", "", "x" * 96):
        assert sweep(name) == 2
        assert f"--name {name!r}: expected letters, digits" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.json"]
    assert sweep("bad", "--at-once", "-1") == 2
    assert "at-once is -1" in capsys.readouterr().err
    (tmp_path / "sweeps/bad").mkdir(parents=True)
    (tmp_path / "sweeps/bad/mine.txt").write_text("")
    assert sweep("bad") == 2
    assert "exists but is not a sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sweeps/bad").iterdir()] == ["mine.txt"]
    (tmp_path / "sweeps/file").write_text("")
    assert sweep("file") == 2
    assert "sweeps/file exists but is not a sweep" in capsys.readouterr().err
    (tmp_path / "sweeps/killed").mkdir()
    for name in (".lock", ".sweep.json.0a1b2c3d.part"):  # left by a kill during the first write
        (tmp_path / "sweeps/killed" / name).write_text("")
    with SweepFolder.locked(tmp_path / "sweeps/killed", {}) as folder:
        assert not folder.finished


def test_a_sweep_without_vl_convert_has_no_plots(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert sweep("bare", "--lr", "1e-1", "--steps", "10") == 0
    assert "no plots were drawn: a chart needs vl-convert-python, which is not installed" in capsys.readouterr().out
    assert (tmp_path / "sweeps/bare/best.json").exists()


def test_a_sweep_whose_charts_cannot_be_written_is_complete(tmp_path, capsys):
    save_charts(tmp_path / "gone", {"settings.json": {}})
    out = capsys.readouterr().out
    assert out.startswith("no plots were drawn: ")
    assert "No such file or directory" in out


def test_nothing_is_recommended_if_every_setting_diverged(sweep, tmp_path, capsys):
    assert sweep("lost", "--lr", "1e38", "--weight-decay", "1", "--steps", "10") == 0
    assert "every setting diverged" in capsys.readouterr().out
    assert not (tmp_path / "sweeps/lost/best.json").exists()


def test_a_sweep_resumes_with_its_options_in_any_order(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")  # narrower than the table
    shared = ("order", "--lr", "1e-1", "--seeds", "1", "--steps", "10", "--data-dir", "texts")
    betas, decays = ("--set", "beta2=0.9,0.99"), ("--set", "weight_decay=0,0.1")
    assert sweep(*shared, *betas, *decays) == 0
    results = tmp_path / "sweeps/order/results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))  # the first two of four members
    assert sweep(*shared, *decays, *betas) == 0
    assert results.read_bytes() == whole
    command = "jaxgpt train sweeps/order/best.json --run order-best --data-dir texts"
    printed = capsys.readouterr().out
    assert command in " ".join(printed.split())
    header = next(line for line in printed.splitlines() if "beta2" in line and "s.e." in line)
    named = ["beta2", "learning_rate", "weight_decay", "seeds", "validation", "loss", "±", "s.e.", "diverged"]
    assert header.split() == named


def test_a_sweep_in_use_is_refused(tmp_path):
    with SweepFolder.locked(tmp_path, {}):
        refused = pytest.raises(SweepError, match="is in use by another process; wait for it, or use --name OTHER")
        with refused, SweepFolder.locked(tmp_path, {}):
            pass


def test_a_sweep_of_other_or_damaged_settings_is_refused(tmp_path):
    def reopen(identity, message):
        with pytest.raises(SweepError, match=message), SweepFolder.locked(tmp_path, identity):
            pass

    with SweepFolder.locked(tmp_path, {"tokens": "a", "values": {"beta2": [0.9]}}):
        pass
    reopen({"tokens": "a"}, r"values\.beta2: \[0\.9\] there, None given$")
    reopen({"tokens": "a", "values": {"beta2": [0.9]}, "more": 1}, r"more: None there, 1 given$")
    (tmp_path / "sweep.json").write_text("{")
    reopen({"tokens": "a"}, r"sweep\.json: it has no seal.*; choose another folder, --name OTHER$")
