import dataclasses
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import DivergedError, Evaluated, MetricsLog, Notice, Progress
from jaxgpt.run import Run
from jaxgpt.start import digest
from jaxgpt.step import Metrics
from tests.test_run import META

RESULT = Evaluation(2.0, 0.1, 3.0, 3.0, 100)


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def open_log(run, n_bytes=0, on_event=lambda event: None):
    return MetricsLog(run, n_bytes, lambda step: np.array([step, 7]), on_event)


def chunk(first, n=5):
    x = jnp.arange(first, first + n, dtype=jnp.float32) / 10
    return Metrics(x, x, x, jnp.full(n, True))


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_one_line_in_order(run):
    with open_log(run) as log:
        log.add_evaluation(0, RESULT, {"val_estimate": 2.1})
        log.add(0, chunk(1))
        log.add(5, chunk(6))
        log.flush()
        log.add_evaluation(10, RESULT, {})
        log.sync()
        assert [line["step"] for line in lines(run)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    assert lines(run)[3] == {"step": 3, "loss": 0.3, "grad_norm": 0.3, "learning_rate": 0.3}
    assert lines(run)[0]["val_loss"] == 2.0
    assert lines(run)[0]["val_estimate"] == 2.1


def test_chunk_is_read_after_the_next_one_is_dispatched(run):
    events = []
    with open_log(run, on_event=events.append) as log:
        log.add_evaluation(0, RESULT, {})
        events.clear()
        log.add(0, chunk(1))
        assert events == []
        log.add(5, chunk(6))
        assert [event.step for event in events] == [5]
        log.flush()
        assert [event.step for event in events] == [5, 10]
    assert isinstance(events[0], Progress)
    assert events[0].tokens_per_second is None, "no speed yet: the first chunk is mostly compilation"
    assert events[1].tokens_per_second > 0
    assert events[1].seconds_left > 0
    assert math.isclose(events[1].loss, 1.0, rel_tol=1e-6)


def test_resumed_log_continues_after_the_saved_step(run):
    with open_log(run) as log:
        log.add_evaluation(0, RESULT, {})
        log.add(0, chunk(1))
        log.add(5, chunk(6))
        log.flush()
        log.add_evaluation(10, Evaluation(1.0, math.nan, 3.0, 3.0, 100), {})
        log.sync()
        n_bytes = run.metrics_file.stat().st_size
        log.add(10, chunk(11))
        log.flush()
    complete, events = run.metrics_file.read_bytes(), []
    for torn in (complete, complete[:-3]):
        run.metrics_file.write_bytes(torn)
        with open_log(run, n_bytes, events.append) as log:
            assert [scored.step for scored in log.scores] == [0, 10]
            assert math.isnan(log.scores[1].evaluation.standard_error)
            assert log.speed["tokens_per_second"] is None
            assert lines(run)[-1]["step"] == log.step == 10
            log.add(10, chunk(11))
            log.flush()
        assert events.pop().best.step == 10, "the best score from before the resume is known"
        assert run.metrics_file.read_bytes() == complete
    with open_log(run) as log:
        assert log.scores == []
    assert run.metrics_file.read_bytes() == b"", "without a checkpoint, no line is kept"


def test_non_finite_values_are_written_as_strict_json(run):
    with open_log(run) as log:
        log.add(0, Metrics(*(jnp.array([jnp.nan, jnp.inf]) for _ in range(3)), jnp.array([False, False])))
        log.sync()

    def reject_constant(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=reject_constant)["loss"] is None


def test_skipped_step_is_reported_with_its_windows(run):
    events = []
    with open_log(run, on_event=events.append) as log:
        log.add(0, chunk(1)._replace(applied=jnp.array([True, True, False, True, True])))
        log.sync()
    assert [line["step"] for line in lines(run) if line.get("skipped")] == [3]
    assert lines(run)[2]["window_starts"] == [2, 7]
    assert [event.kind for event in events if isinstance(event, Notice)] == ["skip"]
    assert run.events()[0]["event"] == "skip"


def test_consecutive_skips_are_counted_across_chunks_and_resumes(run):
    bad = chunk(1)._replace(loss=jnp.full(5, jnp.nan), applied=jnp.array([True, True, False, False, False]))
    with open_log(run) as log:
        log.add(0, bad)
        log.sync()
    n_bytes = run.metrics_file.stat().st_size
    with open_log(run, n_bytes) as log:
        log.add(5, bad._replace(applied=jnp.array([False, True, False, False, False])))
        log.sync()
    n_bytes = run.metrics_file.stat().st_size
    with open_log(run, n_bytes) as log:
        log.add(10, bad._replace(applied=jnp.full(5, False)))
        with pytest.raises(DivergedError, match=r"step 12: loss nan.* 5 steps in a row"):
            log.sync()
    assert lines(run)[-1]["step"] == 12, "the lines of a diverged run are kept"


def test_lines_that_a_full_disk_refuses_are_written_later(run, monkeypatch):
    with open_log(run) as log:
        real, room = log._file, [20]

        class Full:
            def write(self, data):
                if not room[0]:
                    raise OSError(28, "No space left on device")
                taken = real.write(data[: room[0]])
                room[0] -= taken
                return taken

        with monkeypatch.context() as patch:
            patch.setattr(log, "_file", Full())
            log.add(0, chunk(1))
            log.flush()
            with pytest.raises(OSError, match="No space"):
                log.sync()
        assert len(run.metrics_file.read_bytes()) == 20
        log.add(5, chunk(6))
        log.sync()
    assert [line["step"] for line in lines(run)] == list(range(1, 11))


def test_sync_fails_while_a_run_is_moved(run, tmp_path):
    with open_log(run) as log:
        for path in (run.path, run.metrics_file):
            log.add(log.step, chunk(log.step + 1))
            log.flush()
            moved = path.rename(tmp_path / "moved")
            with pytest.raises(FileNotFoundError, match="it was moved or deleted"):
                log.sync()
            moved.rename(path)
            log.sync()
        run.metrics_file.rename(tmp_path / "old")
        run.metrics_file.write_bytes((tmp_path / "old").read_bytes())
        with pytest.raises(FileExistsError, match="another process has changed it"):
            log.sync()
    assert [line["step"] for line in lines(run)] == list(range(1, 11))


def test_sync_fails_with_a_second_writer(run):
    """As on two hosts with a network file system without locks, where a resume would find the lines of neither."""
    with open_log(run) as first:
        first.add(0, chunk(1))
        first.sync()
        with open_log(run) as second:
            second.add(0, chunk(1))
            first.add(5, chunk(6))
            for log in (first, second):
                with pytest.raises(FileExistsError, match="another process has changed it"):
                    log.sync()


def test_failed_sync_is_shared_with_all_processes(run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    failed = []
    monkeypatch.setattr("jaxgpt.processes.any_process", lambda value: failed.append(value) or value)
    with open_log(run) as log, monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.sync()
    assert failed == [True]


def test_numbers_are_the_shortest_that_round_trip_float32(run):
    x = jnp.float32(1) / 3
    with open_log(run) as log:
        log.add(0, Metrics(*(x[None] for _ in range(3)), jnp.array([True])))
        log.sync()
    assert '"loss": 0.33333334,' in (run.path / "metrics.jsonl").read_text()
    assert jnp.float32(lines(run)[0]["loss"]) == x


def test_digest_is_that_of_the_file_after_a_resume_and_after_a_full_disk(run, monkeypatch):
    with open_log(run) as log:
        log.add(0, chunk(1))
        log.sync()
    with open_log(run, n_bytes := log.digest["bytes"]) as log:
        real = log._file
        with monkeypatch.context() as patch:
            patch.setattr(log, "_file", SimpleNamespace(write=lambda data: real.write(data[:20])))
            log.add(5, chunk(6))
            log.flush()
        assert n_bytes < log.digest["bytes"]
        assert log.digest == digest(run.metrics_file.read_bytes())


def test_entry_of_a_new_log_is_synced(run, monkeypatch):
    synced = []
    monkeypatch.setattr("jaxgpt.files.sync", synced.append)
    with open_log(run):
        assert synced == [run.path]


def test_nan_ranks_last():
    losses = (math.nan, 3.0, 2.0)
    scores = [Evaluated(step, dataclasses.replace(RESULT, loss=loss)) for step, loss in enumerate(losses)]
    assert [scored.step for scored in sorted(scores, key=lambda scored: scored.rank)] == [2, 1, 0]


def test_speed_excludes_the_first_chunk_and_evaluations(run, monkeypatch):
    events, now = [], [0.0]
    monkeypatch.setattr("jaxgpt.metrics_log.time", SimpleNamespace(perf_counter=lambda: now[0]))
    with open_log(run, on_event=events.append) as log:
        for begin, seconds in (0, 9.0), (5, 1.0), (10, 2.0), (15, 4.0):
            log.add(begin, chunk(begin + 1))
            now[0] += seconds
            log.flush()
            if begin == 5:
                now[0] += 100
                log.add_evaluation(10, RESULT, {})
        assert log.speed == {"tokens_per_second": 480 / 7, "trained_tokens": 480, "trained_seconds": 7.0}
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.tokens_per_second for event in progress] == [None, 160.0, 80.0, 40.0]
    assert [event.seconds_left for event in progress] == [None, 2.0, 2.0, 0.0]
