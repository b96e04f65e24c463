"""The cross-entropy, the same for training and evaluation."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgpt import sharding
from jaxgpt.matmul import Precision, to_compute_dtype

LOGITS = 2**26
"""`logits_at_once` of a device whose memory is unknown: 256 MiB of float32."""
ABSENT_MEMORY = ContextVar("absent_memory", default=0)
"""Bytes that a program may use on devices that are not attached, set where one is compiled for them; 0: unknown."""


@jax.custom_vjp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32: logits (..., V), targets (...) ids -> (...).

    NaN for ids outside of 0 to V - 1. The backward pass saves the logits and writes their gradient in their own dtype.
    `grad`, `vmap` and `jvp` of `grad` work; plain `jvp` does not.
    """
    return _token_losses_forward(logits, targets)[0]


def _token_losses_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
    targets = targets.astype(jnp.int32)
    reduced = _reduced_in_one_pass if sharding.platform() == "gpu" else _reduced
    normalizer, picked = reduced(logits, targets)
    valid = (targets >= 0) & (targets < logits.shape[-1])
    return jnp.where(valid, normalizer - picked, jnp.nan), (logits, targets, normalizer)


def _reduced(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log of the sum of the exponentials, logit of the target), both (...) float32."""
    wide = logits.astype(jnp.float32)
    # A sum with one nonzero term: XLA fuses it with the other reductions, unlike a gather.
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    return jax.nn.logsumexp(wide, axis=-1), jnp.where(one_hot, wide, 0).sum(-1)


@jax.custom_jvp
def _reduced_in_one_pass(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_reduced`, reading the logits once: a running maximum and the sum of exponentials relative to it (Milakov and
    Gimelshein 2018, arXiv:1805.02867)."""

    def merged(a: Any, b: Any) -> Any:
        e = jnp.exp(-jnp.abs(a[0] - b[0]))
        total = jnp.where(a[0] > b[0], a[1] + b[1] * e, a[1] * e + b[1])
        return jnp.maximum(a[0], b[0]), total, a[2] + b[2]

    wide = logits.astype(jnp.float32)
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    terms = wide, jnp.ones_like(wide), jnp.where(one_hot, wide, 0)
    start = np.finfo(np.float32).min, np.float32(0), np.float32(0)
    largest, total, picked = lax.reduce(terms, start, merged, [logits.ndim - 1])
    return largest + jnp.log(total), picked


_reduced_in_one_pass.defjvp(
    lambda primals, tangents: jax.jvp(lambda x: _reduced(x, primals[1]), primals[:1], tangents[:1])
)


def _token_losses_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, normalizer = saved
    probabilities = jnp.exp(logits.astype(jnp.float32) - normalizer[..., None])
    d = (probabilities - jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)) * g[..., None]
    return d.astype(logits.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of `token_losses`, a scalar, as PyTorch's `F.cross_entropy`.

    Raises:
      ValueError: the targets have another shape than the logits without V.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"the targets have shape {targets.shape}, expected {logits.shape[:-1]}")
    return token_losses(logits, targets).mean()


def logits_at_once() -> int:
    """`logits_in` the memory of a device; LOGITS on CPUs."""
    if sharding.platform() == "cpu":
        return LOGITS
    if jax.default_backend() != sharding.platform():
        return logits_in(ABSENT_MEMORY.get())
    return logits_in((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def logits_in(memory: int) -> int:
    """How many logits may exist at once in a memory of so many bytes: with their gradient, 8 bytes each, they take an
    eighth of it; LOGITS at least."""
    return max(LOGITS, memory // 64)


def losses_of(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    precision: Precision = "float32",
    chunk: int | None = None,
) -> jax.Array:
    """`token_losses(logits(x, kernel), targets)` in chunks of tokens: x (B, T, C), a kernel (C, V) and targets (B, T)
    -> (B, T). The backward pass recomputes the logits of each chunk.

    Args:
      logits: features (..., C) and a kernel (C, V) -> (..., V), with matmuls of `precision`.
      chunk: most logits of a chunk on each device, by default `logits_at_once()`.
    """
    (B, T), chunk = targets.shape, chunk or logits_at_once()
    split = sharding.splits_rows(kernel, targets)
    batch, time, width = (sharding.num_shards(dim) if split else 1 for dim in ("batch", "time", "width"))
    rows, V = B * T // (batch * time), kernel.shape[1] // width
    n_chunks = next(n for n in range(1, max(2, rows + 1)) if rows % n == 0 and (rows // n * V <= chunk or n == rows))
    if n_chunks == 1:
        return token_losses(logits(x, kernel), targets)

    def chunked(x: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        chunks = x.reshape(n_chunks, -1, x.shape[-1]), targets.reshape(n_chunks, -1)
        losses = jax.checkpoint(lambda each: token_losses(logits(each[0], kernel), each[1]))
        return lax.map(losses, chunks).reshape(targets.shape)

    return sharding.by_rows(chunked, x, kernel, targets, to_compute_dtype(kernel, precision).dtype)
