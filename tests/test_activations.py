"""GELU and LayerNorm against JAX and Flax: values, and derivatives up to second order."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import activations

X = jax.random.normal(jax.random.key(0), (2, 5, 16)) * 3
SCALE = jax.random.normal(jax.random.key(1), (16,)) + 1
WEIGHTS = jax.random.normal(jax.random.key(2), X.shape)


def flax_layer_norm(x, scale):
    return nn.LayerNorm(epsilon=1e-5, use_bias=False, use_fast_variance=False).apply({"params": {"scale": scale}}, x)


@partial(jax.jit, static_argnums=0)
def derivatives(function, *args):
    """Value, gradient, Hessian-vector product (jvp of grad), and the gradient of the squared gradient norm."""

    def loss(*args):
        return (function(*args) * WEIGHTS).sum()

    argnums = tuple(range(len(args)))
    grad = jax.grad(loss, argnums)
    ones = jax.tree.map(jnp.ones_like, args)
    second_order = jax.grad(lambda *args: sum((g**2).sum() for g in grad(*args)), argnums)
    return function(*args), grad(*args), jax.jvp(grad, args, ones)[1], second_order(*args)


@pytest.mark.parametrize(
    ("ours", "reference", "args"),
    [
        (activations.gelu, lambda x: jax.nn.gelu(x, approximate=False), (X,)),
        (lambda x: activations.gelu(x, True), lambda x: jax.nn.gelu(x, approximate=True), (X,)),
        (activations.layer_norm, flax_layer_norm, (X, SCALE)),
    ],
    ids=["gelu", "gelu by tanh", "layer norm"],
)
def test_values_and_derivatives_match_the_reference(ours, reference, args):
    with jax.numpy_rank_promotion("allow"):
        expected = derivatives(reference, *args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), derivatives(ours, *args), expected
    )
    mapped = jax.vmap(lambda x: ours(x, *args[1:]))(X)
    np.testing.assert_allclose(mapped, ours(*args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("offset", "tolerance"), [(0, 2e-6), (1, 2e-6), (-10, 1e-4)])
def test_layer_norm_of_channels_far_from_zero(offset, tolerance):
    """It subtracts their mean, so that neither the output nor the gradient depends on it."""
    x, g = np.random.default_rng(0).standard_normal((2, 64, 768))
    std = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    normal = (x - x.mean(axis=-1, keepdims=True)) / std
    dx = (g - g.mean(axis=-1, keepdims=True) - normal * (g * normal).mean(axis=-1, keepdims=True)) / std
    out, vjp = jax.vjp(activations.layer_norm, jnp.asarray(x + offset, jnp.float32), jnp.ones(768))
    for found, expected in zip(
        (out, *vjp(jnp.asarray(g, jnp.float32))), (normal, dx, (g * normal).sum(0)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("value", [0.0, 0.7, 123.456])
def test_layer_norm_of_equal_channels(value):
    """Their variance, a difference of rounded numbers, may come out below zero."""
    x = jnp.full((2, 768), value)
    out, vjp = jax.vjp(activations.layer_norm, x, jnp.ones(768))
    np.testing.assert_allclose(out, jnp.zeros_like(x), atol=0.02)
    chex.assert_tree_all_finite(vjp(jnp.ones_like(out)))


def test_gelu_far_from_zero():
    x = jnp.array([-1e4, -20.0, 0.0, 20.0, 1e4])
    for tanh in (False, True):
        np.testing.assert_array_equal(activations.gelu(x, tanh), [0, 0, 0, 20, 1e4])
        np.testing.assert_array_equal(jax.grad(lambda x: activations.gelu(x, tanh).sum())(x), [0, 0, 0.5, 1, 1])  # noqa: B023


def test_backward_pass_saves_only_the_input():
    """GELU and LayerNorm of (B, T, C) save one array of that size, in the dtype of the input."""
    x = X.astype(jnp.bfloat16)
    for function in (activations.gelu, lambda x: activations.layer_norm(x, SCALE)):
        _, vjp = jax.vjp(function, x)
        large = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= X.size]
        assert [leaf.dtype for leaf in large] == [jnp.bfloat16]
        assert vjp(jnp.ones_like(function(x)))[0].dtype == jnp.bfloat16


def test_gradient_of_a_bfloat16_scale_is_bfloat16():
    scale = SCALE.astype(jnp.bfloat16)
    assert jax.grad(lambda scale: activations.layer_norm(X, scale).sum())(scale).dtype == jnp.bfloat16
