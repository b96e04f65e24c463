import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.sample import SamplingParams, checked, min_p, next_tokens, top_k, top_p

LOGITS = jax.random.normal(jax.random.key(0), (3, 9))


@given(st.integers(1, 8))
def test_top_k_keeps_the_k_largest_logits_unchanged(k):
    kept = np.asarray(top_k(LOGITS, k))
    for row, logits in zip(kept, np.asarray(LOGITS), strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == set(np.argsort(logits)[-k:])
    np.testing.assert_array_equal(kept[np.isfinite(kept)], np.asarray(LOGITS)[np.isfinite(kept)])


@pytest.mark.parametrize("k", [0, 9, 100])
def test_top_k_of_zero_or_at_least_V_keeps_all(k):
    np.testing.assert_array_equal(top_k(LOGITS, k), LOGITS)


def test_top_k_keeps_ties():
    assert np.isfinite(top_k(jnp.array([1.0, 2.0, 2.0]), 1)).tolist() == [False, True, True]


ROWS = st.sampled_from([1, 2, 3, 12]).flatmap(lambda n: st.lists(st.floats(-20, 20, width=32), min_size=n, max_size=n))
THRESHOLDS = st.floats(0.01, 1, exclude_max=True)


def probabilities(logits):
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


@given(ROWS, THRESHOLDS)
def test_top_p_keeps_the_smallest_set_that_reaches_p(row, p):
    kept = np.isfinite(jax.jit(top_p)(np.array([row], np.float32), p))[0]
    q = probabilities(row)
    assert kept.any()
    assert q[kept].min() >= q[~kept].max(initial=0), "the kept tokens are the most likely ones"
    assert q[kept].sum() >= p - 1e-5
    fewer = q[kept & (q > q[kept].min())].sum()
    assert fewer < p + 1e-5, "without the least likely of them, the kept tokens fall short of p"


@given(ROWS, THRESHOLDS)
def test_min_p_compares_with_the_most_likely_token(row, p):
    kept = np.isfinite(jax.jit(min_p)(np.array([row], np.float32), p))[0]
    ratio = probabilities(row) / probabilities(row).max()
    clear = np.abs(ratio - p) > 1e-4 * p
    np.testing.assert_array_equal(kept[clear], ratio[clear] >= p)
    assert kept[np.argmax(row)]


@pytest.mark.parametrize("keep", [top_p, min_p])
def test_filters_neither_change_nor_restore_logits(keep):
    logits = top_k(LOGITS, 5)
    kept = np.asarray(keep(logits, 0.3))
    assert np.isfinite(kept).any(axis=-1).all()
    assert not (np.isfinite(kept) & ~np.isfinite(logits)).any()
    np.testing.assert_array_equal(kept[np.isfinite(kept)], np.asarray(logits)[np.isfinite(kept)])


@pytest.mark.parametrize(("p", "n"), [(0.3, 1), (0.6, 2), (0.75, 3), (0.95, 4)])
def test_top_p_by_hand(p, n):
    assert np.isfinite(top_p(jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])), p)).tolist() == [n >= 4, n >= 1, n >= 3, n >= 2]


def test_top_p_keeps_at_least_one_and_ties():
    assert np.isfinite(top_p(jnp.array([0.0, 3.0, 1.0]), 0.01)).tolist() == [False, True, False]
    assert np.isfinite(top_p(jnp.array([1.0, 3.0, 3.0]), 0.01)).tolist() == [False, True, True]


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"min_p": 0.4}])
def test_filters_see_the_probabilities_at_the_temperature(options):
    """At temperature 1/2 they are 0.78, 0.20 and 0.02."""
    logits = jnp.tile(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), (100, 1))
    drawn = next_tokens(checked(SamplingParams(0.5, **options)), logits, jax.random.split(jax.random.key(0), 100))
    assert set(drawn.tolist()) == {0}


def test_the_most_likely_token_is_no_padded_id():
    keys = jax.random.split(jax.random.key(0), 1)
    assert next_tokens(checked(SamplingParams(0, n_ids=2)), jnp.array([[1.0, 2.0, 3.0]]), keys).tolist() == [1]
