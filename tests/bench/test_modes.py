"""Each mode in small: real contestants of micro size, in this process; and whole programs that are made up."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.bench import (
    facts,
    memory,
    meshes,
    modes,
    peak,
    ruler,
    sample,
    scaling,
    speedrun,
    startup,
    sweep,
    table,
    train,
    worker,
)
from jaxgpt.bench.processes import Timed
from jaxgpt.bench.shapes import PRECISIONS, config_of, flops_per_step
from jaxgpt.config import MissingExtraError, UsageError

MEASURES = {"train": train, "speedrun": speedrun, "sample": sample, "startup": startup, "scaling": scaling}
MEASURES |= {"memory": memory, "meshes": meshes, "sweep": sweep}


class Here:
    """A worker without a process of its own."""

    def __init__(self, spec, device, env=None):
        self.spec, self.about = spec, {}

    def start(self):
        self.contestant = worker.build(self.spec)
        self.about = self.contestant.about

    def round(self, seconds):
        return worker.work(self.contestant, seconds)

    def __exit__(self, *error): ...


@pytest.fixture
def here(monkeypatch):
    pytest.importorskip("torch", reason="needs the extra: pip install 'jaxgpt[torch]'")
    monkeypatch.setattr(ruler, "Worker", Here)
    monkeypatch.setattr(peak, "N", 64)


def quiet(line): ...


def test_every_option_of_a_mode_is_one_of_its_function():
    for name, mode in modes.MODES.items():
        assert set(mode.options) <= set(modes.OPTIONS)
        if name in MEASURES:
            known = set(inspect.signature(MEASURES[name].measure).parameters)
            assert {"corpus" if option == "text" else option for option in mode.options} <= known, name


def test_every_way_of_the_twin_can_be_asked_for(here):
    from jaxgpt.bench import twin

    assert set(modes.WAYS) == set(twin.WAYS)
    assert {way for ways in train.WAYS.values() for way in ways} <= set(modes.WAYS)


def test_a_warm_run_without_its_cold_run_is_none(monkeypatch):
    def ours(corpus, device, root, name, turn, seed, steps):
        if name.endswith("cold"):
            raise ruler.WorkerError("no disk")
        return {"seconds": 1.0, "loss": 1.0, "best_loss": 1.0, "others": 0.0}

    monkeypatch.setattr(speedrun, "run_ours", ours)
    monkeypatch.setattr(speedrun, "run_twin", lambda *given: {"seconds": 2.0, "loss": 1.9, "others": None})
    report = speedrun.measure("text", recipes=["shakespeare-cpu"], repeats=2, tell=quiet)
    assert set(report["failed"]) == {"shakespeare-cpu cold", "shakespeare-cpu warm"}
    assert [row["run"] for row in report["tables"][0]["rows"]] == ["torch float32"]


def test_without_pytorch_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(modes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs torch, which is not installed: .*jaxgpt\[torch\]"):
        next(modes.train())
    code = "import sys; sys.modules['torch'] = None; import jaxgpt.bench.twin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtraError: the PyTorch twin needs torch" in done.stderr


def test_training_in_small(here):
    report = train.measure(shapes=["micro"], rounds=2, seconds=0, ways=["float32", "bfloat16"], tell=quiet)
    assert report["failed"] == {}
    ratios, each = (found["rows"] for found in report["tables"])
    assert [row["jaxgpt"] for row in ratios] == list(PRECISIONS)
    assert len(each) == len(PRECISIONS) + 2
    found = report["shapes"]["micro"]["rates"]
    assert all(len(rates) == 2 for rates in found.values())
    assert ratios[0]["/ best float32 torch"] == ruler.ratio(found["jaxgpt float32"], found["torch float32"])
    speed, top = each[0]["tokens/s"]["median"], report["shapes"]["micro"]["peak_flops"]
    assert each[0]["ms/step"] == pytest.approx(1e3 * 16 / speed)
    flops = flops_per_step(config_of("micro", "cpu"))
    assert each[0]["use of peak, %"] == pytest.approx(100 * flops * speed / 16 / top)
    assert "| jaxgpt | / best torch |" in table.markdown(report)


def test_a_ratio_is_against_the_best_of_each_kind():
    rates = {"jaxgpt float32": [6.0], "torch float32": [1.0], "torch float32+compile": [2.0], "torch bfloat16": [3.0]}
    (row,) = train.ratio_rows(rates)
    assert [value["median"] for value in row.values() if isinstance(value, dict)] == [2.0, 3.0, 3.0]
    assert row["the best torch"] == "bfloat16"
    assert train.ratio_rows({"jaxgpt float32": [6.0]})[0]["/ best torch"] is None


def test_on_a_gpu_float32_and_tf32_are_told_apart():
    settings = {name: env for name, _, env in train.variants("baby", "gpu", 0.0, train.WAYS["gpu"])}
    assert settings["jaxgpt float32"] != settings["jaxgpt tf32"]
    assert {"torch float32", "torch tf32", "torch bfloat16", "torch bfloat16+compile"} <= set(settings)


def test_sampling_in_small(here):
    report = sample.measure(cases=["micro:2:7"], rounds=1, seconds=0, ways=["float32"], tell=quiet)
    assert report["failed"] == {} or all("transformers" in name for name in report["failed"])
    assert list(report["cases"]) == [
        "micro, batch 2, 7 tokens",
        "micro, batch 2, 7 tokens within block_size",
    ]
    assert set(report["cases"]["micro, batch 2, 7 tokens"]["rates"]) >= {"jaxgpt float32", "torch float32"}
    assert report["tables"][0]["rows"][0]["ratio"]["n"] == 1


@pytest.mark.parametrize("case", ["tiny", "tiny:", "tiny:0:5", "tiny:x", "tiny:1:2:3", "huge:1:5"])
def test_a_case_that_is_none_is_refused(case):
    with pytest.raises(UsageError, match=r"expected|no shape"):
        sample.parse(case)


def test_cases_are_read():
    assert sample.parse("tiny:64") == ("tiny", 64, 512)
    assert sample.parse("baby:1:7") == ("baby", 1, 7)


def test_scaling_counts_seconds_per_step(monkeypatch):
    class Steady:
        """Whoever it is: 1,000 tokens per second."""

        def __init__(self, spec, device, env=None):
            self.about = {"device": "cpu"}

        def start(self): ...

        def round(self, seconds):
            return {"units": 1000, "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 0}

        def __exit__(self, *error): ...

    monkeypatch.setattr(ruler, "Worker", Steady)
    report = scaling.measure(shape="micro", rounds=2, seconds=0, tell=quiet)
    rows = {row["doubled"]: row for row in report["tables"][0]["rows"]}
    assert list(rows) == ["-", "B", "C", "L", "T", "V"]
    assert {name: row["time"]["median"] for name, row in rows.items()} == {**dict.fromkeys(rows, 1), "B": 2, "T": 2}
    assert rows["-"]["ms/step"] == 16
    assert rows["B"]["operations"] == 2
    assert 1 < rows["V"]["operations"] < rows["L"]["operations"] < 2 < rows["T"]["operations"] < rows["C"]["operations"]


def test_meshes_in_small(here, monkeypatch):
    monkeypatch.setattr(meshes, "STRONG", ("data=2,context=2",))
    monkeypatch.setattr(meshes, "WEAK", {"fsdp=8": 8})
    monkeypatch.setattr(meshes, "config", lambda shape, B: replace_batch(config_of(shape, "cpu"), B))
    report = meshes.measure(shape="micro", rounds=1, seconds=0, tell=quiet)
    assert report["failed"] == {}
    strong, weak = (found["rows"] for found in report["tables"])
    assert [(row["mesh"], row["B"]) for row in strong + weak] == [("data=2,context=2", 32), ("fsdp=8", 32)]
    one, over = (report["seconds_per_step"][name][0] for name in ("one, B 32", "data=2,context=2, B 32"))
    assert strong[0]["time, of one device's"]["median"] == over / one


def replace_batch(config, batch_size):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))


def test_memory_in_small(here):
    report = memory.measure(shapes=["micro"], tell=quiet)
    row = report["tables"][0]["rows"][0]
    assert row["XLA / paper"] >= 1, "the count on paper is one from below"


def test_a_speedrun_in_turn(monkeypatch):
    """Three seeds of made-up runs: the ratio is the twin's time divided by ours, and losses are held to the bound."""
    ran = []

    def ours(corpus, device, root, name, turn, seed, steps):
        ran.append((name, seed))
        seconds = (10.0, 20.0, 30.0)[turn] / (2 if name.endswith("warm") else 1)
        return {"seconds": seconds, "loss": (1.87, 1.88, 1.89)[turn], "best_loss": 1.8, "others": 0.0}

    def twin(corpus, device, root, seed, way, twin_recipe, steps):
        ran.append(("torch", seed))
        return {"seconds": 20.0, "loss": 1.9, "others": 0.5}

    monkeypatch.setattr(speedrun, "run_ours", ours)
    monkeypatch.setattr(speedrun, "run_twin", twin)
    report = speedrun.measure("text", recipes=["shakespeare-cpu"], repeats=3, seed=7, tell=quiet)
    names = ("torch", "shakespeare-cpu cold", "shakespeare-cpu warm")
    assert ran == [(name, seed) for seed in (7, 8, 9) for name in names]
    cold, warm, theirs = report["tables"][0]["rows"]
    found = cold["torch / this"]
    assert found == {"median": 1.0, "low": pytest.approx(2 / 3), "high": 2.0, "n": 3}
    assert warm["torch / this"]["median"] == 2.0
    assert (cold["within torch's time"], warm["within torch's time"]) == (False, True)
    assert (cold["reached 1.88"], theirs["reached 1.88"]) == ("2 of 3", "0 of 3")
    assert cold["mean loss"] == "1.8800"
    assert "NOT QUIET" in report["notes"][-1]
    with pytest.raises(UsageError, match="no recipe 'nonsense'"):
        speedrun.measure("text", recipes=["nonsense"])


