"""Every hand-derived gradient against `jax.grad`, and against PyTorch on the snippets of the lecture notes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.attention import attention, causal_mask
from jaxgpt.lecture import backprop
from jaxgpt.loss import cross_entropy

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "document_snippets.npz"))
SCALES = {"unscaled": 1.0, "scaled": 16**-0.5}
SEEDS = st.integers(0, 2**31 - 1)
SHAPES = st.sampled_from([(1, 1, 1, 1), (2, 4, 3, 5)])  # few, because each shape compiles
few_examples = settings(max_examples=15)


def close(ours, theirs, rtol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * float(np.abs(theirs).max()) + 1e-7)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def vjp(function, d_out, *inputs):
    """The gradients of sum(function(*inputs) * d_out), by jax.vjp."""
    return jax.vjp(function, *inputs)[1](d_out)


def head(x, key, query, value, scale):
    return attention(x @ query, x @ key, x @ value, causal_mask(x.shape[1])[None], scale=scale)


# Jitted, so that each compiles once per shape, not once per example.
bigram_by_hand, head_by_hand = jax.jit(backprop.bigram), jax.jit(backprop.head)
bigram_by_jax = jax.jit(jax.grad(lambda table, idx, targets: cross_entropy(table[idx], targets)))
head_by_jax = jax.jit(lambda d_out, scale, *inputs: vjp(lambda *x: head(*x, scale), d_out, *inputs))


@few_examples
@given(SEEDS, SHAPES)
def test_matmul(seed, shape):
    _, n, k, m = shape
    a, b, d_out = normal(seed, (2, n, k), (2, k, m), (2, n, m))
    for ours, theirs in zip(backprop.matmul(a, b, d_out), vjp(jnp.matmul, d_out, a, b), strict=True):
        assert ours.shape == theirs.shape
        close(ours, theirs)


def test_matmul_matches_the_rule_in_the_notes():
    """'the gradient of C with respect to A is given transpose of B'."""
    d_a, d_b = backprop.matmul(*(jnp.asarray(GOLDEN[f"mm_{name}"]) for name in "ABG"))
    close(d_a, GOLDEN["mm_dA"])
    close(d_b, GOLDEN["mm_dB"])


@few_examples
@given(SEEDS, SHAPES)
def test_softmax(seed, shape):
    _, n, _, t = shape
    x, d_out = normal(seed, (n, t), (n, t))
    (theirs,) = vjp(jax.nn.softmax, d_out, x)
    close(backprop.softmax(jax.nn.softmax(x), d_out), theirs)


@few_examples
@given(SEEDS, SHAPES)
def test_cross_entropy(seed, shape):
    _, n, _, v = shape
    (logits,) = normal(seed, (n, v))
    targets = jax.random.randint(jax.random.key(seed), (n,), 0, v)
    ours = backprop.cross_entropy(logits, targets)
    close(ours, jax.grad(cross_entropy)(logits, targets))
    np.testing.assert_allclose(ours.sum(axis=-1), np.zeros(n), atol=1e-6)


@few_examples
@given(SEEDS, SHAPES)
def test_bigram(seed, shape):
    b, t, _, v = shape
    (table,) = normal(seed, (v, v))
    idx, targets = jax.random.randint(jax.random.key(seed), (2, b, t), 0, v)
    close(bigram_by_hand(table, idx, targets), bigram_by_jax(table, idx, targets))


def test_bigram_against_pytorch():
    idx, targets = (jnp.asarray(GOLDEN[f"bigram_{name}"], jnp.int32) for name in ("idx", "targets"))
    close(backprop.bigram(jnp.asarray(GOLDEN["bigram_table"]), idx, targets), GOLDEN["bigram_grad"])


def test_the_gradient_of_a_bigram_row_vanishes_exactly_at_the_observed_frequencies():
    V = 4
    idx = jnp.array([[0, 0, 0, 0, 1, 1, 2]])  # 3 never occurs
    targets = jnp.array([[1, 1, 1, 2, 0, 0, 3]])
    counted = jnp.full((V, V), -jnp.inf)
    counted = counted.at[0, jnp.array([1, 2])].set(jnp.log(jnp.array([3.0, 1.0])))
    counted = counted.at[1, 0].set(0.0).at[2, 3].set(0.0).at[3].set(0.0)
    at_frequencies = backprop.bigram(counted, idx, targets)
    np.testing.assert_allclose(at_frequencies, jnp.zeros((V, V)), atol=1e-7)
    np.testing.assert_allclose(backprop.bigram(counted + 5.0, idx, targets), at_frequencies, atol=1e-7)

    table = counted.at[0].set(0.0)
    grad = backprop.bigram(table, idx, targets)
    np.testing.assert_allclose(grad[1:], jnp.zeros((V - 1, V)), atol=1e-7)
    # Token 0 is 4 of 7 inputs. The model predicts 1/4 each; 1 follows in 3 of 4 cases, 2 in 1 of 4.
    np.testing.assert_allclose(grad[0], 4 / 7 * (np.full(V, 0.25) - np.array([0, 0.75, 0.25, 0])), atol=1e-7)


@few_examples
@given(SEEDS, SHAPES, st.sampled_from([1.0, 0.5]))
def test_head(seed, shape, scale):
    b, t, c, d = shape
    x, key, query, value, d_out = normal(seed, (b, t, c), (c, d), (c, d), (c, d), (b, t, d))
    key, query = key / c, query / c  # where a softmax is 0 or 1, rounding is larger than its gradient
    ours = head_by_hand(x, key, query, value, d_out, scale)
    theirs = head_by_jax(d_out, scale, x, key, query, value)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        close(one, other, rtol=5e-5)


@pytest.mark.parametrize("kind", SCALES)
def test_head_against_pytorch(kind):
    x = jnp.asarray(GOLDEN["x"])
    weights = [jnp.asarray(GOLDEN[f"weight_{name}"].T) for name in ("key", "query", "value")]
    out = head(x, *weights, SCALES[kind])
    close(out, GOLDEN[f"head_{kind}_out"])
    dx, *d_weights = backprop.head(x, *weights, 2 * out, SCALES[kind])  # the loss is the sum of squares
    close(dx, GOLDEN[f"head_{kind}_dx"])
    for name, d_weight in zip(("key", "query", "value"), d_weights, strict=True):
        close(d_weight.T, GOLDEN[f"head_{kind}_d{name}"])
