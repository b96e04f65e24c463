"""Loggers get the metrics of a run; a logger that fails does not end the run."""

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
LOGGED = [
    (0, {"val/loss": 3.0, "val/bits_per_char": 4.0, "val/bits_per_byte": 5.0}),
    (10, {"train/loss": 2.5, "train/grad_norm": 1.5, "train/learning_rate": 0.1}),
    (20, {"train/loss": 2.0, "train/grad_norm": 1.25, "train/learning_rate": 0.2, "train/tokens_per_second": 99.0}),
]


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def log(run, *names):
    seen = []
    with loggers.logged(run, names, seen.append) as watch:
        for event in EVENTS:
            watch(event)
    return seen


def test_tensorboard_reads_the_metrics(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert log(run, "tensorboard") == EVENTS
    found = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    found.Reload()
    values = {
        name: [(each.step, each.tensor_proto.float_val[0]) for each in found.Tensors(name)]
        for name in found.Tags()["tensors"]
    }
    for name in {name for _, numbers in LOGGED for name in numbers}:
        assert dict(values[name]) == pytest.approx({step: numbers[name] for step, numbers in LOGGED if name in numbers})


def test_a_logger_named_twice_is_opened_once(run, monkeypatch):
    opened = []
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda run: opened.append(run) or (print, lambda: None))
    log(run, "tensorboard", "tensorboard")
    assert opened == [run]


def test_wandb_resumes_the_run_by_its_id(run, tmp_path, tiny, monkeypatch):
    sent, init_args = [], []

    def init(**kwargs):
        init_args.append(kwargs)
        return SimpleNamespace(
            log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    log(run, "wandb")
    run.event("start", step=0)
    run.with_config(run.config)
    log(run, "wandb")
    log(Run.create(tmp_path / "elsewhere", "one", tiny, META), "wandb")
    assert init_args[0]["id"] == init_args[1]["id"] != init_args[2]["id"]
    assert sent == [*LOGGED, "finished"] * 3
    assert init_args[0]["name"] == "one"
    assert init_args[0]["config"]["model"]["n_embd"] == 16
    assert init_args[0]["resume"] == "allow"


def test_trackio_gets_the_metrics(run, monkeypatch):
    sent = []
    fake = SimpleNamespace(
        init=lambda **kwargs: sent.append(kwargs["name"]),
        log=lambda values, step: sent.append((step, values)),
        finish=lambda: sent.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    log(run, "trackio")
    assert sent == ["one", *LOGGED, "finished"]


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_logger_that_fails_is_dropped_with_one_warning(run, monkeypatch, breaks):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    logged = []
    fake = {"init": lambda **kwargs: None, "log": lambda values, step: logged.append(step), "finish": lambda: None}
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(**(fake | {breaks: fail})))
    seen = log(run, "trackio")
    (warned,) = [event for event in seen if isinstance(event, Notice) and event.kind == "log-failed"]
    assert "no network" in warned.text
    assert [event for event in seen if event is not warned] == EVENTS
    assert [event["event"] for event in run.events()] == ["log-failed"]
    assert logged == ([0, 10, 20] if breaks == "finish" else [])


def test_a_missing_library_is_reported_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    words = ["train", "gpt-demo", "--log", "wandb", "--runs-dir", str(tmp_path / "runs")]
    assert cli.run_command(words) == 2
    assert "jaxgpt[loggers]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_warning_about_a_logger_has_the_step_at_which_it_failed(run, monkeypatch):
    def fail(step, values):
        if step == 20:
            raise ConnectionError

    monkeypatch.setitem(loggers.LOGGERS, "trackio", lambda run: (fail, lambda: None))
    (warned,) = [event for event in log(run, "trackio") if isinstance(event, Notice) and event.kind == "log-failed"]
    assert warned.step == 20
