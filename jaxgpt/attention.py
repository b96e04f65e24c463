"""Attention as the notes write it, rotary positions, masks, and the KV cache of decoding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt import matmul
from jaxgpt.config import ModelConfig
from jaxgpt.matmul import Precision

Weights = Callable[[jax.Array], jax.Array]
Drop = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A block (..., T, S) of an array, its rows (T,) and columns (S,) -> the block after dropout."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    drop: Weights | None = None,
    precision: Precision = "float32",
) -> jax.Array:
    """The notes' attention, `softmax(mask(q @ k.T)) @ v`: queries (..., T, D), what each node looks for, keys
    (..., S, D), what each node contains, and values (..., S, E) -> (..., T, E).

    Args:
      mask: boolean, broadcastable to (..., T, S); True where node s points to node t. None: everywhere. A row
        without any True gives NaN, as a node that nobody points to has nothing to gather.
      scale: multiplies `q @ k.T`; None for D**-0.5. The notes leave it out: 1.0.
      drop: applied to the weights.
      precision: of the two matmuls.
    """
    weights = attention_weights(q, k, mask, scale=scale, precision=precision)
    return matmul.matmul(drop(weights) if drop else weights, v, precision)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    precision: Precision = "float32",
) -> jax.Array:
    """The data-dependent weights of `attention`, (..., T, S): rows sum to one, zero where the mask is False."""
    affinity = matmul.matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.swapaxes(-1, -2), precision)
    if mask is not None:
        affinity = jnp.where(mask, affinity, -jnp.inf)
    return jax.nn.softmax(affinity, axis=-1)


def causal_mask(T: int, window: int = 0) -> jax.Array:
    """`attention_mask` of positions 0 to T - 1: (T, T)."""
    return attention_mask(jnp.arange(T), jnp.arange(T), window)


def attention_mask(t: jax.Array, s: jax.Array, window: int = 0) -> jax.Array:
    """(T, S), True where the token at position t (T,) attends to the one at s (S,): itself and its past, or the last
    `window` of these."""
    distance = t[:, None] - s[None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def rotate(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Rotary position embedding (Su et al. 2021): (B, H, T, D) at positions start, start + 1, ... -> the same shape.

    Channels i and i + D/2 turn by the position times 10000^(-2i / D), so that the dot product of a query and a key
    depends on their distance alone.
    """
    T, D = x.shape[-2:]
    rates = 10000.0 ** (-jnp.arange(0, D, 2) / D)
    angles = (start + jnp.arange(T)).astype(jnp.float32)[:, None] * rates[None]  # (T, D/2)
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Cache(NamedTuple):
    """The state of decoding: what `model.extend` keeps of the tokens so far."""

    blocks: dict[str, Any]  # the keys and values of each block, (B, kv, S, D): Flax's collection "cache"
    read: jax.Array | int  # () tokens so far; a Python 0 for a cache that is empty at compile time
    last: jax.Array  # (B,) int32: the last token


@matmul.in_32_bits
def init_cache(config: ModelConfig, B: int, size: int) -> Cache:
    """An empty cache for B sequences, with S = `size` slots in each block.

    The slots are a ring buffer: the token at position p is in slot p % S. Keys are kept normed and rotated, in the
    compute dtype; on CPUs in float32, because XLA would convert all slots from bfloat16 for each token. A bigram has no
    slots.
    """
    blocks: dict[str, Any] = {}
    precision = "float32" if jax.default_backend() == "cpu" else config.precision
    if config.kind == "gpt":
        shape = (B, config.n_kv_head or config.n_head, size, config.n_embd // config.n_head)
        for i in range(config.n_layer):
            keys, values = (matmul.to_compute_dtype(jnp.zeros(shape), precision) for _ in range(2))
            blocks[f"h_{i}"] = {"attn": {"keys": keys, "values": values}}
    return Cache(blocks, 0, jnp.zeros(B, jnp.int32))


def update_cache(slots: jax.Array, x: jax.Array, start: jax.Array | int) -> jax.Array:
    """`slots` (B, kv, S, D) with `x` (B, kv, T, D) of positions start, start + 1, ... written to them."""
    T, S = x.shape[2], slots.shape[2]
    x = x.astype(slots.dtype)
    if T == 1 or isinstance(start, int):  # does not wrap around: updated in place
        return lax.dynamic_update_slice_in_dim(slots, x, start % S, axis=2)
    return slots.at[:, :, (start + jnp.arange(T)) % S].set(x)


def cached_attention(
    config: ModelConfig, q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int
) -> jax.Array:
    """`attention` of queries (B, H, T, D) at positions start, start + 1, ... to slots (B, kv, S, D) -> (B, H, T, D).

    Each attends to the last block_size tokens (or `config.window`), itself included. Shared KV heads are not repeated:
    the queries that share one are rows of one matmul.
    """
    B, H, T, D = q.shape
    kv, S = keys.shape[1:3]
    newest = start + T - 1
    places = newest - (newest - jnp.arange(S)) % S  # (S,) the position in each slot; below 0 where nothing was written
    reach = min(config.window or config.block_size, config.block_size)
    mask = attention_mask(start + jnp.arange(T), places, reach) & (places >= 0)[None]
    rows, mask = q.reshape(B, kv, H // kv * T, D), jnp.tile(mask, (H // kv, 1))
    precision: Precision = "bfloat16" if keys.dtype == jnp.bfloat16 else "float32"
    out = attention(rows, keys, values, mask[None, None], precision=precision)
    return out.reshape(B, H, T, D)
