"""The one cross-entropy."""

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32: logits (..., V), targets (...) ids -> (...)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of `token_losses`, a scalar, as PyTorch's `F.cross_entropy`."""
    return token_losses(logits, targets).mean()
