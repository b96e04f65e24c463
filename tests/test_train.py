"""fit(): equal configs give equal runs, also if interrupted and resumed, and however often they are evaluated."""

import dataclasses
import itertools
import json
import math
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxgpt import config as configs
from jaxgpt import data as batches
from jaxgpt import evaluation, matmul, metrics_log, sharding, step
from jaxgpt import train as loop
from jaxgpt.checkpoint import CheckpointError, Checkpoints
from jaxgpt.cli.runs import resolve, start_run
from jaxgpt.cli.runs import resume as resume_corpus
from jaxgpt.config import DataConfig
from jaxgpt.corpus import Corpus
from jaxgpt.metrics_log import DivergedError, Evaluated, Notice, Progress, Sampled
from jaxgpt.prepare.build import prepare_corpus
from jaxgpt.run import Run, RunError
from jaxgpt.sample import SamplingParams, write
from jaxgpt.sharding import one_device
from jaxgpt.start import load_model
from jaxgpt.step import abstract_state
from jaxgpt.train import fit
from tests.processes import resume, wait_for


@pytest.fixture(scope="module")
def tiny(tiny_config, verse):
    return configs.replaced(tiny_config, corpus=str(verse), vocab_size=0, scan_steps=5, eval_every=10)


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """An uninterrupted run of `tiny`, which no test changes."""
    folder = tmp_path_factory.mktemp("unbroken")
    return fit(*start_run(tiny, "unbroken", folder / "runs", folder / "data")).run


@pytest.fixture
def new_run(tmp_path):
    def make(name, config):
        return start_run(config, name, tmp_path / "runs", tmp_path / "data")

    return make


def last_state(run):
    checkpoints = Checkpoints(run.checkpoints)
    return checkpoints.restore(checkpoints.latest, abstract_state(run.config, one_device()))


def assert_same_run(a, b):
    assert (a.path / "metrics.jsonl").read_bytes() == (b.path / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, last_state(a), last_state(b))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"eval_every": 7}, "eval_every is 7, expected a multiple"), ({"n_embd": 32}, "another\n  n_embd: 16")],
)
@pytest.mark.parametrize("trained", [False, True])
def test_a_config_that_is_refused_leaves_the_run_as_it_is(tiny, new_run, changes, message, trained):
    run, corpus = new_run("kept", configs.replaced(tiny, steps=5, eval_every=5, eval_batches=0))
    if trained:
        fit(run, corpus)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "events.jsonl"}
    with pytest.raises(configs.UsageError, match=message):
        fit(run, corpus, config=configs.replaced(run.config, steps=10, **changes))
    assert all(path.read_bytes() == data for path, data in before.items())
    assert fit(Run(run.path), corpus).step == 5


def test_a_new_run_is_trained_on_its_own_corpus_only(tiny, new_run, tmp_path, verse):
    run, _ = new_run("own", tiny)
    (tmp_path / "other.txt").write_text(verse.read_text()[::-1])
    _, other = new_run("other", configs.replaced(tiny, corpus=str(tmp_path / "other.txt")))
    with pytest.raises(RunError, match=f"expected its corpus text, tokens of SHA-256 {run.corpus_meta['sha256']}"):
        fit(run, other)
    assert not run.metrics_file.exists()


def test_weights_of_another_model_make_no_run(tiny, new_run, tmp_path):
    run, _ = new_run("one", tiny)
    params = step.init_state(configs.replaced(run.config, n_embd=32)).params
    with pytest.raises(RunError, match="other names, shapes or dtypes than the parameters"):
        start_run(tiny, "two", tmp_path / "runs", tmp_path / "data", params)
    assert not (tmp_path / "runs/two").exists()


def test_weights_of_another_dtype_make_no_run(tiny, new_run, tmp_path):
    run, _ = new_run("one", tiny)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), step.init_state(run.config).params)
    with pytest.raises(RunError, match="other names, shapes or dtypes than the parameters"):
        start_run(tiny, "two", tmp_path / "runs", tmp_path / "data", params)


