"""The laws of a run: equal runs are equal, ended and resumed ones too, and looking changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxgpt import config as configs
from jaxgpt.text import corpus as corpora
from jaxgpt.training import loop
from jaxgpt.training.checkpoint import Checkpoints, abstract
from jaxgpt.training.interrupt import interruption
from jaxgpt.training.journal import DivergedError, Evaluated, Progress
from jaxgpt.training.loop import fit
from jaxgpt.training.run import Run, RunError
from jaxgpt.training.start import resolve, start
from jaxgpt.training.step import init_state


@pytest.fixture
def tiny(tiny, change, verse):
    return change(tiny, corpus=str(verse), vocab_size=0, scan_steps=5, eval_every=10)


@pytest.fixture
def new_run(tmp_path):
    def make(name, config):
        return start(config, name, tmp_path / "runs", tmp_path / "data")

    return make


def last_state(run):
    with Checkpoints(run.checkpoints) as checkpoints:
        return checkpoints.restore(checkpoints.latest, abstract(jax.eval_shape(init_state, run.config)))


def assert_same_run(a, b):
    assert (a.path / "metrics.jsonl").read_bytes() == (b.path / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, last_state(a), last_state(b))


class Stop(Exception):
    pass


def stop_after(step):
    def watch(event):
        if isinstance(event, Progress) and event.step >= step:
            raise Stop

    return watch


@pytest.mark.smoke
def test_fit_tells_its_story(tiny, new_run):
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
    kinds = [json.loads(line)["event"] for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "save", "save", "end"]


def test_two_runs_of_one_config_are_equal(tiny, new_run):
    a, b = (fit(*new_run(name, tiny)).run for name in ("a", "b"))
    assert_same_run(a, b)


def test_looking_more_often_changes_nothing_that_is_learnt(tiny, change, new_run):
    often = fit(*new_run("often", change(tiny, eval_every=5, eval_batches=7))).run
    never = fit(*new_run("never", change(tiny, eval_every=0, eval_batches=0))).run
    steps = [[line for line in run.metrics() if "loss" in line] for run in (often, never)]
    assert steps[0] == steps[1]
    jax.tree.map(np.testing.assert_array_equal, last_state(often).params, last_state(never).params)


@pytest.mark.parametrize("step", [5, 10, 15])
def test_a_run_that_died_goes_on_as_if_it_had_not(tiny, new_run, step):
    unbroken = fit(*new_run("unbroken", tiny)).run
    broken, corpus = new_run("broken", tiny)
    with pytest.raises(Stop):
        fit(broken, corpus, stop_after(step))
    fit(broken, corpus)
    assert_same_run(unbroken, broken)


def test_lines_are_on_disk_before_the_save_that_follows_them(tiny, new_run, monkeypatch):
    run, corpus = new_run("one", tiny)
    save, seen = Checkpoints.save, []

    def look_then_save(checkpoints, state, val_loss):
        seen.append((int(state.step), run.metrics()[-1]["step"]))
        save(checkpoints, state, val_loss)

    monkeypatch.setattr(Checkpoints, "save", look_then_save)
    fit(run, corpus)
    assert seen == [(10, 10), (20, 20)]


def test_a_finished_run_has_nothing_left_to_do(tiny, new_run):
    run, corpus = new_run("one", tiny)
    first = fit(run, corpus)
    before = (run.path / "metrics.jsonl").read_bytes()
    again = fit(run, corpus)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    assert again.scores == first.scores


def test_a_corpus_on_disk_gives_the_same_run_as_one_on_the_device(tiny, new_run, monkeypatch):
    on_device = fit(*new_run("device", tiny)).run
    monkeypatch.setattr(loop, "DEVICE_TOKENS", 0)
    on_disk = fit(*new_run("disk", tiny)).run
    assert_same_run(on_device, on_disk)


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [(0, 12, [(0, 5), (5, 10), (10, 12)]), (5, 10, [(5, 10)]), (12, 16, [(12, 15), (15, 16)]), (9, 9, [])],
)
def test_chunks_end_at_multiples_of_scan_steps(tiny, change, step, steps, expected):
    assert list(loop.chunks(change(tiny, steps=steps), step)) == expected


def test_a_signal_in_the_last_chunk_finds_the_run_done(tiny, new_run):
    run, corpus = new_run("one", tiny)

    def late(event):
        if isinstance(event, Progress) and event.step == 15:  # told when the last chunk is under way
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = fit(run, corpus, late)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.step, done.interrupted_by) == (20, 0)


def test_an_interrupted_run_whose_end_is_moved_to_where_it_stands_is_scored_there(tiny, new_run, change):
    run, corpus = new_run("one", change(tiny, steps=40, eval_every=20))

    def early(event):
        if isinstance(event, Progress) and event.step == 5:  # told when the chunk to 10 is under way
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = fit(run, corpus, early)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.step, done.interrupted_by) == (10, signal.SIGTERM)
    again = fit(run, corpus, config=change(run.config, steps=10))
    assert [scored.step for scored in again.scores] == [0, 10]


def test_a_run_that_diverges_keeps_its_good_checkpoint(tiny, new_run, change, monkeypatch):
    run, corpus = new_run("one", tiny)
    train_steps = loop.train_steps

    def poisoned(config, state, tokens, starts):
        state, metrics = train_steps(config, state, tokens, starts)
        return state, metrics if int(state.step) <= 10 else metrics._replace(loss=metrics.loss * float("nan"))

    monkeypatch.setattr(loop, "train_steps", poisoned)
    with pytest.raises(DivergedError, match="step 11: loss nan"):
        fit(run, corpus)
    with Checkpoints(run.checkpoints) as checkpoints:
        assert checkpoints.steps == [10]


def test_a_run_in_use_is_left_as_it_is(tiny, new_run, change):
    run, corpus = new_run("one", tiny)
    with run.exclusive(), pytest.raises(RunError, match="in use by process"):
        fit(run, corpus, config=change(run.config, steps=40))
    assert Run(run.path).config == run.config


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_is_noted_and_a_second_one_acts(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append("second"))
    try:
        with interruption() as interrupted_by:
            assert interrupted_by() == 0
            os.kill(os.getpid(), number)
            assert interrupted_by() == number
            assert heard == []
            os.kill(os.getpid(), number)
            assert heard == ["second"]
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)


def test_in_another_thread_nothing_is_noted():
    import threading

    told = []

    def ask():
        with interruption() as interrupted_by:
            told.append(interrupted_by())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert told == [0]


# With processes that really end.


def command(tmp_path, *args):
    return [sys.executable, "-m", "jaxgpt", "train", *map(str, args)]


@pytest.fixture
def long(tiny, change):
    """A run of a few seconds, with a save every tenth of it."""
    return change(tiny, steps=3000, scan_steps=50, eval_every=300, n_layer=1)


def write_recipe_run(tmp_path, name, config):
    corpus = corpora.prepare(config.data.corpus, data_dir=tmp_path / "data").corpus
    return Run.create(tmp_path / "runs", name, resolve(config, corpus), corpus.meta)


def resume(tmp_path, name, **kwargs):
    return subprocess.Popen(
        command(tmp_path, "--run", name, "--resume"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def wait_for(condition, process, seconds=120):
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, f"it ended early:\n{process.stdout.read()}"
        assert time.monotonic() - began < seconds, "nothing happened"
        time.sleep(0.01)


def test_killed_and_resumed_processes_give_the_bits_of_an_unbroken_one(tmp_path, long):
    unbroken = write_recipe_run(tmp_path, "unbroken", long)
    out, _ = resume(tmp_path, "unbroken").communicate(timeout=300)
    assert "step 3,000" in out, out
    broken = write_recipe_run(tmp_path, "broken", long)
    kills = 0
    for target in (300, 1200, 2100):
        process = resume(tmp_path, "broken")
        wait_for(lambda target=target: (broken.checkpoints / str(target)).is_dir(), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert len(broken.metrics()) < len(unbroken.metrics())
    out, _ = resume(tmp_path, "broken").communicate(timeout=300)
    assert "step 3,000" in out, out
    assert_same_run(unbroken, broken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_says_how_to_go_on(tmp_path, long, number, code):
    run = write_recipe_run(tmp_path, "one", configs.check(long))
    process = resume(tmp_path, "one")
    wait_for(lambda: (run.checkpoints / "300").is_dir(), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "jaxgpt train --run one --resume" in out
    with Checkpoints(run.checkpoints) as checkpoints:
        step = checkpoints.latest
    assert 300 <= step < 3000
    assert f"interrupted at step {step:,} of 3,000" in out
    assert max(line["step"] for line in run.metrics()) == step
