"""Self-attention as the notes build it: an average over the past, computed in three ways, then a single head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.attention import attention, causal_mask


def mean_by_loop(x: jax.Array) -> jax.Array:
    """The mean over each position and its past, one position at a time: (B, T, C) -> (B, T, C)."""
    return jnp.stack([x[:, : t + 1].mean(axis=1) for t in range(x.shape[1])], axis=1)


def mean_by_matmul(x: jax.Array) -> jax.Array:
    """The same, as a matmul with a lower-triangular matrix whose rows sum to one."""
    tril = causal_mask(x.shape[1]).astype(x.dtype)
    return (tril / tril.sum(axis=1, keepdims=True))[None] @ x


def mean_by_softmax(x: jax.Array) -> jax.Array:
    """The same, as causal attention whose affinities are all zero."""
    zeros = jnp.zeros_like(x)
    return attention(zeros, zeros, x, causal_mask(x.shape[1])[None])


class Head(nn.Module):
    """A single head as in the notes: key, query and value without bias, each C -> head_size."""

    head_size: int
    scale: float | None = None
    """As in `attention`; 1.0 leaves it out, as the notes do."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """(B, T, C) -> (B, T, head_size).

        Args:
          context: (B, S, C), the source of keys and values for cross-attention. None: causal self-attention.
        """
        source, mask = (x, causal_mask(x.shape[1])[None]) if context is None else (context, None)
        k = nn.Dense(self.head_size, use_bias=False, name="key")(source)  # (B, S, head_size)
        q = nn.Dense(self.head_size, use_bias=False, name="query")(x)  # (B, T, head_size)
        v = nn.Dense(self.head_size, use_bias=False, name="value")(source)
        return attention(q, k, v, mask, scale=self.scale)
