"""The one cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.nn import sharding
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
    """`token_losses(logits(x), targets)`, without all the logits at once where a device has more than `chunk` of them.

    Its rows are split into equal parts, one after another, and the backward pass makes the logits of a part again.

    Args:
      logits: features (..., C) -> (..., V).
      x: (B, T, C).
      targets: (B, T).
    """
    B, T = targets.shape
    over_batch, over_time = sharding.parts("batch"), sharding.parts("time")
    rows = -(-B // over_batch) * -(-T // over_time)
    V = -(-V // sharding.parts("width"))
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * V <= chunk or n == rows))
    if parts == 1:
        return token_losses(logits(x), targets)

    @jax.checkpoint
    def part(x: jax.Array, targets: jax.Array) -> jax.Array:
        return token_losses(logits(x), targets)

    def split(x: jax.Array) -> jax.Array:
        """(B, T, ...) -> (parts, devices over B, over T, rows, ...): each part has rows of every device."""
        x = x.reshape(over_batch, B // over_batch, over_time, T // over_time, *x.shape[2:]).swapaxes(1, 2)
        x = x.reshape(over_batch, over_time, parts, -1, *x.shape[4:])
        return sharding.constrain(jnp.moveaxis(x, 2, 0), None, "batch", "time", *[None] * (x.ndim - 3))

    losses = jax.lax.map(lambda each: part(*each), (split(x), split(targets)))  # as the targets
    losses = jnp.moveaxis(losses, 0, 2).reshape(over_batch, over_time, B // over_batch, T // over_time)
    return losses.swapaxes(1, 2).reshape(B, T)
