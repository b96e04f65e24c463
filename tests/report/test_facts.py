import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.report import facts
from jaxgpt.report.limits import limits, published
from jaxgpt.training.run import Run
from tests.training.test_run import META

LINE = {"grad_norm": 1.0, "learning_rate": 0.1}


def scored(step, loss, error=0.01):
    names = {"bits_per_char": loss, "bits_per_byte": loss, "n_tokens": 9, "loss": loss, "standard_error": error}
    return {"step": step, **{f"val_{name}": value for name, value in names.items()}}


@pytest.fixture
def run(tmp_path, tiny):
    return Run.create(tmp_path, "one", tiny, META)


def written(run, *lines, events=()):
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for event in events:
        run.event(**event)
    return facts.gather(run)


def test_a_run_that_has_just_been_made_has_nothing_to_show(run):
    found = facts.gather(run)
    assert (found.step, found.best, found.loss, found.running, found.seconds) == (0, None, [], True, None)


def test_what_a_run_says_of_itself(run):
    found = written(
        run,
        scored(0, 3.0),
        {"step": 1, "loss": 2.5, **LINE},
        {"step": 2, "loss": None, **LINE, "skipped": True},
        scored(2, 2.0),
        events=[
            {"name": "start", "step": 0, "device": "NVIDIA H100 80GB HBM3", "devices": 2},
            {"name": "save", "step": 10, "tokens_per_second": 1e6},
            {"name": "end", "step": 20, "seconds": 2.0},
            {"name": "start", "step": 20, "device": "NVIDIA H100 80GB HBM3", "devices": 2},
            {"name": "end", "step": 20, "seconds": 1.5},
        ],
    )
    assert (found.step, found.best.loss, found.loss, found.running, found.seconds) == (2, 2.0, [(1, 2.5)], False, 3.5)
    assert found.recipe in found.command
    assert ("n_embd", 128, 16) in found.changes
    flops = 2 * 16 * (12 * 16) + 4 * 8 * 16 + 2 * 13 * 16  # of a block's kernels, its attention, and the head
    assert found.utilisation == pytest.approx(3 * flops * 1e6 / (2 * 989e12))


@pytest.mark.parametrize(
    ("losses", "where"),
    [([3, 2, 1], None), ([3, 1, 2], 1), ([3, 1, 1.005], None), ([3], None), ([2, 2.5, 3], 0)],
)
def test_it_overfits_where_the_last_score_is_worse_by_more_than_its_error(run, losses, where):
    found = written(run, *(scored(step, loss) for step, loss in enumerate(losses)))
    assert found.overfits_from == where


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


def test_speed_between_saves_is_told_apart_from_the_mean(tiny):
    """2 s for each of the first steps and 1 s for each later one, the first chunk (5 steps) left out."""
    per_step = 4 * 8
    said = [(10, 5, 10.0), (15, 10, 15.0), (20, 15, 20.0)]  # step, steps counted, seconds
    events = [{"event": "save", "step": step, "tokens_per_second": n * per_step / s} for step, n, s in said]
    found = facts.speeds(tiny, [{"event": "start", "step": 0}, *events])
    assert [step for step, _ in found] == [10, 15, 20]
    np.testing.assert_allclose([speed for _, speed in found], [per_step / 2, per_step, per_step])
    again = [{"event": "start", "step": 20}, {"event": "save", "step": 30, "tokens_per_second": 64.0}]
    assert facts.speeds(tiny, [{"event": "start", "step": 0}, *events, *again])[-1] == (30, 64.0)


def test_the_limits_are_what_counting_by_hand_gives():
    rng = np.random.default_rng(0)
    train, val, V = rng.integers(0, 5, 200), rng.integers(0, 6, 50), 7  # one id is never seen, one only in validation
    single, pairs = Counter(train.tolist()), Counter(itertools.pairwise(train.tolist()))
    before = Counter(train[:-1].tolist())

    def p(b):
        return (single[b] + 1) / (200 + V)

    found, val = limits(train.astype(np.uint16), val.astype(np.uint16), V), val.tolist()
    assert found.uniform == math.log(V)
    assert found.unigram == pytest.approx(-np.mean([math.log(p(b)) for b in val[1:]]))
    by_hand = [(pairs[a, b] + p(b)) / (before[a] + 1) for a, b in itertools.pairwise(val)]
    assert found.bigram == pytest.approx(-np.mean(np.log(by_hand)))
    assert sum((pairs[0, b] + p(b)) / (before[0] + 1) for b in range(V)) == pytest.approx(1)


def test_figures_are_told_of_the_corpus_that_they_are_of():
    meta = {"source": "shakespeare", "tokenizer": {"kind": "char"}}
    assert len(published(meta)) == 2
    assert published(meta | {"source": "verse"}) == ()
