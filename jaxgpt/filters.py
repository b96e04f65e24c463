"""Sampling filters: temperature, top-k, top-p and min-p, each from logits to logits."""

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


def top_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """(..., V) with -inf everywhere but at the nucleus: the fewest of the most likely tokens whose probabilities reach
    `p` together, at least one, and any as likely as the last of them (Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)[..., :-1]  # of the tokens before the second, third..
    kept = jnp.concatenate([jnp.ones_like(ordered[..., :1], bool), before < p], axis=-1)
    smallest_kept = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def min_p(logits: jax.Array, p: jax.Array | float) -> jax.Array:
    """(..., V) with -inf at each token less than `p` times as likely as the most likely one (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)
