import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import journal as journals
from jaxgpt.evaluation import Evaluation
from jaxgpt.journal import DivergedError, Notice, Progress
from jaxgpt.run import Run
from jaxgpt.step import Metrics
from tests.test_run import META

RESULT = Evaluation(2.0, 0.1, 3.0, 3.0, 100)


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def Journal(run, n_bytes=0, watch=lambda event: None):
    return journals.Journal(run, n_bytes, lambda step: np.array([step, 7]), watch)


def chunk(first, n=5):
    x = jnp.arange(first, first + n, dtype=jnp.float32) / 10
    return Metrics(x, x, x, jnp.full(n, True))


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_one_line_in_order(run):
    with Journal(run) as journal:
        journal.evaluated(0, RESULT, {"val_estimate": 2.1})
        journal.trained(0, chunk(1))
        journal.trained(5, chunk(6))
        journal.flush()
        journal.evaluated(10, RESULT, {})
        journal.sync()
        assert [line["step"] for line in lines(run)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10]
    assert lines(run)[3] == {"step": 3, "loss": 0.3, "grad_norm": 0.3, "learning_rate": 0.3}
    assert lines(run)[0]["val_loss"] == 2.0
    assert lines(run)[0]["val_estimate"] == 2.1


def test_a_chunk_is_read_when_the_next_one_is_under_way(run):
    events = []
    with Journal(run, watch=events.append) as journal:
        journal.evaluated(0, RESULT, {})
        events.clear()
        journal.trained(0, chunk(1))
        assert events == []
        journal.trained(5, chunk(6))
        assert [event.step for event in events] == [5]
        journal.flush()
        assert [event.step for event in events] == [5, 10]
    assert isinstance(events[0], Progress)
    assert events[0].tokens_per_second is None, "the first chunk is mostly compilation"
    assert events[1].tokens_per_second > 0
    assert events[1].seconds_left > 0
    assert math.isclose(events[1].loss, 1.0, rel_tol=1e-6)


def test_a_resumed_journal_goes_on_behind_the_saved_step(run):
    with Journal(run) as journal:
        journal.evaluated(0, RESULT, {})
        journal.trained(0, chunk(1))
        journal.trained(5, chunk(6))
        journal.flush()
        journal.evaluated(10, Evaluation(1.0, math.nan, 3.0, 3.0, 100), {})
        position = journal.position
        journal.trained(10, chunk(11))
        journal.flush()
    whole, told = run.metrics_file.read_bytes(), []
    for torn in (whole, whole[:-3]):
        run.metrics_file.write_bytes(torn)
        with Journal(run, position[0], told.append) as journal:
            assert journal.position == position
            assert [scored.step for scored in journal.scores] == [0, 10]
            assert math.isnan(journal.scores[1].evaluation.standard_error)
            assert journal.tokens_per_second is None
            assert lines(run)[-1]["step"] == journal.step == 10
            journal.trained(10, chunk(11))
            journal.flush()
        assert told.pop().best.step == 10, "the best of before is known"
        assert run.metrics_file.read_bytes() == whole
    with Journal(run) as journal:
        assert journal.scores == []
    assert run.metrics_file.read_bytes() == b"", "nothing was saved, so nothing is kept"


def test_every_line_is_json_that_any_program_reads(run):
    with Journal(run) as journal:
        journal.trained(0, Metrics(*(jnp.array([jnp.nan, jnp.inf]) for _ in range(3)), jnp.array([False, False])))
        journal.sync()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_a_step_that_was_left_out_is_told_with_its_windows(run):
    events = []
    with Journal(run, watch=events.append) as journal:
        journal.trained(0, chunk(1)._replace(applied=jnp.array([True, True, False, True, True])))
        journal.sync()
    assert [line["step"] for line in lines(run) if line.get("skipped")] == [3]
    assert lines(run)[2]["window_starts"] == [2, 7]
    assert [event.kind for event in events if isinstance(event, Notice)] == ["skip"]
    assert run.events()[0]["event"] == "skip"


def test_the_row_of_steps_left_out_is_counted_across_chunks_and_resumes(run):
    bad = chunk(1)._replace(loss=jnp.full(5, jnp.nan), applied=jnp.array([True, True, False, False, False]))
    with Journal(run) as journal:
        journal.trained(0, bad)
        journal.sync()
        n_bytes, _ = journal.position
    with Journal(run, n_bytes) as journal:
        journal.trained(5, bad._replace(applied=jnp.array([False, True, False, False, False])))
        journal.sync()
        n_bytes, _ = journal.position
    with Journal(run, n_bytes) as journal:
        journal.trained(10, bad._replace(applied=jnp.full(5, False)))
        with pytest.raises(DivergedError, match=r"step 12: loss nan.* 5 steps in a row"):
            journal.sync()
    assert lines(run)[-1]["step"] == 12, "its lines are kept for those who want to know"


def test_a_loss_that_leaps_is_told_once(run):
    events, quiet = [], jnp.full(60, 2.0) + jnp.arange(60) % 3 / 100
    losses = jnp.concatenate([quiet, jnp.array([9.0, 9.5]), quiet[:3]])
    with Journal(run, watch=events.append) as journal:
        journal.trained(0, Metrics(losses, losses, losses, losses > 0))
        journal.flush()
    (notice,) = (event for event in events if isinstance(event, Notice))
    assert (notice.kind, notice.step) == ("spike", 61)
    assert "the loss before was about 2.01" in notice.text


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(run, monkeypatch):
    with Journal(run) as journal:
        real, room = journal._file, [20]

        class Full:
            def write(self, data):
                if not room[0]:
                    raise OSError(28, "No space left on device")
                taken = real.write(data[: room[0]])
                room[0] -= taken
                return taken

        with monkeypatch.context() as patch:
            patch.setattr(journal, "_file", Full())
            journal.trained(0, chunk(1))
            journal.flush()
            with pytest.raises(OSError, match="No space"):
                journal.sync()
        assert len(run.metrics_file.read_bytes()) == 20
        assert run.metrics_file.exists()
        journal.trained(5, chunk(6))
        journal.sync()
        assert journal.position[0] == run.metrics_file.stat().st_size
    assert [line["step"] for line in lines(run)] == list(range(1, 11))


def test_numbers_are_the_shortest_that_give_the_float32_back(run):
    x = jnp.float32(1) / 3
    with Journal(run) as journal:
        journal.trained(0, Metrics(*(x[None] for _ in range(3)), jnp.array([True])))
        journal.sync()
    assert '"loss": 0.33333334,' in (run.path / "metrics.jsonl").read_text()
    assert jnp.float32(lines(run)[0]["loss"]) == x
