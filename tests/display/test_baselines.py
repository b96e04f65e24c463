import itertools
import math
from collections import Counter

import numpy as np
import pytest

from jaxgpt.display import baselines
from jaxgpt.display.baselines import ngram_losses


def test_ngram_losses_equal_those_counted_by_hand():
    rng = np.random.default_rng(0)
    train, val, V = rng.integers(0, 5, 200), rng.integers(0, 6, 50), 7  # one id never occurs, one only in validation
    single, pairs = Counter(train.tolist()), Counter(itertools.pairwise(train.tolist()))
    before = Counter(train[:-1].tolist())

    def p(b):
        return (single[b] + 1) / (200 + V)

    found, val = ngram_losses(train.astype(np.uint16), val.astype(np.uint16), V), val.tolist()
    assert found["uniform"] == math.log(V)
    assert found["unigram counts"] == pytest.approx(-np.mean([math.log(p(b)) for b in val[1:]]))
    by_hand = [(pairs[a, b] + p(b)) / (before[a] + 1) for a, b in itertools.pairwise(val)]
    assert found["bigram counts"] == pytest.approx(-np.mean(np.log(by_hand)))
    assert sum((pairs[0, b] + p(b)) / (before[0] + 1) for b in range(V)) == pytest.approx(1)


def test_a_large_split_is_counted_in_stretches_from_end_to_end(monkeypatch):
    """The corpora of a mixture are concatenated, so the first tokens would come from only one of them."""
    monkeypatch.setattr(baselines, "COUNTED", 128)
    rng = np.random.default_rng(0)
    halves = [np.concatenate([rng.integers(0, 2, n), rng.integers(2, 4, n)]) for n in (4000, 500)]
    found = ngram_losses(*halves, 4)
    assert found["unigram counts"] == pytest.approx(math.log(4), abs=0.1)
    assert found["bigram counts"] == pytest.approx(math.log(2), abs=0.1)
    parts = baselines.stretches(np.arange(1000))
    assert (parts[0][0], parts[-1][-1], {len(part) for part in parts}) == (0, 999, {2})
    assert [part.tolist() for part in baselines.stretches(np.arange(128))] == [list(range(128))]
