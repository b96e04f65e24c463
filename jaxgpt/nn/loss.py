"""The one cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.nn.cost import LOGITS


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32: logits (..., V), targets (...) ids -> (...)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of `token_losses`, a scalar, as PyTorch's `F.cross_entropy`."""
    return token_losses(logits, targets).mean()


def losses_of(
    logits: Callable[[jax.Array], jax.Array], x: jax.Array, targets: jax.Array, V: int, chunk: int = LOGITS
) -> jax.Array:
    """`token_losses(logits(x), targets)`, without all the logits at once where they are more than `chunk`.

    The rows are split into equal parts, one after another, and the backward pass makes the logits of a part again.

    Args:
      logits: features (..., C) -> (..., V).
      x: (B, T, C).
      targets: (B, T).
    """
    rows = targets.size
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * V <= chunk or n == rows))
    if parts == 1:
        return token_losses(logits(x), targets)

    @jax.checkpoint
    def part(x: jax.Array, targets: jax.Array) -> jax.Array:
        return token_losses(logits(x), targets)

    split = x.reshape(parts, rows // parts, -1), targets.reshape(parts, -1)
    return jax.lax.map(lambda each: part(*each), split).reshape(targets.shape)
