"""Attention as the notes write it: nodes of a directed graph that gather from the nodes that point to them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.nn import layers, numerics


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """The notes' attention: `softmax(mask(q @ k.T)) @ v`.

    Args:
      q: queries, (..., T, D): what each node looks for.
      k: keys, (..., S, D): what each node contains.
      v: values, (..., S, E).
      mask: boolean, broadcastable to (..., T, S); True where node s points to node t. None: everywhere. A row
        without any True gives NaN, as a node that nobody points to has nothing to gather.
      scale: multiplies `q @ k.T`; None for D**-0.5. The notes leave it out: 1.0.
      drop: applied to the weights.

    Returns:
      (..., T, E).
    """
    return drop(attention_weights(q, k, mask, scale=scale)) @ v


def attention_weights(
    q: jax.Array, k: jax.Array, mask: jax.Array | None = None, *, scale: float | None = None
) -> jax.Array:
    """The data-dependent weights of `attention`, (..., T, S): rows sum to one, zero where the mask is False."""
    affinity = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.swapaxes(-1, -2)
    if mask is not None:
        affinity = jnp.where(mask, affinity, -jnp.inf)
    return numerics.softmax(affinity)


def causal_mask(T: int) -> jax.Array:
    """(T, T), True on and below the diagonal: each node is pointed to by itself and its past."""
    return jnp.tril(jnp.ones((T, T), bool))


class Head(nn.Module):
    """One head, as the notes write it: key, query and value without bias, each C -> head_size."""

    head_size: int
    scale: float | None = None
    """As in `attention`; the notes leave it out: 1.0."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, head_size).

        Args:
          context: (B, S, C), where keys and values come from (cross-attention, to all of it). None: from `x` itself
            (self-attention, to the past).
        """
        source, mask = (x, causal_mask(x.shape[1])[None]) if context is None else (context, None)
        k = nn.Dense(self.head_size, use_bias=False, name="key")(source)  # (B, S, 16)
        q = nn.Dense(self.head_size, use_bias=False, name="query")(x)  # (B, T, 16)
        v = nn.Dense(self.head_size, use_bias=False, name="value")(source)
        return attention(q, k, v, mask, scale=self.scale)


class MultiHeadAttention(nn.Module):
    """H heads side by side, and a projection back to C channels."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, C), with `context` (B, S, C) as in `Head`."""
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head
        source, mask = (x, causal_mask(T)[None, None]) if context is None else (context, None)

        def heads(name: str, x: jax.Array) -> jax.Array:
            return layers.dense(cfg, C, name)(x).reshape(B, -1, H, D).swapaxes(1, 2)  # (B, H, T or S, D)

        q, k, v = heads("query", x), heads("key", source), heads("value", source)
        out = attention(q, k, v, mask, drop=layers.dropout(self, "drop_weights"))
        out = out.swapaxes(1, 2).reshape(B, T, C)
        return layers.dropout(self, "drop_out")(layers.dense(cfg, C, "c_proj", residual=True)(out))
