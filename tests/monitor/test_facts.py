"""Facts of a run, gathered from its config, metrics and events."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import metrics_log
from jaxgpt.config import replaced
from jaxgpt.corpus import Corpus
from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import Evaluated
from jaxgpt.monitor import facts
from jaxgpt.recipes import RECIPES
from jaxgpt.run import Run
from jaxgpt.step import Metrics
from jaxgpt.train import save
from tests.test_run import META

LINE = {"grad_norm": 1.0, "learning_rate": 0.1}


def scored(step, loss, error=0.01):
    names = {"bits_per_char": loss, "bits_per_byte": loss, "n_tokens": 9, "loss": loss, "standard_error": error}
    return {"step": step, **{f"val_{name}": value for name, value in names.items()}}


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def gather_from(run, *lines, events=()):
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for event in events:
        run.event(**event)
    return facts.gather(run)


def test_a_new_run_has_no_curves(run):
    found = facts.gather(run)
    assert (found.step, found.best, found.loss, found.running, found.took) == (0, None, [], True, "")


def test_held_out_tokens_are_the_size_of_the_validation_split(run, tiny, change):
    ids, found = np.zeros(997, np.uint16), facts.gather(run)
    parts = [Corpus(ids[:n], None, {"count": n}) for n in (600, 397)]
    plain = Corpus(ids, None, {"count": 997})
    mixture = Corpus(ids, None, {"count": 997, "parts": [part.meta for part in parts]}, tuple((0.5, p) for p in parts))
    for fraction, most in ((0.004, 0), (0.1, 4_000_000), (0.1, 50)):
        config = change(tiny, val_fraction=fraction, val_tokens=most)
        for corpus in (plain, mixture):
            found = dataclasses.replace(found, config=config, corpus=corpus.meta)
            assert found.held_out == len(corpus.split(config.data)[1])


def test_facts_of_a_run(run):
    found = gather_from(
        run,
        scored(0, 3.0),
        {"step": 1, "loss": 2.5, **LINE},
        {"step": 2, "loss": None, **LINE, "skipped": True},
        scored(2, 2.0),
        events=[
            {"name": "start", "step": 0, "device": "NVIDIA H100 80GB HBM3", "devices": 2},
            {"name": "save", "step": 10, "tokens_per_second": 1e6},
            {"name": "end", "step": 20, "seconds": 62.0},
            {"name": "start", "step": 20, "device": "NVIDIA H100 80GB HBM3", "devices": 2},
            {"name": "end", "step": 20, "seconds": 1.0},
        ],
    )
    assert (found.step, found.loss, found.running, found.took) == (2, [(1, 2.5)], False, "1m03s")
    assert found.best == Evaluated(2, Evaluation(2.0, 0.01, 2.0, 2.0, 9))
    assert found.recipe in found.command
    assert ("n_embd", 128, 16) in found.changes
    flops = 2 * 16 * (12 * 16) + 4 * 8 * 16 + 2 * 13 * 16  # the kernels of the block, its attention, the head
    assert found.utilization == pytest.approx(3 * flops * 1e6 / (2 * 989e12))
    events = [*found.events, {"event": "start", "step": 20, "device": "NVIDIA A100-SXM4-80GB", "devices": 1}]
    assert dataclasses.replace(found, events=events).utilization == found.utilization, "no speed on the A100 yet"


def test_the_command_has_a_vocab_size_that_is_not_that_of_the_tokenizer(run, tmp_path, tiny, change):
    n = run.tokenizer.vocab_size
    for vocab_size, shown in ((n, False), (n + 3, True)):
        other = Run.create(tmp_path, f"of-{vocab_size}", change(tiny, vocab_size=vocab_size), META)
        assert ("--vocab-size" in facts.gather(other).command) == shown


def test_the_command_has_no_key_to_a_url():
    for corpus in ("https://me:key@host/a.txt", "https://host/a.txt?sig=key", "0.5*https://host/a.txt#key + 0.5*b.txt"):
        command = facts.command(replaced(RECIPES["gpt-demo"].config, corpus=corpus))
        assert "https://host/a.txt" in command
        assert "key" not in command


@pytest.mark.parametrize(
    ("losses", "overfits_from"),
    [([3, 2, 1], None), ([3, 1, 2], 1), ([3, 1, 1.005], None), ([3], None), ([2, 2.5, 3], 0)],
)
def test_a_run_overfits_if_the_last_score_is_worse_by_more_than_its_error(run, losses, overfits_from):
    found = gather_from(run, *(scored(step, loss) for step, loss in enumerate(losses)))
    assert found.overfits_from == overfits_from


@given(st.integers(0, 2**32), st.integers(1, 500), st.integers(6, 80))
def test_a_thinned_curve_keeps_its_ends_and_extremes(seed, length, n):
    values = np.random.default_rng(seed).standard_normal(length).tolist()
    points = list(enumerate(values))
    kept = facts.thinned(points, n)
    assert len(kept) <= n
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {points[0], points[-1]} <= set(kept)
    assert {min(values), max(values)} <= {value for _, value in kept}


class SlowCheckpoints:
    """Fake checkpoints: a save blocks the loop for 100 s, and is recorded when `settle` waits for it."""

    def __init__(self, now):
        self.now, self.record = now, lambda: None

    def save(self, state, about, record):
        self.record, self.now[0] = record, self.now[0] + 100

    def settle(self, wait=True):
        if wait:
            self.record()
            self.record = lambda: None


def test_speed_between_saves_counts_the_steps_between_them(run, tiny, monkeypatch):
    """Chunks of 5 steps take 7 s, 5 s, 10 s and 20 s, evaluations 50 s. The first chunk is not timed."""
    now, losses = [0.0], jnp.ones(5)
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    chunk = Metrics(losses, losses, losses, losses > 0)
    run.event("start", step=0)
    log = metrics_log.MetricsLog(run, 0, lambda step: None, lambda event: None)

    def score(step):
        now[0] += 50
        log.add_evaluation(step, Evaluation(2.0, 0.1, 3.0, 3.0, 100), {})

    with log:
        slow = SlowCheckpoints(now)
        score(0)
        for begin, seconds in ((0, 7), (5, 5), (10, 10), (15, 20)):
            log.add(begin, chunk)
            slow.settle(wait=False)
            now[0] += seconds
            log.flush()
            if begin in (5, 15):
                score(begin + 5)
                save(log, slow, SimpleNamespace(step=begin + 5))
        slow.settle()
    per_step = 4 * 8
    assert facts.gather(run).speed == [(10, per_step * 5 / 5), (20, per_step * 10 / 30)]
    assert facts.gather(run).tokens_per_second == log.speed["tokens_per_second"] == per_step * 15 / 35
    again = {"event": "save", "step": 30, "trained_tokens": 640, "trained_seconds": 10.0}
    assert facts.speeds([*run.events(), {"event": "start", "step": 20}, again])[-1] == (30, 64.0)


def test_a_failure_is_an_incident_with_its_step(run, tiny):
    losses = jnp.ones(5)
    log = metrics_log.MetricsLog(run, 0, lambda step: None, lambda event: None)
    log.add(0, Metrics(losses, losses, losses, losses > 0))
    log.flush()
    with pytest.raises(KeyError), log:
        raise KeyError("gone")
    found = facts.gather(run)
    assert found.incidents == [(5, "broken-off", "KeyError: 'gone'")]
    assert run.events()[-1]["seconds"] > 0
    assert dataclasses.replace(found, events=[{"event": "broken-off"}]).incidents == []  # of a run of version 0.1


@pytest.mark.parametrize(
    ("last", "running"),
    [("start", True), ("end", False), ("broken-off", False), ("import", False)],
)
def test_events_of_loggers_do_not_make_a_run_running(run, last, running):
    events = [] if last == "start" else [{"name": last, "step": 9}]
    events = [{"name": "start", "step": 0}, *events, {"name": "log-failed", "step": 0, "text": "x"}]
    found = gather_from(run, events=events)
    assert found.running == running
    assert not dataclasses.replace(found, cut_off=True).running, "its process was killed"


def test_the_time_counts_the_processes_that_recorded_their_end(run):
    start, save = {"event": "start", "step": 0}, {"event": "save", "step": 90}
    end, broken = {"event": "end", "seconds": 61.5}, {"event": "broken-off", "seconds": 120.0}
    found = facts.gather(run)
    for events, took in (
        ([], ""),
        ([start, save], ""),
        ([start, end], "1m02s"),
        ([start, broken], "2m00s"),
        ([start, broken, start, end], "3m02s"),
        ([start, save, start, end], "at least 1m02s"),
        ([start, end, start, save], "at least 1m02s"),
        ([start, {"event": "broken-off"}, start, end], "at least 1m02s"),  # of a run of version 0.1
    ):
        assert dataclasses.replace(found, events=events).took == took


def test_the_error_that_decides_on_overfitting_is_that_of_the_last_score(run):
    assert gather_from(run, scored(0, 1.0, error=5.0), scored(1, 2.0, error=0.5)).overfits_from == 0
    assert gather_from(run, scored(0, 1.0, error=0.5), scored(1, 2.0, error=5.0)).overfits_from is None


def test_a_first_start_after_step_0_is_a_resume():
    """Its run was copied without its earlier events."""
    assert facts.kinds([{"event": "start", "step": 5}, {"event": "start", "step": 9}]) == ["resume", "resume"]


def test_a_second_start_at_step_0_is_a_resume():
    """The first process ended before it saved."""
    assert facts.kinds([{"event": "start", "step": 0}, {"event": "start", "step": 0}]) == ["start", "resume"]


def test_settings_that_differ_have_the_value_of_each_run(run, tiny):
    runs = [dataclasses.replace(facts.gather(run), config=replaced(tiny, n_layer=n, seed=n)) for n in (1, 2, 1)]
    assert facts.differing(runs) == [("n_layer", [1, 2, 1]), ("seed", [1, 2, 1])]
    assert facts.differing(runs[::2]) == []


def test_the_command_turns_a_setting_on_or_off():
    base = RECIPES["gpt-demo"].config
    assert facts.command(replaced(base, eval_start=False)).endswith(" --no-eval-start")
    assert facts.command(replaced(base, scan_layers=True)).endswith(" --scan-layers")


def test_the_command_leaves_out_decay_steps_that_follow_the_steps():
    base = RECIPES["gpt-demo"].config
    for decay_steps, shown in ((base.train.steps, False), (base.train.steps + 1, True)):
        assert ("--decay-steps" in facts.command(replaced(base, decay_steps=decay_steps))) == shown


def test_an_evaluation_that_diverged_is_no_score(run):
    found = gather_from(run, scored(0, 3.0), scored(5, 2.0), scored(10, None, error=None))
    assert [step for step, _ in found.scores] == [0, 5]
    assert (found.step, found.best.step) == (10, 5)


def test_a_curve_has_no_more_points_than_asked_for(run):
    run.metrics_file.write_text("".join(f'{{"step": {i}, "loss": {i % 7}}}\n' for i in range(100)))
    assert [len(facts.gather(run, points=n).loss) <= n for n in (6, 20, 99)] == [True] * 3
    assert len(facts.gather(run, points=100).loss) == 100
