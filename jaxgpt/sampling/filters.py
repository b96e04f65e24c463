"""Logits to logits: what of a distribution to keep before drawing from it."""

import jax
import jax.numpy as jnp


def temperature(logits: jax.Array, t: jax.Array | float) -> jax.Array:
    """(..., V) divided by `t` > 0: below 1 sharper, above 1 flatter."""
    return logits / t


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """(..., V) with -inf everywhere but at the `k` largest (and any that equal the k-th); 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest_kept = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)
