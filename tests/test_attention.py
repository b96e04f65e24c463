"""The lecture notes' attention: weights, mask, scale and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxgpt.attention import attention, attention_weights, causal_mask, rotate


def qkv(T=6, S=6, D=4):
    keys = jax.random.split(jax.random.key(0), 3)
    return (jax.random.normal(key, (2, n, D)) for key, n in zip(keys, (T, S, S), strict=True))


@pytest.mark.smoke
def test_causal_weights_are_lower_triangular_with_rows_that_sum_to_one():
    q, k, _ = qkv()
    weights = attention_weights(q, k, causal_mask(6)[None])
    np.testing.assert_allclose(weights.sum(-1), np.ones((2, 6)), rtol=1e-6)
    np.testing.assert_array_equal(np.triu(weights, 1), np.zeros((2, 6, 6)))
    assert (np.asarray(weights)[:, *np.tril_indices(6)] > 0).all()


def test_attention_equals_a_loop_over_tokens():
    """Token t averages the values of the tokens that it attends to, weighted by exp(q . k / sqrt(D))."""
    q, k, v = (np.asarray(x) for x in qkv())
    mask = np.asarray(causal_mask(6))
    expected = np.zeros_like(v)
    for b, t in np.ndindex(2, 6):
        sources = np.flatnonzero(mask[t])
        weights = np.exp([q[b, t] @ k[b, s] / 2.0 for s in sources])
        expected[b, t] = sum(w * v[b, s] for w, s in zip(weights / weights.sum(), sources, strict=True))
    np.testing.assert_allclose(attention(q, k, v, mask[None]), expected, rtol=1e-5, atol=1e-6)


@given(hnp.arrays(bool, st.tuples(st.just(5), st.just(7))).filter(lambda mask: mask.any(axis=1).all()))
def test_output_depends_on_exactly_the_unmasked_values(mask):
    """out[t] depends on v[s] if and only if mask[t, s]: attention aggregates over the edges of a directed graph."""
    q, k, v = qkv(T=5, S=7)
    jacobian = jax.jacobian(lambda v: attention(q[0], k[0], v, mask))(v[0])  # (T, D, S, D)
    np.testing.assert_array_equal(np.abs(np.asarray(jacobian)).sum(axis=(1, 3)) > 0, mask)


def test_scale_defaults_to_inverse_square_root_of_head_size():
    q, k, v = qkv()
    np.testing.assert_allclose(attention(q, k, v), attention(q * 0.5, k, v, scale=1.0), rtol=1e-5)


def test_drop_is_applied_to_the_weights():
    q, k, v = qkv()
    np.testing.assert_array_equal(attention(q, k, v, drop=jnp.zeros_like), np.zeros((2, 6, 4)))


def test_rope_turns_each_pair_of_channels_at_its_own_rate():
    """Channels i and i + D/2 are the parts of a complex number, which position t turns by t * 10000^(-2i / D)."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 1, 5, 8)))
    angles = np.arange(3, 8)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[0, 0, :, :4] + 1j * x[0, 0, :, 4:]) * np.exp(1j * angles)
    found = np.asarray(rotate(jnp.asarray(x), 3))[0, 0]
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=1), rtol=1e-4, atol=1e-5)
