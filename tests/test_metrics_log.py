import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.evaluation import Evaluation
from jaxgpt.metrics_log import DivergedError, MetricsLog, Notice, Progress
from jaxgpt.run import Run
from jaxgpt.step import Metrics
from tests.test_run import META

RESULT = Evaluation(2.0, 0.1, 3.0, 3.0, 100)


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def log_of(run, n_bytes=0, on_event=lambda event: None):
    return MetricsLog(run, n_bytes, lambda step: np.array([step, 7]), on_event)


def chunk(first, n=5):
    x = jnp.arange(first, first + n, dtype=jnp.float32) / 10
    return Metrics(x, x, x, jnp.full(n, True))


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_one_line_in_order(run):
    with log_of(run) as log:
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


def test_a_chunk_is_read_when_the_next_one_is_under_way(run):
    events = []
    with log_of(run, on_event=events.append) as log:
        log.add_evaluation(0, RESULT, {})
        events.clear()
        log.add(0, chunk(1))
        assert events == []
        log.add(5, chunk(6))
        assert [event.step for event in events] == [5]
        log.flush()
        assert [event.step for event in events] == [5, 10]
    assert isinstance(events[0], Progress)
    assert events[0].tokens_per_second is None, "the first chunk is mostly compilation"
    assert events[1].tokens_per_second > 0
    assert events[1].seconds_left > 0
    assert math.isclose(events[1].loss, 1.0, rel_tol=1e-6)


def test_a_resumed_log_goes_on_behind_the_saved_step(run):
    with log_of(run) as log:
        log.add_evaluation(0, RESULT, {})
        log.add(0, chunk(1))
        log.add(5, chunk(6))
        log.flush()
        log.add_evaluation(10, Evaluation(1.0, math.nan, 3.0, 3.0, 100), {})
        log.sync()
        n_bytes = run.metrics_file.stat().st_size
        log.add(10, chunk(11))
        log.flush()
    whole, told = run.metrics_file.read_bytes(), []
    for torn in (whole, whole[:-3]):
        run.metrics_file.write_bytes(torn)
        with log_of(run, n_bytes, told.append) as log:
            assert [scored.step for scored in log.scores] == [0, 10]
            assert math.isnan(log.scores[1].evaluation.standard_error)
            assert log.speed["tokens_per_second"] is None
            assert lines(run)[-1]["step"] == log.step == 10
            log.add(10, chunk(11))
            log.flush()
        assert told.pop().best.step == 10, "the best of before is known"
        assert run.metrics_file.read_bytes() == whole
    with log_of(run) as log:
        assert log.scores == []
    assert run.metrics_file.read_bytes() == b"", "nothing was saved, so nothing is kept"


def test_every_line_is_json_that_any_program_reads(run):
    with log_of(run) as log:
        log.add(0, Metrics(*(jnp.array([jnp.nan, jnp.inf]) for _ in range(3)), jnp.array([False, False])))
        log.sync()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_a_step_that_was_skipped_is_reported_with_its_windows(run):
    events = []
    with log_of(run, on_event=events.append) as log:
        log.add(0, chunk(1)._replace(applied=jnp.array([True, True, False, True, True])))
        log.sync()
    assert [line["step"] for line in lines(run) if line.get("skipped")] == [3]
    assert lines(run)[2]["window_starts"] == [2, 7]
    assert [event.kind for event in events if isinstance(event, Notice)] == ["skip"]
    assert run.events()[0]["event"] == "skip"


def test_the_row_of_skipped_steps_is_counted_across_chunks_and_resumes(run):
    bad = chunk(1)._replace(loss=jnp.full(5, jnp.nan), applied=jnp.array([True, True, False, False, False]))
    with log_of(run) as log:
        log.add(0, bad)
        log.sync()
    n_bytes = run.metrics_file.stat().st_size
    with log_of(run, n_bytes) as log:
        log.add(5, bad._replace(applied=jnp.array([False, True, False, False, False])))
        log.sync()
    n_bytes = run.metrics_file.stat().st_size
    with log_of(run, n_bytes) as log:
        log.add(10, bad._replace(applied=jnp.full(5, False)))
        with pytest.raises(DivergedError, match=r"step 12: loss nan.* 5 steps in a row"):
            log.sync()
    assert lines(run)[-1]["step"] == 12, "its lines are kept for those who want to know"


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(run, monkeypatch):
    with log_of(run) as log:
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
        assert run.metrics_file.exists()
        log.add(5, chunk(6))
        log.sync()
    assert [line["step"] for line in lines(run)] == list(range(1, 11))


def test_a_run_that_is_moved_fails_to_sync_until_it_is_back(run, tmp_path):
    with log_of(run) as log:
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


def test_two_processes_that_write_one_log_save_nothing_more(run):
    """As on two hosts with a network file system without locks: a resume would find neither's lines."""
    with log_of(run) as first:
        first.add(0, chunk(1))
        first.sync()
        with log_of(run) as second:
            second.add(0, chunk(1))
            first.add(5, chunk(6))
            for log in (first, second):
                with pytest.raises(FileExistsError, match="another process has changed it"):
                    log.sync()


def test_all_processes_learn_that_a_sync_failed(run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    failed = []
    monkeypatch.setattr("jaxgpt.processes.any_process", lambda value: failed.append(value) or value)
    with log_of(run) as log, monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.sync()
    assert failed == [True]


def test_numbers_are_the_shortest_that_give_the_float32_back(run):
    x = jnp.float32(1) / 3
    with log_of(run) as log:
        log.add(0, Metrics(*(x[None] for _ in range(3)), jnp.array([True])))
        log.sync()
    assert '"loss": 0.33333334,' in (run.path / "metrics.jsonl").read_text()
    assert jnp.float32(lines(run)[0]["loss"]) == x
