from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import loss, sharding
from jaxgpt.loss import cross_entropy, token_losses

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 4
TARGETS = jnp.array([[0, 1, 2], [3, 4, 0]])


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def platform(request, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: request.param)


def test_loss_is_minus_the_log_of_the_softmax():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.asarray(TARGETS)[..., None], -1)[..., 0])
    np.testing.assert_allclose(token_losses(LOGITS, TARGETS), expected, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS), expected.mean(), rtol=1e-5)


def test_gradient_is_softmax_minus_one_hot():
    grad = jax.grad(lambda x: cross_entropy(x, TARGETS))(LOGITS)
    np.testing.assert_allclose(grad, (jax.nn.softmax(LOGITS) - jax.nn.one_hot(TARGETS, 5)) / 6, rtol=1e-5, atol=1e-7)


def test_loss_of_uniform_logits_is_log_V():
    np.testing.assert_allclose(cross_entropy(jnp.zeros((1, 1, 65)), jnp.array([[3]])), np.log(65), rtol=1e-6)


def test_huge_infinite_and_bfloat16_logits():
    assert cross_entropy(jnp.array([[[1e4, -1e4]]]), jnp.array([[1]])) == 2e4
    assert cross_entropy(jnp.array([[[-jnp.inf, 1.0, -jnp.inf]]]), jnp.array([[1]])) == 0
    assert cross_entropy(jnp.array([[[-300.0, -400.0]]]), jnp.array([[1]])) == 100
    assert cross_entropy(LOGITS.astype(jnp.bfloat16), TARGETS).dtype == jnp.float32


def test_gradient_has_the_dtype_of_the_logits():
    low = LOGITS.astype(jnp.bfloat16)
    grad = jax.grad(lambda x: cross_entropy(x, TARGETS))(low)
    assert grad.dtype == jnp.bfloat16
    expected = (jax.nn.softmax(low.astype(jnp.float32)) - jax.nn.one_hot(TARGETS, 5)) / 6
    np.testing.assert_allclose(grad.astype(jnp.float32), expected, rtol=1e-2, atol=1e-6)


def test_ids_outside_of_the_vocabulary_give_nan():
    found = token_losses(LOGITS, jnp.array([[5, 1, 2], [-1, 4, 0]]))
    assert np.isnan(found).tolist() == [[True, False, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16])
def test_ids_may_have_any_integer_dtype(dtype):
    logits, ids = jax.random.normal(jax.random.key(0), (3, 256)), jnp.array([0, 127, 255])
    np.testing.assert_array_equal(token_losses(logits, ids.astype(dtype)), token_losses(logits, ids))


def test_as_many_logits_at_once_as_fit_into_the_memory_of_the_device(monkeypatch):
    """On CPUs, and where the memory is unknown, LOGITS."""
    platform, GiB = sharding.platform(), 2**30
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for stats, n in (
        ({"bytes_limit": 80 * GiB, "bytes_in_use": 9 * GiB}, 80 * GiB // 64),
        ({}, loss.LOGITS),
        (None, loss.LOGITS),
    ):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [SimpleNamespace(memory_stats=lambda: stats)])
        assert loss.logits_at_once() == (loss.LOGITS if platform == "cpu" else n)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (2, 3), (2, 4, 1)])
def test_targets_of_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(2, 4\)"), jax.numpy_rank_promotion("allow"):
        cross_entropy(jnp.zeros((2, 4, 5)), jnp.zeros(shape, int))


def test_second_derivatives_and_vmap():
    """H v for the cross-entropy of one row is (diag p - p pT) v."""

    def one_loss(x):
        return token_losses(x, jnp.int32(3))

    x, v = LOGITS[0, 0], jnp.arange(5.0)
    p = jax.nn.softmax(x)
    expected = p * v - p * (p @ v)
    np.testing.assert_allclose(jax.jvp(jax.grad(one_loss), (x,), (v,))[1], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jax.grad(one_loss)(x) @ v)(x), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(jax.vmap(token_losses))(LOGITS, TARGETS), token_losses(LOGITS, TARGETS), rtol=1e-6
    )
