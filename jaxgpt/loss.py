"""The one cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt import sharding
from jaxgpt.cost import LOGITS
from jaxgpt.matmul import Precision, to_compute_dtype


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32: logits (..., V), targets (...) ids -> (...)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of `token_losses`, a scalar, as PyTorch's `F.cross_entropy`."""
    return token_losses(logits, targets).mean()


def losses_of(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    precision: Precision = "float32",
    chunk: int = LOGITS,
) -> jax.Array:
    """`token_losses(logits(x, kernel), targets)`, without all the logits at once where a device has more than
    `chunk` of them.

    Its rows are split into equal parts, one after another, and the backward pass makes the logits of a part again.

    Args:
      logits: features (..., C) and a kernel (C, V) -> (..., V).
      x: (B, T, C).
      kernel: (C, V).
      targets: (B, T).
      precision: of the operands of `logits`.
    """
    B, T = targets.shape
    rows = -(-B // sharding.parts("batch")) * -(-T // sharding.parts("time"))
    V = -(-kernel.shape[1] // sharding.parts("width"))
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * V <= chunk or n == rows))
    if parts == 1:
        return token_losses(logits(x, kernel), targets)

    def all_parts(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        @jax.checkpoint
        def part(each: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, targets = each
            return token_losses(logits(x, kernel), targets)

        split = x.reshape(parts, -1, x.shape[-1]), targets.reshape(parts, -1)
        return jax.lax.map(part, split).reshape(targets.shape)

    return sharding.by_rows(all_parts, x, kernel, targets, to_compute_dtype(kernel, precision).dtype)
