"""Averaging over the past, three ways that give the same numbers: the door to self-attention.

Each takes x (B, T, C) and gives (B, T, C): at each position the mean of x up to and including it.
"""

import jax
import jax.numpy as jnp

from jaxgpt.attention import attention, causal_mask


def by_loop(x: jax.Array) -> jax.Array:
    """One position at a time."""
    return jnp.stack([x[:, : t + 1].mean(axis=1) for t in range(x.shape[1])], axis=1)


def by_matmul(x: jax.Array) -> jax.Array:
    """A lower-triangular matrix whose rows sum to one, times x."""
    tril = causal_mask(x.shape[1]).astype(x.dtype)
    return (tril / tril.sum(axis=1, keepdims=True))[None] @ x


def by_softmax(x: jax.Array) -> jax.Array:
    """Attention in which no node prefers any other: all affinities are zero, the future is masked."""
    nothing = jnp.zeros_like(x)
    return attention(nothing, nothing, x, causal_mask(x.shape[1])[None])