def test_starting_up_in_turn(monkeypatch):
    places = []

    def first_step(place, name, recipe, corpus, device):
        places.append((place.folder.name, name))
        timed = startup.Timed([], device, {})
        timed.seconds = 3.0
        return timed

    monkeypatch.setattr(startup, "first_step", first_step)
    report = startup.measure(repeats=2, tell=quiet)
    assert places == [("0", "cold"), ("0", "warm"), ("1", "cold"), ("1", "warm")], "warm finds what cold has left"
    rows = {row["what"]: row["seconds"] for row in report["tables"][0]["rows"]}
    assert rows["first step warm"]["median"] == 3.0
    assert 0 < rows["help"]["median"] < 3.0


def test_facts_name_the_machine():
    found = facts.facts("cpu")
    assert found["cores"] >= 1
    assert {"cpu", "python", "jax", "torch", "cpu flags"} <= set(found)
    assert peak.of("gpu", {"a": {"device": "NVIDIA H100 PCIe"}}, None)[0] == 756e12
    assert peak.of("gpu", {"a": {"device": "NVIDIA H200"}}, None)[0] == 989e12
    assert peak.of("gpu", {"a": {"device": "Some other"}}, None)[0] is None
    assert peak.of("cpu", {}, {"a": 1.0, "b": 2.0})[0] == 2.0


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_all_is_each_mode_for_as_long_as_there_is_time(monkeypatch, device):
    asked = []
    for name in MEASURES:

        def mode(*args, name=name, **given):
            inspect.signature(MEASURES[name].measure).bind(*args, **given)
            asked.append(name)
            yield {"mode": name}

        monkeypatch.setattr(modes, name, mode)
    told = list(modes.everything(device=device, until=float("inf"), corpus="text"))
    assert [report["mode"] for report in told] == asked
    assert asked[0] == "train"
    assert asked[-1] == "speedrun"
    assert set(asked) >= {"train", "sample", "memory", "speedrun"}
    assert list(modes.everything(device=device, until=0.0)) == []


