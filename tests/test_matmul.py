import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import matmul as numerics

KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_dot_is_the_dense_product(shape):
    x, w = jax.random.normal(KEYS[0], shape), jax.random.normal(KEYS[1], (5, 7))
    np.testing.assert_allclose(numerics.dot(x, w), np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_of_layers_are_two_dimensional(precision):
    """What makes them fast on a CPU."""
    jaxpr = jax.make_jaxpr(lambda x, w: numerics.dot(x, w, precision))(jnp.ones((2, 3, 5)), jnp.ones((5, 7)))
    shapes = [eqn.invars[0].aval.ndim for eqn in jaxpr.eqns if eqn.primitive.name in ("dot_general", "custom_vjp_call")]
    assert shapes == [2]


@pytest.mark.smoke
@pytest.mark.parametrize(("K", "N"), [(8, 12), (12, 8), (8, 65), (3, 5)])
def test_bfloat16_rounds_operands_and_nothing_else(K, N):
    """The product and both its gradients equal float32 products of rounded operands: sums are float32."""
    x, w, g = (jax.random.normal(key, s) for key, s in zip(KEYS, [(6, K), (K, N), (6, N)], strict=True))

    def rounded(x):
        return np.asarray(x.astype(jnp.bfloat16), np.float32)

    out, back = jax.vjp(lambda x, w: numerics.dot(x, w, "bfloat16"), x, w)
    dx, dw = back(g)
    assert {each.dtype for each in (out, dx, dw)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(out, rounded(x) @ rounded(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rounded(g) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, rounded(x).T @ rounded(g), rtol=1e-5, atol=1e-5)
    assert np.abs(out - np.asarray(x) @ np.asarray(w)).max() > 1e-4


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (2, 3, 6, 12)])
def test_transposed(shape):
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    np.testing.assert_array_equal(numerics.transposed(x), np.swapaxes(x, -1, -2))


def test_auto_is_a_precision_and_stays_it():
    assert numerics.resolve("float32") == "float32"
    assert numerics.resolve("bfloat16") == "bfloat16"
    assert numerics.resolve("auto") in ("float32", "bfloat16")
    assert numerics.resolve("auto") == numerics.resolve("auto")
    jitted = jax.jit(lambda x: numerics.operand(x, "auto"))(jnp.ones(3))
    assert jitted.dtype == jnp.dtype(numerics.resolve("auto"))


@pytest.mark.parametrize(("seconds", "chosen"), [((2.0, 1.0), "bfloat16"), ((1.0, 1.0), "float32")])
def test_auto_is_what_is_faster(monkeypatch, seconds, chosen):
    monkeypatch.setattr(numerics, "_seconds", lambda: seconds)
    assert numerics.resolve.__wrapped__("auto") == chosen


def test_auto_falls_back_where_bfloat16_is_refused_and_says_so(monkeypatch):
    def refused(x, w, precision):
        raise RuntimeError("UNIMPLEMENTED: BF16 x BF16 = F32")

    monkeypatch.setattr(numerics, "dot", refused)
    with pytest.warns(UserWarning, match="float32 is used: UNIMPLEMENTED"):
        assert numerics.resolve.__wrapped__("auto") == "float32"


def test_softmax_is_computed_in_float32_and_keeps_the_dtype():
    x = jnp.array([[0.0, 1.0, -jnp.inf]])
    np.testing.assert_allclose(numerics.softmax(x), [[1 / (1 + np.e), np.e / (1 + np.e), 0]], rtol=1e-6)
    assert numerics.softmax(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rms_norm_and_softcap():
    x = jax.random.normal(KEYS[0], (3, 8)) * 40
    np.testing.assert_allclose(np.mean(np.square(numerics.rms_norm(x)), axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(numerics.rms_norm(x), numerics.rms_norm(7 * x), rtol=1e-5)
    capped = numerics.softcap(x, 15.0)
    assert np.abs(capped).max() < 15
    np.testing.assert_allclose(numerics.softcap(x / 1e3, 15.0), x / 1e3, rtol=1e-4)
