"""Muon: orthogonalized updates, only for the kernels of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import optimizer as muon
from jaxgpt import step as steps
from jaxgpt.data import Batch
from jaxgpt.optimizer import make_optimizer, optimizer_labels

KEY = jax.random.key(0)
init_state, train_step = (jax.jit(f, static_argnums=0) for f in (steps.init_state, steps.train_step))


def singular_values(x):
    return np.linalg.svd(np.asarray(x), compute_uv=False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 24), (2, 16, 64)])
def test_singular_values_become_about_one_and_singular_vectors_stay(precision, shape):
    x = jax.random.normal(KEY, shape)
    y = muon.orthogonal(x, 5, precision)
    values = singular_values(y)
    assert values.min() > 0.3
    assert values.max() < 1.3
    # The nearest orthogonal matrix is U V^T of the SVD; the result has the same singular vectors.
    u, _, v = np.linalg.svd(np.asarray(x), full_matrices=False)
    rotated = np.swapaxes(u, 1, 2) @ np.asarray(y) @ np.swapaxes(v, 1, 2)
    off = rotated * (1 - np.eye(shape[1]))
    assert np.abs(off).max() < (1e-3 if precision == "float32" else 0.1)


def test_newton_schulz_by_hand():
    x = jax.random.normal(KEY, (2, 16, 64))
    a, b, c = muon.NEWTON_SCHULZ
    y = x / np.linalg.norm(np.asarray(x), axis=(1, 2), keepdims=True)
    for n_steps in range(1, 8):
        A = y @ y.swapaxes(1, 2)
        y = a * y + (b * A + c * A @ A) @ y
        np.testing.assert_allclose(muon.orthogonal(x, n_steps, "float32"), y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_low_rank_gradients_do_not_explode(precision):
    """The first gradients of a run have low rank, where rounding errors of matmuls could grow."""
    x = jax.random.normal(KEY, (1, 64, 2)) @ jax.random.normal(KEY, (1, 2, 256)) * 1e-4
    for n_steps in range(1, 9):
        assert singular_values(muon.orthogonal(x, n_steps, precision)).max() < 1.5


def test_derivative_at_a_gradient_of_zero_is_finite():
    derivative = jax.grad(lambda x: muon.orthogonal(x, 1, "float32").sum())(jnp.zeros((1, 3, 5)))
    assert jnp.isfinite(derivative).all()


def test_equal_shapes_are_batched_and_tall_matrices_transposed():
    shapes = [(8, 8), (8, 32), (32, 8), (8, 8), (8, 12)]
    matrices = [jax.random.normal(key, s) for key, s in zip(jax.random.split(KEY, 5), shapes, strict=True)]
    together = jax.jit(lambda: muon.orthogonal_by_shape(matrices, 5, "float32"))()
    for x, y in zip(matrices, together, strict=True):
        tall = x.shape[0] > x.shape[1]
        alone = jax.jit(muon.orthogonal, static_argnums=(1, 2))((x.T if tall else x)[None], 5, "float32")[0]
        np.testing.assert_allclose(y, alone.T if tall else alone, rtol=1e-4, atol=1e-5)
    jaxpr = jax.make_jaxpr(lambda m: muon.orthogonal_by_shape(m, 1, "float32"))(matrices)
    matmuls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(matmuls) == 9, "three matmuls per step for each of three shapes"


def test_momentum_is_nesterov():
    tx = muon.scale_by_muon(0.9, 5, "float32")
    g1, g2 = jax.random.normal(KEY, (2, 8, 16))
    _, state = tx.update({"w": g1}, tx.init({"w": g1}))
    updates, state = tx.update({"w": g2}, state)
    mean = 0.9 * (0.1 * g1) + 0.1 * g2
    np.testing.assert_allclose(state.momentum["w"], mean, rtol=1e-5)
    expected = muon.orthogonal((0.9 * mean + 0.1 * g2)[None], 5, "float32")[0] * np.sqrt(2)  # twice as wide as tall
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-5)


def test_muon_trains_kernels_of_blocks_and_adamw_the_rest(tiny, change):
    config = change(tiny, algorithm="muon", learning_rate=1e-3, muon_learning_rate=2e-2, weight_decay=0.0)
    config = change(config, warmup_steps=0, schedule="constant", dropout=0.0, grad_clip=0.0)
    state = init_state(config)
    for path, kind in jax.tree_util.tree_leaves_with_path(optimizer_labels(state.params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert kind == ("muon" if name.startswith("h_") and name.endswith("kernel") else "adamw"), name
    idx = jax.random.randint(KEY, (4, 8), 0, 13)
    after, metrics = train_step(config, state, Batch(idx, jnp.roll(idx, -1, 1)))
    assert metrics.applied
    moved = jax.tree.map(lambda a, b: np.asarray(b - a), state.params, after.params)
    spectrum = singular_values(moved["h_0"]["attn"]["query"]["kernel"]) / 2e-2
    assert 0.3 < np.median(spectrum) < 1.3, "the singular values of an update are about Muon's learning rate"
    np.testing.assert_allclose(np.abs(moved["h_0"]["ln_1"]["scale"]).max(), 1e-3, rtol=0.05)
    assert len(jax.tree.leaves(make_optimizer(config).init(state.params))) < 2 * len(jax.tree.leaves(state.params)) + 2


def test_kernels_that_muon_trains_decay_too(tiny, change):
    config = change(tiny, algorithm="muon", weight_decay=0.1, muon_learning_rate=0.02, learning_rate=1e-3)
    params = init_state(tiny).params
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    update, kernel = (tree["h_0"]["mlp"]["c_fc"]["kernel"] for tree in (updates, params))
    np.testing.assert_allclose(update, 0.1 * 20 * kernel, rtol=1e-5)
