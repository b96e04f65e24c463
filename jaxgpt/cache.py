"""What a model keeps of the tokens that it has read, so that one more costs the work of one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt.attention import attention, sees
from jaxgpt.config import ModelConfig
from jaxgpt.matmul import Precision, in_32_bits, operand


class Cache(NamedTuple):
    """What `extend` needs to know of the tokens before."""

    blocks: dict[str, Any]  # the keys and values of each block, (B, kv, S, D): Flax's collection "cache"
    read: jax.Array | int  # () how many; the number 0 where a cache is known to be empty while compiling
    last: jax.Array  # (B,) int32: the last token read


@in_32_bits
def init_cache(config: ModelConfig, B: int, size: int) -> Cache:
    """An empty cache for B sequences, with S = `size` slots in each block.

    The slots are a ring: the token at position p is in slot p % S, until another takes its place. Keys are kept as
    attention uses them, normed and rotated by their position, in the dtype of the operands of products; on CPUs in
    float32, for XLA converts bfloat16 there, all slots for each token. A bigram, which looks back on nothing, keeps
    nothing.
    """
    blocks: dict[str, Any] = {}
    precision = "float32" if jax.default_backend() == "cpu" else config.precision
    if config.kind == "gpt":
        shape = (B, config.n_kv_head or config.n_head, size, config.n_embd // config.n_head)
        for i in range(config.n_layer):
            keys, values = (operand(jnp.zeros(shape), precision) for _ in range(2))
            blocks[f"h_{i}"] = {"attn": {"keys": keys, "values": values}}
    return Cache(blocks, 0, jnp.zeros(B, jnp.int32))


def remember(slots: jax.Array, x: jax.Array, start: jax.Array | int) -> jax.Array:
    """`slots` (B, kv, S, D) with `x` (B, kv, T, D), of positions start, start + 1, ..., in their places."""
    T, S = x.shape[2], slots.shape[2]
    x = x.astype(slots.dtype)
    if T == 1 or isinstance(start, int):  # not over the end of the ring: written where it is, without a copy
        return lax.dynamic_update_slice_in_dim(slots, x, start % S, axis=2)
    return slots.at[:, :, (start + jnp.arange(T)) % S].set(x)


def look_back(
    config: ModelConfig, q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array | int
) -> jax.Array:
    """`attention` of T queries at positions start, start + 1, ... to the slots (B, kv, S, D) that hold their past.

    Each sees the last block_size tokens (or `config.window`), itself among them. The keys and values of shared heads
    are not repeated: the queries that share one are rows of the same product.

    Args:
      q: (B, H, T, D).

    Returns:
      (B, H, T, D).
    """
    B, H, T, D = q.shape
    kv, S = keys.shape[1:3]
    newest = start + T - 1
    places = newest - (newest - jnp.arange(S)) % S  # (S,) the position in each slot; below 0 where nothing was written
    reach = min(config.window or config.block_size, config.block_size)
    mask = sees(start + jnp.arange(T), places, reach) & (places >= 0)[None]
    rows, mask = q.reshape(B, kv, H // kv * T, D), jnp.tile(mask, (H // kv, 1))
    precision: Precision = "bfloat16" if keys.dtype == jnp.bfloat16 else "float32"
    out = attention(rows, keys, values, mask[None, None], precision=precision)
    return out.reshape(B, H, T, D)
