"""The one cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt import sharding
from jaxgpt.matmul import Precision, to_compute_dtype

LOGITS = 2**26
"""Logits that may exist at once in training, 256 MiB of float32; more are computed chunk by chunk."""


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
    """`token_losses(logits(x, kernel), targets)` in chunks of rows, each with at most `chunk` logits on a device.

    The backward pass recomputes the logits of a chunk.

    Args:
      logits: features (..., C) and a kernel (C, V) -> (..., V).
      x: (B, T, C).
      kernel: (C, V).
      targets: (B, T).
      precision: of the matmuls in `logits`.
    """
    B, T = targets.shape
    rows = -(-B // sharding.num_shards("batch")) * -(-T // sharding.num_shards("time"))
    V = -(-kernel.shape[1] // sharding.num_shards("width"))
    n_chunks = next(n for n in range(1, rows + 1) if rows % n == 0 and (rows // n * V <= chunk or n == rows))
    if n_chunks == 1:
        return token_losses(logits(x, kernel), targets)

    def chunked(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        @jax.checkpoint
        def one(each: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, targets = each
            return token_losses(logits(x, kernel), targets)

        chunks = x.reshape(n_chunks, -1, x.shape[-1]), targets.reshape(n_chunks, -1)
        return jax.lax.map(one, chunks).reshape(targets.shape)

    return sharding.by_rows(chunked, x, kernel, targets, to_compute_dtype(kernel, precision).dtype)
