import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.nn import numerics


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_dot_general_is_the_dense_product(shape):
    x, w = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (5, 7))
    got = numerics.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-6)


def test_other_contractions_are_lax_dot_general():
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(8.0).reshape(2, 4)
    np.testing.assert_array_equal(numerics.dot_general(x, w, (((0,), (0,)), ((), ()))), np.asarray(x).T @ np.asarray(w))


def test_dense_products_are_two_dimensional():
    """What makes them fast on a CPU: no dot of the whole model's forward pass has a batch dimension but attention's."""
    x, w = jnp.ones((2, 3, 5)), jnp.ones((5, 7))
    jaxpr = jax.make_jaxpr(lambda x, w: numerics.dot_general(x, w, (((2,), (0,)), ((), ()))))(x, w)
    (dot,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert [var.aval.ndim for var in dot.invars] == [2, 2]


def test_softmax_is_computed_in_float32_and_keeps_the_dtype():
    x = jnp.array([[0.0, 1.0, -jnp.inf]])
    np.testing.assert_allclose(numerics.softmax(x), [[1 / (1 + np.e), np.e / (1 + np.e), 0]], rtol=1e-6)
    assert numerics.softmax(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
