"""Hessian-vector products, spectrum and trace against known spectra, closed forms and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.data import Batch
from jaxgpt.diagnostics import derivatives
from jaxgpt.diagnostics.derivatives import mean_loss

P = 12
Q = np.linalg.qr(np.random.default_rng(0).normal(size=(P, P)))[0]
KEY = jax.random.key(0)


def matrix(eigenvalues):
    return jnp.asarray(Q @ np.diag(eigenvalues) @ Q.T, jnp.float32)


def quadratic(params, matrix):
    """A loss with a known Hessian."""
    return 0.5 * params["x"] @ matrix @ params["x"]


PARAMS = {"x": jnp.asarray(np.random.default_rng(1).normal(size=P), jnp.float32)}
trace = jax.jit(derivatives.trace, static_argnums=(0, 4))
hvp = jax.jit(derivatives.hvp, static_argnums=0)
spectrum = jax.jit(derivatives.spectrum, static_argnums=0, static_argnames="steps")
EIGENVALUES = np.array([-3.0, -1.0, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 20.0])


def test_lanczos_finds_every_eigenvalue_and_the_top_eigenvector():
    measure = jax.vmap(lambda key: spectrum(quadratic, PARAMS, matrix(EIGENVALUES), key, steps=50))
    found = measure(jax.random.split(KEY, 2))  # more steps than dimensions
    assert found.values.shape == (2, P)
    for values, top in zip(found.values, found.top, strict=True):
        np.testing.assert_allclose(values, EIGENVALUES, atol=2e-4)
        np.testing.assert_allclose(abs(top @ Q[:, -1]), 1, rtol=1e-4)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-4)


def test_a_few_lanczos_steps_bound_the_extreme_eigenvalues():
    values, _, errors, _ = spectrum(quadratic, PARAMS, matrix(EIGENVALUES), KEY, steps=6)
    assert EIGENVALUES[0] <= values[0] + 1e-4
    assert values[-1] <= EIGENVALUES[-1] + 1e-4
    for value, error in zip(values, errors, strict=True):
        assert np.abs(EIGENVALUES - value).min() <= error + 1e-4
    np.testing.assert_allclose(values[-1], 20, rtol=1e-3)


def test_repeated_eigenvalues_give_no_spurious_ones():
    """The Krylov space has three dimensions: Ritz values of later steps have no weight and stay within the spectrum."""
    few = np.repeat([2.0, 5.0, 9.0], 4)
    values, weights, _, _ = spectrum(quadratic, PARAMS, matrix(few), KEY, steps=50)
    np.testing.assert_allclose(values[np.array([0, -1])], [2, 9], rtol=1e-4)
    for value, weight in zip(values, weights, strict=True):
        assert weight < 1e-4 or np.abs(few - value).min() < 1e-3


def test_the_top_eigenvector_is_found_after_a_breakdown():
    """If all eigenvalues are equal, Lanczos breaks down after its first step."""
    values, _, _, top = spectrum(quadratic, PARAMS, 3 * jnp.eye(P), KEY, steps=4)
    np.testing.assert_allclose(values, 3, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(top), 1, rtol=1e-5)
    *_, top = spectrum(quadratic, PARAMS, matrix(np.repeat([2.0, 5.0, 9.0], 4)), KEY, steps=50)
    np.testing.assert_allclose(top @ matrix(np.repeat([2.0, 5.0, 9.0], 4)) @ top, 9, rtol=1e-4)


def test_the_trace_is_exact_for_a_diagonal_matrix_and_unbiased_for_others():
    np.testing.assert_allclose(trace(quadratic, PARAMS, jnp.diag(jnp.arange(12.0)), KEY, 3), [66.0] * 3, rtol=1e-5)
    full = matrix(EIGENVALUES)
    samples = trace(quadratic, PARAMS, full, KEY, 2000)
    deviation = np.sqrt(2 * (np.square(full).sum() - np.square(jnp.diag(full)).sum()))  # of Hutchinson's estimator
    np.testing.assert_allclose(samples.std(), deviation, rtol=0.1)
    assert abs(samples.mean() - EIGENVALUES.sum()) < 4 * deviation / np.sqrt(2000)


def test_the_hessian_of_a_bigram_is_diag_p_minus_p_pT_for_each_row():
    V, T = 5, 8
    config = ModelConfig(kind="bigram", vocab_size=V, block_size=T)
    rng = np.random.default_rng(0)
    params = {"token_embedding_table": {"embedding": jnp.asarray(rng.normal(size=(V, V)), jnp.float32)}}
    ids = rng.integers(0, V, (3, T + 1))
    loss, batch = mean_loss(config), Batch(ids[:, :-1], ids[:, 1:])
    p = np.asarray(jax.nn.softmax(params["token_embedding_table"]["embedding"]))
    expected = np.zeros((V, V, V, V))
    for row, share in enumerate(np.bincount(ids[:, :-1].reshape(-1), minlength=V) / (3 * T)):
        expected[row, :, row, :] = share * (np.diag(p[row]) - np.outer(p[row], p[row]))
    v = rng.normal(size=(V, V)).astype(np.float32)
    found = hvp(loss, params, batch, {"token_embedding_table": {"embedding": v}})["token_embedding_table"]["embedding"]
    np.testing.assert_allclose(found, np.einsum("ijkl,kl->ij", expected, v), atol=1e-6)
    values = np.linalg.eigvalsh(expected.reshape(V * V, V * V))
    tops = spectrum(loss, params, batch, KEY, steps=V * V).values
    np.testing.assert_allclose(tops[-1], values[-1], rtol=1e-4)
    estimates = trace(loss, params, batch, KEY, 64)
    assert abs(estimates.mean() - values.sum()) < 5 * estimates.std() / 8


@pytest.fixture(scope="module")
def gpt():
    """(config, params, batch) of a GPT that trains in bfloat16 with dropout."""
    config = ModelConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1, precision="bfloat16")
    rng, shapes = np.random.default_rng(0), jax.eval_shape(partial(model.init_params, config), KEY)
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape) + (x.ndim == 1)).astype(np.float32), shapes)
    ids = rng.integers(0, 13, (4, 9))
    return config, params, Batch(ids[:, :-1], ids[:, 1:])


def test_hvp_equals_finite_differences_of_gradients_in_every_leaf(gpt):
    config, params, batch = gpt
    loss = mean_loss(config, chunk=2)
    v = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(0, 0.1, x.shape).astype(np.float32), params)
    found = hvp(loss, params, batch, v)
    gradient = jax.jit(jax.grad(mean_loss(config)))
    ahead, behind = (gradient(jax.tree.map(lambda p, d: p + e * d, params, v), batch) for e in (1e-2, -1e-2))  # noqa: B023
    for h, a, b in zip(*map(jax.tree.leaves, (found, ahead, behind)), strict=True):
        assert np.abs(h).max() > 0
        np.testing.assert_allclose(h, (a - b) / 2e-2, atol=0.01 * np.abs(h).max())


def test_mean_loss_has_no_bf16_matmuls(gpt):
    config, params, batch = gpt
    training_losses = partial(model.losses, config)
    assert "bf16" in str(jax.make_jaxpr(training_losses)(params, batch.inputs, batch.targets))
    assert "bf16" not in str(jax.make_jaxpr(partial(derivatives.hvp, mean_loss(config)))(params, batch, params))


def test_eigenvalue_errors_include_rounding():
    n, rng = 200, np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    symmetric = jnp.asarray(basis * [*rng.normal(0, 0.1, n - 4), -3, 8, 12, 20] @ basis.T, jnp.float32)
    exact = np.linalg.eigvalsh(np.asarray(symmetric, np.float64))
    matvec = partial(jnp.dot, symmetric, precision="highest")
    measure = jax.jit(partial(jax.lax.map, lambda start: derivatives.lanczos(matvec, start, 12)))
    found = measure(jax.random.normal(KEY, (8, n)))
    distances = np.abs(exact - np.asarray(found.values, np.float64)[..., None]).min(axis=-1)
    assert (distances <= found.errors).all()
