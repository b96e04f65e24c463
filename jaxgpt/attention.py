"""Attention as in the lecture notes, masks, RoPE, and the KV cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt import matmul
from jaxgpt.config import ModelConfig
from jaxgpt.matmul import Precision


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    precision: Precision = "float32",
) -> jax.Array:
    """`softmax(mask(q @ k.T)) @ v`: queries (..., T, D), keys (..., S, D), values (..., S, E) -> (..., T, E).

    Args:
      mask: boolean, broadcastable to (..., T, S): True where token t attends to token s. None: everywhere. A row
        without True gives NaN.
      scale: multiplies `q @ k.T`; None: D**-0.5. The notes begin without it: 1.0.
      drop: dropout of the weights.
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
    """The weights of `attention`, (..., T, S): rows sum to one, zero where the mask is False."""
    scores = matmul.matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.swapaxes(-1, -2), precision)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def causal_mask(T: int, window: int = 0) -> jax.Array:
    """`attention_mask` of positions 0 to T - 1: (T, T)."""
    return attention_mask(jnp.arange(T), jnp.arange(T), window)


def attention_mask(t: jax.Array, s: jax.Array, window: int = 0) -> jax.Array:
    """(T, S), True where a query at position t (T,) attends to a key at position s (S,): to itself and its past, or
    with a window to the last `window` tokens."""
    distance = t[:, None] - s[None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def rotate(x: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """RoPE (Su et al. 2021) of (B, H, T, D) at positions start, start + 1, ...

    Rotates the channel pair (i, i + D/2) by position * 10000^(-2i / D), so that the dot product of a query and a key
    depends only on their distance.
    """
    T, D = x.shape[-2:]
    rates = 10000.0 ** (-jnp.arange(0, D, 2) / D)
    angles = (start + jnp.arange(T)).astype(jnp.float32)[:, None] * rates[None]  # (T, D/2)
    cos, sin = jnp.cos(angles)[None, None], jnp.sin(angles)[None, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Cache(NamedTuple):
    """The KV cache, and what else `model.extend` needs of the tokens read so far."""

    blocks: dict[str, Any]  # keys and values of each block, (B, kv, S, D): Flax's collection "cache"
    read: jax.Array | int  # () number of tokens so far; a Python 0 if the cache is empty at compile time
    last: jax.Array  # (B,) int32: the last token


@matmul.in_32_bits
def init_cache(config: ModelConfig, B: int, size: int) -> Cache:
    """An empty cache for B sequences, with S = `size` slots in each block of a GPT.

    The slots are a ring buffer: the token at position p is in slot p % S. Keys are stored after QK-norm and RoPE, in
    the compute dtype; on CPUs in float32, because XLA would convert all bfloat16 slots for each token.
    """
    blocks: dict[str, Any] = {}
    precision = "float32" if jax.default_backend() == "cpu" else config.precision
    if config.kind == "gpt":
        shape = (B, config.n_kv_head or config.n_head, size, config.n_embd // config.n_head)
        for i in range(config.n_layer):
            slots = {name: matmul.to_compute_dtype(jnp.zeros(shape), precision) for name in ("keys", "values")}
            blocks[f"h_{i}"] = {"attn": slots}
    return Cache(blocks, 0, jnp.zeros(B, jnp.int32))


def update_cache(slots: jax.Array, x: jax.Array, start: jax.Array | int) -> jax.Array:
    """Write `x` (B, kv, T, D) at positions start, start + 1, ... into `slots` (B, kv, S, D)."""
    T, S = x.shape[2], slots.shape[2]
    x = x.astype(slots.dtype)
    if T == 1 or isinstance(start, int):  # does not wrap around, so XLA updates in place
        return lax.dynamic_update_slice_in_dim(slots, x, start % S, axis=2)
    return slots.at[:, :, (start + jnp.arange(T)) % S].set(x)


def cached_attention(
    config: ModelConfig, q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int
) -> jax.Array:
    """Attention of queries (B, H, T, D) at positions start, start + 1, ... to slots (B, kv, S, D) -> (B, H, T, D).

    Each query attends to the last block_size tokens (or `config.window`), itself included. KV heads are not repeated:
    the queries that share one become rows of one matmul.
    """
    B, H, T, D = q.shape
    kv, S = keys.shape[1:3]
    newest = start + T - 1
    positions = newest - (newest - jnp.arange(S)) % S  # (S,) of the token in each slot; negative if the slot is empty
    window = min(config.window or config.block_size, config.block_size)
    mask = attention_mask(start + jnp.arange(T), positions, window) & (positions >= 0)[None]
    rows, mask = q.reshape(B, kv, H // kv * T, D), jnp.tile(mask, (H // kv, 1))
    precision: Precision = "bfloat16" if keys.dtype == jnp.bfloat16 else "float32"
    return attention(rows, keys, values, mask[None, None], precision=precision).reshape(B, H, T, D)