def test_a_new_run_is_trained_with_its_own_tokenizer_only(tiny, new_run):
    run, corpus = new_run("own", tiny)
    other = Corpus(corpus.tokens, corpus.tokenizer, {**corpus.meta, "tokenizer": {"kind": "byte"}})
    with pytest.raises(RunError, match="or another tokenizer"):
        fit(run, other)
    assert not run.metrics_file.exists()


DEFAULTS = dict(jax.config.values)
FLAGS = {
    "jax_enable_x64": True,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 7,
}


class Stop(Exception):
    pass


def stop_after(step):
    def watch(event):
        if isinstance(event, Progress) and event.step >= step:
            raise Stop

    return watch


@pytest.fixture
def sigterm_at():
    """sigterm_at(step): an `on_event` that sends SIGTERM when `step` is reported, while the next chunk is running."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def at(step):
        return lambda event: isinstance(event, Progress) and event.step == step and os.kill(os.getpid(), signal.SIGTERM)

    yield at
    signal.signal(signal.SIGTERM, before)


@pytest.mark.smoke
def test_fit_reports_its_events_and_scores(tiny, new_run):
    events = []
    run, corpus = new_run("one", tiny)
    done = fit(run, corpus, events.append)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 10, 20]
    assert [event.step for event in events if isinstance(event, Progress)] == [5, 10, 15, 20]
    assert (done.step, done.steps, done.interrupted_by) == (20, 20, 0)
    assert [scored.step for scored in done.scores] == [0, 10, 20]
    assert done.best.evaluation.loss == min(scored.evaluation.loss for scored in done.scores)
    assert done.scores[-1].evaluation.loss < done.scores[0].evaluation.loss
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, 21))
    recorded = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    evaluated = [event for event in recorded if event["event"] == "evaluate"]  # before or after the save ends
    assert [event["event"] for event in recorded if event not in evaluated] == ["start", "save", "save", "end"]
    assert [event["step"] for event in evaluated] == [0, 10, 20]
    assert 0 < sum(event["paused"] for event in evaluated) <= recorded[-1]["seconds"]
    assert recorded[0]["devices"] == 1, "one of the eight devices"


def test_estimates_are_those_of_their_split_and_step(tiny, new_run, monkeypatch):
    run, corpus = new_run("one", tiny)
    train, val = corpus.split(run.config.data)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(loop, "estimate", lambda config, params, tokens, step: (len(tokens), step))
    estimates = loop.score(run.config, corpus, step.TrainState(jnp.int32(7), None, None))[2]
    assert estimates == {"train_estimate": (len(train), 7), "val_estimate": (len(val), 7)}


@pytest.mark.parametrize("eval_start", [True, False])
def test_imported_weights_are_evaluated_at_step_0_if_asked(tiny, change, eval_start):
    imported = SimpleNamespace(step=0, about={"config": dataclasses.asdict(tiny)})
    assert loop.due_at_start(change(tiny, eval_start=eval_start), imported) == eval_start


def test_evaluation_is_compiled_ahead_of_time_without_eval_start(tiny, change, new_run):
    evaluation._loss_sums.clear_cache()
    late = change(tiny, eval_start=False, eval_batches=0)
    fit(*new_run("late", late))
    assert evaluation._loss_sums._cache_size() == 0
    fit(*new_run("early", change(late, eval_start=True)))
    assert evaluation._loss_sums._cache_size() == 1


def test_two_runs_of_one_config_are_equal(tiny, new_run, unbroken):
    assert_same_run(unbroken, fit(*new_run("again", tiny)).run)


@pytest.mark.slow
def test_flags_of_jax_do_not_change_a_run(tiny, change, new_run, set_flags):
    """Started with the flags and resumed without them, and the other way round: weights, dropout, sums and samples."""
    tiny = change(tiny, dropout=0.2, accumulate=2)
    plain, corpus = new_run("plain", tiny)
    fit(plain, corpus)
    runs = {name: new_run(name, tiny)[0] for name in ("before", "after")}
    with pytest.raises(Stop):
        fit(runs["after"], corpus, stop_after(10))
    set_flags(**FLAGS)
    with pytest.raises(Stop):
        fit(runs["before"], corpus, stop_after(10))
    fit(runs["after"], corpus)
    text = ["".join(pieces) for pieces in write(*load_model(plain), "the", 20, SamplingParams(top_p=0.9), samples=2)]
    set_flags(**{name: DEFAULTS[name] for name in FLAGS})
    fit(runs["before"], corpus)
    for run in runs.values():
        assert_same_run(plain, run)
    again = write(*load_model(plain), "the", 20, SamplingParams(top_p=0.9), samples=2)
    assert text == ["".join(pieces) for pieces in again]


def test_more_frequent_evaluation_changes_no_step(tiny, change, new_run):
    often = fit(*new_run("often", change(tiny, eval_every=5, eval_batches=7))).run
    never = fit(*new_run("never", change(tiny, eval_every=0, eval_batches=0))).run
    steps = [[line for line in run.metrics() if "loss" in line] for run in (often, never)]
    assert steps[0] == steps[1]
    jax.tree.map(np.testing.assert_array_equal, last_state(often).params, last_state(never).params)


@pytest.mark.parametrize("step", [5, 10, 15])
def test_resumed_run_equals_an_unbroken_one(tiny, new_run, unbroken, step):
    broken, corpus = new_run("broken", tiny)
    with pytest.raises(Stop):
        fit(broken, corpus, stop_after(step))
    fit(broken, corpus)
    assert_same_run(unbroken, broken)


@pytest.mark.parametrize("killed", [False, True])
def test_run_that_ends_before_an_evaluation_resumes_with_it(tiny, new_run, unbroken, monkeypatch, sigterm_at, killed):
    """A signal in the chunk before it skips the evaluation, so that the run ends soon; a run that dies during the
    evaluation has already saved. After the resume, even the manifests are those of an unbroken run."""
    broken, corpus = new_run("broken", tiny)

    def die(config, corpus, state, score=loop.score):
        if state.step == 10:
            raise Stop
        return score(config, corpus, state)

    if killed:
        with monkeypatch.context() as patched:
            patched.setattr(loop, "score", die)
            with pytest.raises(Stop):
                fit(broken, corpus)
    else:
        done = fit(broken, corpus, sigterm_at(5))
        assert [scored.step for scored in done.scores] == [0]
    checkpoints = Checkpoints(broken.checkpoints)
    assert checkpoints.steps == [10]
    fit(broken, corpus)
    assert_same_run(unbroken, broken)
    for saved in (10, 20):
        found, wanted = (Checkpoints(run.checkpoints).verify(saved) for run in (broken, unbroken))
        assert found.about == wanted.about


def test_metrics_are_on_disk_before_each_save(tiny, new_run, monkeypatch):
    run, corpus = new_run("one", tiny)
    save, seen = Checkpoints.save, []

    def look_then_save(checkpoints, state, about, then):
        seen.append((int(state.step), run.metrics()[-1]["step"]))
        assert about["metrics"]["bytes"] == run.metrics_file.stat().st_size
        save(checkpoints, state, about, then)

    monkeypatch.setattr(Checkpoints, "save", look_then_save)
    fit(run, corpus)
    assert seen == [(10, 10), (20, 20)]


def test_resuming_a_finished_run_changes_nothing(tiny, new_run):
    run, corpus = new_run("one", tiny)
    first = fit(run, corpus)
    before = (run.path / "metrics.jsonl").read_bytes()
    again = fit(run, corpus)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert again.scores == first.scores


def test_corpus_on_disk_gives_the_same_run(tiny, new_run, unbroken, monkeypatch):
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    assert_same_run(unbroken, fit(*new_run("disk", tiny)).run)


def test_read_error_of_the_corpus_ends_the_run(tiny, new_run, monkeypatch):
    def torn(tokens, starts, T, gather=batches.gather):
        if failures.pop():
            raise OSError(5, "Input/output error")
        return gather(tokens, starts, T)

    failures = [True, False, False, False]  # popped from the end: the fourth read fails
    monkeypatch.setattr(batches, "DEVICE_TOKENS", 0)
    monkeypatch.setattr(batches, "gather", torn)
    with pytest.raises(OSError, match="Input/output error"):
        fit(*new_run("torn", tiny))


def test_resumed_run_on_a_mixture_is_bitwise_equal(tiny, change, tmp_path, verse):
    (tmp_path / "b.txt").write_text("a hat on a cat\n" * 30)
    config = change(tiny, corpus=f"0.7*{verse} + 0.3*{tmp_path / 'b.txt'}", vocab_size=0)
    whole, broken = (start_run(config, name, tmp_path / "runs", tmp_path / "data") for name in ("whole", "broken"))
    fit(*whole)
    run, corpus = broken
    fit(run, corpus, config=change(run.config, steps=10))
    longer = change(run.config, steps=20)
    fit(run, resume_corpus(longer, run, tmp_path / "data"), config=longer)
    assert_same_run(whole[0], run)


def test_last_save_of_an_interrupted_run_is_tried_twice(tiny, new_run, change, monkeypatch, sigterm_at):
    def fail_once(checkpoints, state, about, then, save=Checkpoints.save):
        if state.step == 30 and not failed:
            failed.append(30)
            raise CheckpointError("step 30 was not saved")
        save(checkpoints, state, about, then)

    failed: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", fail_once)
    run, corpus = new_run("one", change(tiny, steps=40, eval_every=20))
    assert fit(run, corpus, sigterm_at(25)).step == 30
    assert failed == [30]
    assert Checkpoints(run.checkpoints).latest == 30


def test_failure_to_begin_the_last_save_is_an_error(tiny, new_run, monkeypatch):
    def fail(*args):
        raise CheckpointError("the save did not begin")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(CheckpointError, match=r"^the save did not begin; no step is saved yet, and the run ends"):
        fit(*new_run("one", tiny))


def test_run_that_is_moved_while_it_trains_ends_with_an_error(tiny, new_run):
    def move(event):
        if isinstance(event, Evaluated) and event.step == 10:
            while Checkpoints(run.checkpoints).latest != 10:  # until its save has finished
                time.sleep(0.01)
            run.path.rename(run.path.with_name("two"))

    run, corpus = new_run("one", tiny)
    with pytest.raises(CheckpointError, match=r"it was moved or deleted; nothing more is saved.*: put it back"):
        fit(run, corpus, move)
    assert not run.path.exists()
    assert fit(Run(run.path.with_name("two")), corpus).step == 20


def test_run_with_a_second_writer_ends_at_its_next_save(tiny, new_run, change):
    """As on two hosts with a network file system without locks, where no later save could succeed."""

    def write_too(event):
        if isinstance(event, Evaluated) and event.step == 5:
            with run.metrics_file.open("ab") as log:
                log.write(b'{"step": 6}\n')

    run, corpus = new_run("one", change(tiny, eval_every=5))
    with pytest.raises(CheckpointError, match=r"has changed it; step 5 is saved, and the run ends: end the other"):
        fit(run, corpus, write_too)
    assert Checkpoints(run.checkpoints).latest == 5
    assert fit(Run(run.path), corpus).step == 20


def test_second_writer_during_the_last_evaluation_is_reported(tiny, new_run):
    def write_too(event):
        if isinstance(event, Evaluated) and event.step == 20:
            with run.metrics_file.open("ab") as log:
                log.write(b'{"step": 21}\n')

    run, corpus = new_run("one", tiny)
    with pytest.raises(CheckpointError, match="has changed it; step 20 is saved"):
        fit(run, corpus, write_too)


def test_failed_save_is_reported_before_the_next_one(tiny, new_run, monkeypatch):
    def fail_once(checkpoints, wait=True, settle=Checkpoints.settle):
        settle(checkpoints, wait)
        if not wait and not failed:
            failed.append(True)
            raise CheckpointError("the disk is full")

    failed, events = [], []
    monkeypatch.setattr(Checkpoints, "settle", fail_once)
    fit(*new_run("one", tiny), events.append)
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert notice.kind == "save-failed"
    assert notice.step < 20


def test_signal_during_an_evaluation_ends_the_run_at_its_step(tiny, new_run, sigterm_at):
    def signal_at_10(event):
        if isinstance(event, Evaluated) and event.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    done = fit(*new_run("one", tiny), signal_at_10)
    assert (done.step, done.interrupted_by) == (10, signal.SIGTERM)
    assert [scored.step for scored in done.scores] == [0, 10]


def test_signal_in_the_last_chunk_does_not_interrupt_the_run(tiny, new_run, sigterm_at):
    done = fit(*new_run("one", tiny), sigterm_at(15))
    assert (done.step, done.interrupted_by) == (20, 0)


def test_signal_in_the_first_chunk_after_a_resume_saves_that_chunk(tiny, new_run, sigterm_at):
    run, corpus = new_run("one", tiny)
    assert fit(run, corpus, sigterm_at(5)).step == 10
    done = fit(run, corpus, lambda event: isinstance(event, Evaluated) and os.kill(os.getpid(), signal.SIGTERM))
    assert (done.step, done.interrupted_by) == (15, signal.SIGTERM)
    assert Checkpoints(run.checkpoints).latest == 15


def test_interrupted_run_is_evaluated_if_its_end_moves_to_its_last_step(tiny, new_run, change, sigterm_at):
    run, corpus = new_run("one", change(tiny, steps=40, eval_every=20, eval_start=False))
    done = fit(run, corpus, sigterm_at(5))
    assert (done.step, done.interrupted_by) == (10, signal.SIGTERM)
    assert (done.scores, done.best) == ([], None)
    again = fit(run, corpus, config=change(run.config, steps=10))
    assert [scored.step for scored in again.scores] == [10]


def test_extended_run_keeps_the_evaluation_at_its_first_end(tiny, new_run, change):
    """`eval_every` no longer asks for it, but without it the best checkpoint might be removed."""
    run, corpus = new_run("one", change(tiny, steps=15))
    first = fit(run, corpus)
    longer = fit(run, corpus, config=change(run.config, steps=20))
    assert [scored.step for scored in longer.scores] == [0, 10, 15, 20]
    assert longer.scores[:3] == first.scores


def test_speed_excludes_the_compilation_of_a_shorter_chunk(tiny, new_run, change, monkeypatch):
    class Slow:  # a program that takes an hour to compile
        def __init__(self, step):
            self.step = step

        def lower(self, *args):
            self.lowered = self.step.lower(*args)
            return self

        def compile(self):
            clock.append(clock[-1] + 3600.0)
            return self.lowered.compile()

    def tick():
        clock.append(clock[-1] + 1.0)
        return clock[-1]

    clock, jitted = [0.0], loop.jit_train_steps
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(loop, "jit_train_steps", lambda *args: Slow(jitted(*args)))
    run, corpus = new_run("one", change(tiny, steps=13))
    fit(run, corpus)
    assert clock[-1] > 7200
    assert 0 < run.last_event("save")["trained_seconds"] < 3600


def test_eval_start_changes_only_the_line_of_step_0(tiny, change, new_run, unbroken):
    """All other lines are the same."""
    done = fit(*new_run("one", change(tiny, eval_start=False)))
    assert [scored.step for scored in done.scores] == [10, 20]
    without, lines = (run.metrics_file.read_text().splitlines() for run in (done.run, unbroken))
    assert lines[1:] == without


def test_auto_precision_is_resolved_when_a_run_starts(tiny, change, new_run, monkeypatch):
    """So a run that is resumed on another machine keeps its precision."""
    monkeypatch.setattr(matmul, "resolve", lambda precision: "bfloat16" if precision == "auto" else precision)
    run, _ = new_run("one", change(tiny, precision="auto"))
    assert run.config.model.precision == "bfloat16"
    assert new_run("two", tiny)[0].config.model.precision == "float32"


@pytest.mark.parametrize("eval_start", [True, False])
def test_a_new_run_compiles_its_programs_once(tiny, change, new_run, caplog, eval_start):
    """Another thread compiles them ahead of time, for the shapes of the state: the steps, and the evaluation if steps
    come first. Calls with the state itself use those programs: the main thread, whose compilations are logged here,
    compiles no other."""
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        fit(*new_run("one", change(tiny, steps=10, eval_start=eval_start, eval_batches=0)))
    compiled = [record.getMessage().split()[1] for record in caplog.records if "Compiling" in record.getMessage()]
    assert ("jit(_loss_sums)" in compiled) == eval_start
    assert "jit(train_steps)" not in compiled


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(*steps): from now on, the loss of these steps (counted from 1) is NaN."""

    def poison(*steps):
        real_train_step = step.train_step

        def train_step(config, state, batch, hyper=None):
            with monkeypatch.context() as patch:
                bad = jnp.isin(state.step + 1, jnp.array(steps))
                losses, here = step.model.losses, threading.get_ident()

                def poisoned(*args):
                    found = losses(*args)  # another thread may be tracing an evaluation
                    return found + jnp.log(jnp.where(bad, -1.0, 1.0)) if threading.get_ident() == here else found

                patch.setattr(step.model, "losses", poisoned)
                return real_train_step(config, state, batch, hyper)

        monkeypatch.setattr(step, "train_step", train_step)
        step._jit_train_steps.cache_clear()

    yield poison
    step._jit_train_steps.cache_clear()


