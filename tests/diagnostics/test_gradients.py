"""Per-example gradients, noise scale and influence, compared with closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.data import Batch
from jaxgpt.diagnostics.derivatives import influence, mean_loss, noise_scale, per_example

V, T = 7, 6
BIGRAM = ModelConfig(kind="bigram", vocab_size=V, block_size=T)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (5, T + 1))
BATCH = Batch(IDS[:, :-1], IDS[:, 1:])
TABLE = RNG.normal(size=(V, V)).astype(np.float32)
PARAMS = {"token_embedding_table": {"embedding": TABLE}}
each = jax.jit(per_example, static_argnums=(0, 3, 4))
measured = jax.jit(noise_scale, static_argnums=(0, 3))


def by_hand(inputs, targets):
    """The gradient of a bigram's mean loss: softmax minus the one-hot target, in the row of the input."""
    gradient, p = np.zeros((V, V)), np.exp(TABLE) / np.exp(TABLE).sum(axis=1, keepdims=True)
    for token, target in zip(inputs, targets, strict=True):
        gradient[token] += (p[token] - np.eye(V)[target]) / T
    return gradient


BY_HAND = np.array([by_hand(*window) for window in zip(*map(np.asarray, BATCH), strict=True)])  # (5, V, V)


def table(gradient):
    return gradient["token_embedding_table"]["embedding"]


def size(gradient):
    return jnp.linalg.norm(table(gradient))


@pytest.mark.parametrize("chunk", [2, 8])
def test_per_example_gradients_of_a_bigram_equal_the_closed_form(chunk):
    np.testing.assert_allclose(each(mean_loss(BIGRAM), PARAMS, BATCH, table, chunk), BY_HAND, atol=1e-6)


def test_per_example_keeps_only_what_take_returns():
    found = each(mean_loss(BIGRAM), PARAMS, BATCH, size, 2)
    np.testing.assert_allclose(found, np.linalg.norm(BY_HAND, axis=(1, 2)), rtol=1e-5)
    kept = jax.eval_shape(lambda: per_example(mean_loss(BIGRAM), PARAMS, BATCH))
    assert table(kept).shape == (5, V, V), "by default, whole gradients are kept"


def test_influence_is_the_dot_product_of_gradients():
    train, val = Batch(IDS[:3, :-1], IDS[:3, 1:]), Batch(IDS[3:, :-1], IDS[3:, 1:])
    found = jax.jit(influence, static_argnums=(0, 4))(mean_loss(BIGRAM), PARAMS, train, val, 2)
    np.testing.assert_allclose(found, np.einsum("aij,bij->ab", BY_HAND[3:], BY_HAND[:3]), rtol=1e-4, atol=1e-6)


def test_a_step_on_a_window_lowers_the_loss_of_another_by_their_influence(tiny):
    """To first order in the learning rate, by finite differences, for a GPT."""
    loss, ids = jax.jit(mean_loss(tiny.model)), RNG.integers(0, 13, (2, 9))
    train, val = Batch(ids[:1, :-1], ids[:1, 1:]), Batch(ids[1:, :-1], ids[1:, 1:])

    @jax.jit
    def influence_and_step(params):
        return influence(loss, params, train, val)[0, 0], jax.grad(loss)(params, train)

    params = jax.jit(lambda key: model.init_params(tiny.model, key))(jax.random.key(0))
    found, gradient = influence_and_step(params)
    before, after = (loss(jax.tree.map(lambda p, g: p - r * g, params, gradient), val) for r in (-1e-2, 1e-2))  # noqa: B023
    assert abs(found) > 0.01
    np.testing.assert_allclose((before - after) / 2e-2, found, rtol=0.02)


def linear(params, batch):
    """A loss whose gradient is the mean of the batch's rows."""
    return (batch @ params).mean()


POPULATION = np.random.default_rng(0).normal((1.0, -0.5, 0.2), 1.0, (4, 3)).astype(np.float32)


def test_the_estimates_of_signal_and_noise_are_unbiased():
    """Averaged over all samples of three from a population of four, they equal the values of the population."""
    samples = jnp.asarray(POPULATION)[np.array(list(itertools.product(range(4), repeat=3)))]  # (64, 3, 3)
    found = jax.jit(jax.vmap(lambda sample: noise_scale(linear, jnp.zeros(3), sample)))(samples)
    np.testing.assert_allclose(found.signal.mean(), (POPULATION.mean(axis=0) ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.noise.mean(), POPULATION.var(axis=0).sum(), rtol=1e-4)


def test_the_noise_scale_and_its_jackknife_error_equal_the_formulas():
    """McCandlish et al. 2018, appendix A.1, with batches of 1 and of B; the jackknife by hand."""

    def formula(rows):
        B, small, big = len(rows), (rows**2).sum(axis=1).mean(), (rows.mean(axis=0) ** 2).sum()
        return (small - big) / (1 - 1 / B) / ((B * big - small) / (B - 1))

    rows = np.random.default_rng(1).normal((2.0, -1.0, 0.5), 1.0, (6, 3)).astype(np.float32)
    found = measured(linear, jnp.zeros(3), rows, 4)
    np.testing.assert_allclose(found.scale, formula(rows), rtol=1e-4)
    np.testing.assert_allclose(found.norms, np.linalg.norm(rows, axis=1), rtol=1e-5)
    others = np.array([formula(np.delete(rows, i, axis=0)) for i in range(6)])
    np.testing.assert_allclose(found.standard_error, np.sqrt(5 / 6 * ((others - others.mean()) ** 2).sum()), rtol=1e-3)
    with pytest.raises(ValueError, match="2 examples are too few"):
        noise_scale(linear, jnp.zeros(3), jnp.asarray(rows[:2]))
