"""Runs in notebooks: `jaxgpt.load`, and samples during training."""

import pytest

import jaxgpt
from jaxgpt.cli.runs import start_run
from jaxgpt.metrics_log import Evaluated, Sampled
from jaxgpt.monitor.spikes import sampler
from jaxgpt.run import RunError
from jaxgpt.sample import SamplingParams
from jaxgpt.train import fit


def test_a_loaded_run_has_a_summary_samples_and_a_chart(trained, tmp_path):
    run, _ = trained
    loaded = jaxgpt.load(run.path)
    assert loaded.step == 20
    assert loaded.config == run.config
    assert loaded.metrics[-1]["val_loss"] == loaded.facts.best.evaluation.loss
    assert "command: jaxgpt train" in repr(loaded)
    assert f"{loaded.facts.best.evaluation.loss:.4f}" in repr(loaded)
    text = loaded.sample("the ", 20, seed=1)
    assert text.startswith("the ")
    assert len(text) == 24
    chart = loaded.plot()
    assert chart._repr_mimebundle_()["image/svg+xml"].startswith("<svg")
    chart.save(tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").stat().st_size > 1000
    for which in ("last", 20, "20"):
        assert jaxgpt.load("hostile", which, runs_dir=run.path.parent).step == 20
    with pytest.raises(RunError, match="no run 'nobody'"):
        jaxgpt.load("nobody", runs_dir=run.path.parent)


def test_samples_during_training_do_not_change_the_metrics(trained, tmp_path):
    run, data_dir = trained
    seen, metrics = [], []
    for name, write in (("plain", None), ("watched", sampler(run.config.model, run.tokenizer))):
        again, corpus = start_run(run.config, name, tmp_path, data_dir)
        seen.clear()
        fit(again, corpus, seen.append, sample=write)
        metrics.append(again.metrics_file.read_bytes())
    assert metrics[0] == metrics[1]
    kinds = [(type(event), event.step) for event in seen if isinstance(event, Evaluated | Sampled)]
    assert kinds == [(Evaluated, 0), (Evaluated, 10), (Sampled, 10), (Evaluated, 20)], "none at step 0 or the end"
    (text,) = [event.text for event in seen if isinstance(event, Sampled)]
    assert text


def test_a_sample_that_runs_out_of_memory_is_empty(trained, monkeypatch):
    def full(*args):
        raise MemoryError

    monkeypatch.setattr("jaxgpt.monitor.spikes.write", full)
    assert sampler(trained[0].config.model, trained[0].tokenizer)({}) == ""


def test_an_earlier_checkpoint_of_a_run_is_loaded_by_its_step(trained):
    run, _ = trained
    early, best = jaxgpt.load(run.path, 10), jaxgpt.load(run.path).facts.best.step
    assert early.step == 10
    assert "parameters after step 10\n" in repr(early)
    assert best == 20
    assert "at step 20\ntrained: 20 steps in " in repr(early)


def test_a_sample_of_a_loaded_run_follows_its_settings(trained):
    loaded, greedy = jaxgpt.load(trained[0].path), SamplingParams(temperature=0)
    text = loaded.sample("the ", 20, seed=1)
    assert loaded.sample("the ", 20, seed=2) != text
    assert loaded.sample("the ", 20, greedy, seed=1) == loaded.sample("the ", 20, greedy, seed=2) != text
    assert loaded.sample("the ", 20, seed=1, stop=text[10:14]) == text[: text.index(text[10:14], 4)]