@pytest.mark.smoke
def test_non_finite_step_is_skipped_and_recorded(tiny, new_run, unbroken, poisoned):
    poisoned(13)
    events = []
    run, corpus = new_run("one", tiny)
    fit(run, corpus, events.append)
    lines, before = ([line for line in each.metrics() if "loss" in line] for each in (run, unbroken))
    assert lines[:12] == before[:12]
    assert lines[12]["skipped"]
    assert lines[12]["loss"] is None
    assert lines[12]["learning_rate"] == before[12]["learning_rate"]
    n_tokens, T, B = len(corpus.split(DataConfig())[0]), tiny.model.block_size, tiny.train.batch_size
    assert lines[12]["window_starts"] == batches.window_starts(tiny.train.seed, 12, n_tokens, T, B).tolist()
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert not any("skipped" in line for line in lines[:12] + lines[13:])
    assert all(math.isfinite(line["loss"]) for line in lines[13:])
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert (notice.kind, notice.step) == ("skip", 13)
    assert "this step was skipped" in notice.text
    assert [event["step"] for event in run.events() if event["event"] == "skip"] == [13]


def test_too_many_consecutive_skips_end_the_run(tiny, change, new_run, poisoned):
    """They are counted across a resume."""
    poisoned(6, 9, 10, 11, 12)
    run, corpus = new_run("one", change(tiny, max_skipped=4))
    with pytest.raises(Stop):
        fit(run, corpus, stop_after(10))
    with pytest.raises(DivergedError, match=r"step 12: loss nan.* 4 steps in a row were skipped"):
        fit(run, corpus)
    assert Checkpoints(run.checkpoints).steps == [10]
    for leaf in jax.tree.leaves(last_state(run)):
        assert np.isfinite(leaf).all()
    assert run.metrics()[-1]["step"] == 12


