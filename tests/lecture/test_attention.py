"""Three ways of averaging over the past: equal results, and the same causal gradients."""

import jax
import numpy as np
import pytest

from jaxgpt.lecture import attention

MEANS = {mean.__name__: mean for mean in (attention.mean_by_loop, attention.mean_by_matmul, attention.mean_by_softmax)}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (4, 8, 2)])
def test_each_position_is_the_mean_of_its_past_and_itself(name, shape):
    x = np.asarray(jax.random.normal(jax.random.key(0), shape))
    plain = np.zeros_like(x)
    for b in range(shape[0]):
        for t in range(shape[1]):
            plain[b, t] = sum(x[b, s] for s in range(t + 1)) / (t + 1)
    np.testing.assert_allclose(MEANS[name](jax.numpy.asarray(x)), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MEANS)
def test_gradient_flows_along_exactly_the_causal_edges(name):
    """Position s reaches t >= s with weight 1 / (t + 1); channels and sequences stay separate."""
    B, T, C = 2, 6, 3
    x = jax.random.normal(jax.random.key(0), (B, T, C))
    jacobian = np.asarray(jax.jacobian(MEANS[name])(x))  # (B, T, C, B, T, C)
    edges = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    expected = np.einsum("ab,ts,cd->atcbsd", np.eye(B), edges, np.eye(C))
    np.testing.assert_array_equal(jacobian != 0, expected != 0)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)