def test_all_leaves_every_report_as_soon_as_it_is_there(tmp_path, capsys):
    import json

    reports = [{"mode": name, "facts": {}, "notes": [], "tables": []} for name in ("train", "sample")]
    path = tmp_path / "bench.json"
    modes.leave(reports[:1], path)
    assert json.loads(path.read_text()) == reports[0]
    modes.leave(reports, path)
    assert json.loads(path.read_text()) == {"mode": "all", "reports": reports}
    assert "## sample" in capsys.readouterr().out


def test_a_sweep_is_measured_against_as_many_runs(monkeypatch):
    """Programs that are made up: they leave what real ones leave, and say how long they took."""
    asked = []

    def run(timed, until=None):
        verb, _, *words = timed.words[1:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        asked.append((verb, options))
        if verb == "sweep":
            folder = Path(options["--sweeps-dir"]) / options["--name"]
            lines = [{"seed": seed, "val_loss": 2.0 + seed, "done": True} for seed in (1337, 1338)]
            name, timed.seconds = "results.jsonl", 3.0
        else:
            folder = Path(options["--runs-dir"]) / options["--run"]
            lines = [{"val_loss": 9.0}, {"val_loss": 2.25 + int(options["--seed"])}]
            name, timed.seconds = "metrics.jsonl", 2.0
        folder.mkdir(parents=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return timed

    monkeypatch.setattr(Timed, "run", run)
    report = sweep.measure("python-docs", seeds=2, steps=100, tell=quiet)
    assert [verb for verb, _ in asked] == ["sweep", "train", "train"]
    assert [options["--seed"] for _, options in asked[1:]] == ["1337", "1338"]
    assert {options["--steps"] for _, options in asked} == {"100"}
    assert asked[1][1]["--data-dir"] != asked[2][1]["--data-dir"], "each prepares its text"
    (first, second) = report["tables"][0]["rows"]
    assert (first["what"], first["seconds"]["median"], second["seconds"]["median"]) == ("sweep", 3.0, 4.0)
    assert first["runs / this"]["median"] == pytest.approx(4 / 3)
    assert first["apart, nats"] == "2.5e-01"
