import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.sampling import filters

LOGITS = jax.random.normal(jax.random.key(0), (3, 9))


@given(st.integers(1, 8))
def test_top_k_keeps_the_k_largest_and_their_proportions(k):
    kept = np.asarray(filters.top_k(LOGITS, k))
    for row, logits in zip(kept, np.asarray(LOGITS), strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == set(np.argsort(logits)[-k:])
    np.testing.assert_array_equal(kept[np.isfinite(kept)], np.asarray(LOGITS)[np.isfinite(kept)])


@pytest.mark.parametrize("k", [0, 9, 100])
def test_top_k_of_none_or_all_keeps_all(k):
    np.testing.assert_array_equal(filters.top_k(LOGITS, k), LOGITS)


def test_top_k_keeps_ties():
    assert np.isfinite(filters.top_k(jnp.array([1.0, 2.0, 2.0]), 1)).tolist() == [False, True, True]


def test_temperature_sharpens_below_one():
    entropy = [
        -(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum()
        for x in (filters.temperature(LOGITS, t) for t in (0.5, 1, 2))
    ]
    assert entropy[0] < entropy[1] < entropy[2]