@pytest.mark.smoke
def test_debug_nans_names_the_step_and_the_operation(tiny, new_run, change, poisoned):
    poisoned(13)
    run, corpus = new_run("one", change(tiny, kind="bigram"))  # a step of few operations, each of which is checked
    with pytest.raises(DivergedError, match=r"step 13: loss nan.*nan generated by primitive: log"):
        fit(run, corpus, debug_nans=True)
    assert Checkpoints(run.checkpoints).steps == [10]


def test_find_nan_names_the_operation_with_a_sharded_embedding(tiny, monkeypatch):
    """Its lookup is a shard_map, in which checkify fails."""
    monkeypatch.setattr(loop, "train_steps", lambda config, state, _, ids: jnp.log(-sharding.lookup(state.params, ids)))
    losses, ids = jnp.array([1.0, jnp.nan]), jnp.zeros((2, 8), jnp.int32)
    with jax.set_mesh(sharding.make_mesh(sharding.Sizes(fsdp=2))):
        state = step.TrainState(jnp.int32(10), jax.device_put(jnp.ones((4, 8)), PartitionSpec("fsdp")), None)
        found = loop.find_nan(tiny, state, (None, ids), step.Metrics(losses, losses, losses, jnp.isfinite(losses)))
    assert found.startswith("step 12: loss nan, gradient norm nan: nan generated by primitive: log")


