import json
import math

import jax.numpy as jnp
import pytest

from jaxgpt.training.evaluate import Evaluation
from jaxgpt.training.journal import DivergedError, Evaluated, Journal, Progress
from jaxgpt.training.run import Run, RunError
from jaxgpt.training.step import Metrics
from tests.training.test_run import META

RESULT = Evaluation(2.0, 0.1, 3.0, 3.0, 100)


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def chunk(first, n=5):
    x = jnp.arange(first, first + n, dtype=jnp.float32) / 10
    return Metrics(x, x, x)


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_one_line_in_order(run):
    with Journal(run, 0, lambda event: None) as journal:
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
    with Journal(run, 0, events.append) as journal:
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
    with Journal(run, 0, lambda event: None) as journal:
        journal.evaluated(0, RESULT, {})
        journal.trained(0, chunk(1))
        journal.trained(5, chunk(6))
        journal.flush()
        journal.evaluated(10, Evaluation(1.0, math.nan, 3.0, 3.0, 100), {})
    whole = (run.path / "metrics.jsonl").read_bytes()
    for torn in (whole, whole[:-3]):
        (run.path / "metrics.jsonl").write_bytes(torn)
        with Journal(run, 5, lambda event: None) as journal:
            assert journal.scores == [Evaluated(0, RESULT)]
            assert journal.tokens_per_second is None
        assert [line["step"] for line in lines(run)] == [0, 1, 2, 3, 4, 5]
    (run.path / "metrics.jsonl").write_bytes(whole)
    with Journal(run, 10, lambda event: None) as journal:
        assert [scored.step for scored in journal.scores] == [0, 10]
        assert math.isnan(journal.scores[1].evaluation.standard_error)
    assert (run.path / "metrics.jsonl").read_bytes() == whole


def test_every_line_is_json_that_any_program_reads(run):
    with Journal(run, 0, lambda event: None) as journal:
        journal.trained(0, Metrics(*(jnp.array([jnp.nan, jnp.inf]) for _ in range(3))))
        with pytest.raises(DivergedError):
            journal.sync()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None


@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_what_is_no_number_ends_the_run_before_it_is_saved(run, which):
    bad = chunk(1)._replace(**{which: jnp.array([0.1, 0.2, jnp.nan, 0.4, 0.5])})
    with Journal(run, 0, lambda event: None) as journal:
        journal.trained(0, bad)
        with pytest.raises(DivergedError, match=r"step 3: .*nan"):
            journal.sync()
    assert len(lines(run)) == 5, "its lines are kept for those who want to know"


def test_lines_that_do_not_reach_the_saved_step_are_refused(run):
    with Journal(run, 0, lambda event: None) as journal:
        journal.trained(0, chunk(1))
        journal.sync()
    with pytest.raises(RunError, match="ends at step 5, but step 10 is saved"):
        Journal(run, 10, lambda event: None)
    run.metrics_file.unlink()
    with pytest.raises(RunError, match="ends at step 0, but step 5 is saved"):
        Journal(run, 5, lambda event: None)
    assert not run.metrics_file.exists()


def test_a_damaged_line_is_named(run):
    run.metrics_file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is no line of metrics: 'nonsense'"):
        Journal(run, 2, lambda event: None)


def test_numbers_are_the_shortest_that_give_the_float32_back(run):
    x = jnp.float32(1) / 3
    with Journal(run, 0, lambda event: None) as journal:
        journal.trained(0, Metrics(*(x[None] for _ in range(3))))
        journal.sync()
    assert '"loss": 0.33333334,' in (run.path / "metrics.jsonl").read_text()
    assert jnp.float32(lines(run)[0]["loss"]) == x
