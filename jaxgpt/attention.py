"""Attention as the notes write it: nodes of a directed graph that gather from the nodes that point to them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt import matmul as numerics
from jaxgpt.matmul import Precision, matmul

Drop = Callable[[jax.Array], jax.Array]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    drop: Drop | None = None,
    precision: Precision = "float32",
) -> jax.Array:
    """The notes' attention: `softmax(mask(q @ k.T)) @ v`.

    Args:
      q: queries, (..., T, D): what each node looks for.
      k: keys, (..., S, D): what each node contains.
      v: values, (..., S, E).
      mask: boolean, broadcastable to (..., T, S); True where node s points to node t. None: everywhere. A row
        without any True gives NaN, as a node that nobody points to has nothing to gather.
      scale: multiplies `q @ k.T`; None for D**-0.5. The notes leave it out: 1.0.
      drop: applied to the weights; None for nothing.
      precision: of the two products.

    Returns:
      (..., T, E).
    """
    weights = attention_weights(q, k, mask, scale=scale, precision=precision)
    return matmul(drop(weights) if drop else weights, v, precision)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    precision: Precision = "float32",
) -> jax.Array:
    """The data-dependent weights of `attention`, (..., T, S): rows sum to one, zero where the mask is False."""
    affinity = matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.swapaxes(-1, -2), precision)
    if mask is not None:
        affinity = jnp.where(mask, affinity, -jnp.inf)
    return numerics.softmax(affinity)


def causal_mask(T: int, window: int = 0) -> jax.Array:
    """(T, T), True on and below the diagonal: each node is pointed to by itself and its past, or by the last `window`
    of these."""
    return sees(jnp.arange(T), jnp.arange(T), window)


def sees(t: jax.Array, s: jax.Array, window: int = 0) -> jax.Array:
    """(T, S), True where the token at position t (T,) attends to the one at s (S,): its past, itself included."""
    distance = t[:, None] - s[None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def rotate(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021): (B, H, T, D) at positions start, start + 1, ... -> the same shape.

    Channels i and i + D/2 turn by the position times 10000^(-2i / D), so that a product of a query and a key depends on
    their distance alone.
    """
    T, D = x.shape[-2:]
    rates = 10000.0 ** (-jnp.arange(0, D, 2) / D)
    angles = (start + jnp.arange(T)).astype(jnp.float32)[:, None] * rates[None]  # (T, D/2)
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