def test_run_that_overflows_float32_saves_nothing(tiny, change, new_run):
    run, corpus = new_run("one", change(tiny, learning_rate=1e38, warmup_steps=0, schedule="constant"))
    with pytest.raises(DivergedError, match=r"step 6: .* 5 steps in a row"):
        fit(run, corpus)
    assert [event["event"] for event in run.events()][:3] == ["start", "evaluate", "skip"]
    assert Checkpoints(run.checkpoints).steps == []


def test_run_in_use_is_not_changed(tiny, new_run, change):
    run, corpus = new_run("one", tiny)
    with run.lock(), pytest.raises(RunError, match="in use by another process"):
        fit(run, corpus, config=change(run.config, steps=40))
    assert Run(run.path).config == run.config


@pytest.fixture
def long(tiny, change):
    """A run of a few seconds with ten saves."""
    return change(tiny, steps=3000, decay_steps=3000, scan_steps=50, eval_every=300, n_layer=1)


def create_run(tmp_path, name, config):
    corpus = prepare_corpus(config.data.corpus, data_dir=tmp_path / "data").corpus
    return Run.create(tmp_path / "runs", name, resolve(config, corpus), corpus.meta)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_saves_and_prints_the_resume_command(tmp_path, change, long, number, code):
    run = create_run(tmp_path, "one", configs.check(change(long, steps=60_000)))
    process = resume(run)
    wait_for(lambda: (run.checkpoints / "300").is_dir(), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    assert "jaxgpt train --run one --resume" in out
    step = Checkpoints(run.checkpoints).latest
    assert 300 <= step < 60_000
    assert f"interrupted at step {step:,} of 60,000" in out
    assert max(line["step"] for line in run.metrics()) == step


def test_a_second_signal_does_not_wait_for_a_compilation(new_run, tiny, monkeypatch):
    release, compiled = threading.Event(), []

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxgpt.train.jit_train_steps", lambda *_: compiled.append(release.wait(20)))
    monkeypatch.setattr("jaxgpt.train.lower_init", lambda *_: SimpleNamespace(compile=interrupt))
    with pytest.raises(KeyboardInterrupt):
        fit(*new_run("one", tiny))
    assert compiled == []
    release.set()


def test_speed_excludes_the_wait_for_a_slow_save(tiny, new_run, change, monkeypatch):
    clock, settle = itertools.count(1.0), Checkpoints.settle

    def wait_an_hour(checkpoints, wait=True):
        for _ in range(3600 * wait):
            next(clock)
        return settle(checkpoints, wait)

    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(Checkpoints, "settle", wait_an_hour)
    run, corpus = new_run("one", change(tiny, steps=20))
    fit(run, corpus)
    assert next(clock) > 7200
    assert 0 < run.last_event("save")["trained_seconds"] < 3600


def test_samples_are_written_between_chunks_and_not_timed(tiny, new_run, monkeypatch):
    def sample(params):
        for _ in range(3600):
            next(clock)
        return "the cat"

    clock, events = itertools.count(1.0), []
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run, corpus = new_run("one", tiny)
    fit(run, corpus, events.append, sample=sample)
    assert [event.step for event in events if isinstance(event, Sampled)] == [10]
    assert 0 < run.last_event("save")["trained_seconds"] < 3600
