import math
import sys
from types import SimpleNamespace

import pytest

from jaxgpt import cli
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated, Notice, Progress, Sampled
from jaxgpt.monitor import loggers
from jaxgpt.run import Run
from tests.test_run import META

EVENTS = [
    Evaluated(0, Evaluation(3.0, math.nan, 4.0, 5.0, 100)),
    Progress(10, 20, 2.5, None, None, 1.5, 0.1),
    Progress(20, 20, 2.0, 99.0, 0.0, 1.25, 0.2),
    Notice("spike", 20, "it leapt"),
    Sampled(20, "text"),
]
TOLD = [
    (0, {"val/loss": 3.0, "val/bits_per_char": 4.0, "val/bits_per_byte": 5.0}),
    (10, {"train/loss": 2.5, "train/grad_norm": 1.5, "train/learning_rate": 0.1}),
    (20, {"train/loss": 2.0, "train/grad_norm": 1.25, "train/learning_rate": 0.2, "train/tokens_per_second": 99.0}),
]


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def tell(run, *names):
    seen = []
    with loggers.logged(run, names, seen.append) as watch:
        for event in EVENTS:
            watch(event)
    return seen


def test_tensorboard_reads_what_was_written(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert tell(run, "tensorboard") == EVENTS
    found = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    values = {
        name: [(each.step, each.tensor_proto.float_val[0]) for each in found.Tensors(name)]
        for name in found.Tags()["tensors"]
    }
    for name in {name for _, numbers in TOLD for name in numbers}:
        assert dict(values[name]) == pytest.approx({step: numbers[name] for step, numbers in TOLD if name in numbers})


def test_wandb_is_told_of_the_run_and_goes_on_with_it(run, tmp_path, tiny, monkeypatch):
    told, begun = [], []

    def init(**kwargs):
        begun.append(kwargs)
        return SimpleNamespace(
            log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    tell(run, "wandb")
    run.event("start", step=0)
    run.with_config(run.config)
    tell(run, "wandb")
    assert begun[0]["id"] == begun[1]["id"]
    other = Run.create(tmp_path / "elsewhere", "one", tiny, META)
    assert loggers.identity(other) != loggers.identity(run) == begun[0]["id"]
    assert told == [*TOLD, "finished"] * 2
    assert begun[0]["name"] == "one"
    assert begun[0]["config"]["model"]["n_embd"] == 16
    assert begun[0]["resume"] == "allow"


def test_trackio(run, monkeypatch):
    told = []
    fake = SimpleNamespace(
        init=lambda **kwargs: told.append(kwargs["name"]),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tell(run, "trackio")
    assert told == ["one", *TOLD, "finished"]


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_one_that_fails_is_left_out_and_told_of_once(run, monkeypatch, breaks):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    logged = []
    fake = {"init": lambda **kwargs: None, "log": lambda values, step: logged.append(step), "finish": lambda: None}
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(**(fake | {breaks: fail})))
    seen = tell(run, "trackio")
    (warned,) = [event for event in seen if isinstance(event, Notice) and event.kind == "log-failed"]
    assert "no network" in warned.text
    assert [event for event in seen if event is not warned] == EVENTS
    assert [event["event"] for event in run.events()] == ["log-failed"]
    assert logged == ([0, 10, 20] if breaks == "finish" else [])


def test_what_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    words = ["train", "gpt-demo", "--log", "wandb", "--runs-dir", str(tmp_path / "runs")]
    assert cli.run_verb(words) == 2
    assert "jaxgpt[wandb]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
