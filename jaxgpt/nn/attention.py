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


class CausalSelfAttention(nn.Module):
    """H heads of attention to the past, side by side, and a projection back to C channels."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> (B, T, C)."""
        cfg = self.config
        B, T, C = x.shape
        H, D = cfg.n_head, C // cfg.n_head

        def heads(name: str) -> jax.Array:
            y = layers.dense(cfg, C, name)(x)
            return y.reshape(B, T, H, D).swapaxes(1, 2)  # (B, H, T, D)

        mask = causal_mask(T)[None, None]
        out = attention(heads("query"), heads("key"), heads("value"), mask, drop=layers.dropout(self, "drop_weights"))
        out = out.swapaxes(1, 2).reshape(B, T, C)
        return layers.dropout(self, "drop_out")(layers.dense(cfg, C, "c_proj", residual=True)(out))
