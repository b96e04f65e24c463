"""The fastest causal attention for each kind of device; `attention.py` is the reference."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt import flash, matmul, sharding
from jaxgpt.attention import attention, attention_mask
from jaxgpt.config import ModelConfig
from jaxgpt.matmul import to_compute_dtype
from jaxgpt.prng import Drop, mask_seeds

Kernel = Literal["reference", "blocked", "cudnn", "flash", "splash"]

BLOCKED = 256
"""Shortest context for "blocked" attention."""
BLOCK = 128
"""Queries per block of "blocked" attention; more in contexts longer than 16 blocks."""


def kernel(config: ModelConfig, T: int, dropped: bool) -> Kernel:
    """The kernel of `causal_attention` for contexts of T tokens, with or without dropout of the weights, which only
    "flash" and the kernels of plain JAX support."""
    if sharding.num_shards("time") == 1 and matmul.resolve(config.precision) == "bfloat16":
        platform, D = sharding.platform(), config.n_embd // config.n_head
        if platform == "gpu":
            allowed = not dropped and (not config.deterministic or repeatable("cudnn", T))
            if allowed and D % 8 == 0 and D <= 128 and T % 2 == 0:
                return "cudnn"
            if flash.supports(T, D) and not config.window:
                return "flash"
        if platform == "tpu" and D % 64 == 0 and T % 128 == 0 and not dropped and not config.window:
            return "splash"
    return "blocked" if T >= BLOCKED else "reference"


def repeatable(used: Kernel, T: int) -> bool:
    """Whether a kernel's gradients for contexts of T tokens are deterministic.

    The backward pass of cuDNN's attention adds in no fixed order: on an H100 its bits varied at 1,024 tokens, but not
    at 256 (docs/benchmarks/gpu.md).
    """
    return used != "cudnn" or T <= 256


def causal_attention(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, drop: Drop | None = None, used: Kernel | None = None
) -> jax.Array:
    """Attention of each token to itself and its past, or to the last `config.window` tokens: queries (B, H, T, D), keys
    and values (B, kv, T, D) -> (B, H, T, D).

    Args:
      drop: dropout of the weights.
      used: by default the fastest `kernel`.
    """
    H, T = q.shape[1:3]
    used = used or kernel(config, T, drop is not None)
    if used != "cudnn" or k.shape[1] % sharding.num_shards("width"):  # cuDNN shares KV heads, if each device has some
        k, v = repeat_kv(k, H), repeat_kv(v, H)
    if used == "cudnn":
        return sharding.by_device(partial(_cudnn, window=config.window))(q, k, v)
    if used == "flash":
        return sharding.by_device(_flash)(q, k, v, *_seeds(drop, *q.shape[:2]))
    if used == "splash":
        return sharding.by_device(_splash)(q, k, v)
    if used == "blocked":
        return blocked(config, q, k, v, drop)
    return _attend(config, q, k, v, jnp.arange(T), jnp.arange(T), drop)


def _attend(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, t: jax.Array, s: jax.Array, drop: Drop | None
) -> jax.Array:
    """Reference attention of queries (B, H, T, D) at positions t (T,) to keys and values (B, H, S, D) at s (S,)."""
    mask = attention_mask(t, s, config.window)[None, None]
    dropped = None if drop is None else lambda weights: drop(weights, t, s)
    return attention(q, k, v, mask, drop=dropped, precision=config.precision)


def repeat_kv(x: jax.Array, H: int) -> jax.Array:
    """(B, kv, T, D) -> (B, H, T, D), each head repeated H / kv times in a row."""
    return x if x.shape[1] == H else jnp.repeat(x, H // x.shape[1], axis=1)


def blocked(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, drop: Drop | None = None) -> jax.Array:
    """Causal attention of (B, H, T, D), one block of queries at a time. The (T, T) weights never exist all at once, and
    most of their masked half is never computed. The backward pass recomputes them block by block."""
    T = q.shape[2]
    if sharding.num_shards("time") > 1 and T % sharding.num_shards("time") == 0:
        return _blocked_sharded(config, q, k, v, drop)
    size = queries_per_block(T)

    @partial(jax.checkpoint, static_argnums=(3, 4))
    def block(q: jax.Array, k: jax.Array, v: jax.Array, start: int, first: int) -> jax.Array:
        return _attend(config, q, k, v, start + jnp.arange(q.shape[2]), first + jnp.arange(k.shape[2]), drop)

    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start - config.window + 1) if config.window else 0
        outs.append(block(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], start, first))
    return jnp.concatenate(outs, axis=2)


def queries_per_block(T: int) -> int:
    """Of "blocked" attention on one device."""
    return max(BLOCK, -(-T // 16))


def queries_per_shard_block(T: int) -> int:
    """Of "blocked" attention where each device has T of the queries: a divisor of T."""
    return next(size for size in range(min(BLOCK, T), 0, -1) if T % size == 0)


def _blocked_sharded(config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, drop: Drop | None) -> jax.Array:
    """`blocked` over n shards of the queries: each device loops over the blocks of its own shard."""
    B, H, T, D = q.shape
    n = sharding.num_shards("time")
    size = queries_per_shard_block(T // n)
    positions = jnp.arange(T).reshape(n, -1, size).swapaxes(0, 1)  # (blocks, n, size)
    blocks = jnp.moveaxis(q.reshape(B, H, n, -1, size, D), 3, 0)  # (blocks, B, H, n, size, D)

    @jax.checkpoint
    def block(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, positions = each
        q = sharding.constrain(q, "batch", "width", "time", None, None)
        t, s = positions.reshape(-1), jnp.arange(T)
        mask = attention_mask(t, s, config.window).reshape(n, size, T)

        def dropped(weights: jax.Array) -> jax.Array:
            return drop(weights.reshape(B, H, n * size, T), t, s).reshape(weights.shape) if drop else weights

        return attention(q, k[:, :, None], v[:, :, None], mask[None, None], drop=dropped, precision=config.precision)

    out = jax.lax.map(block, (blocks, positions))
    return jnp.moveaxis(out, 0, 3).reshape(B, H, T, D)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    q, k, v = (to_compute_dtype(x.swapaxes(1, 2), "bfloat16") for x in (q, k, v))
    local = (window - 1, 0) if window else None
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
    return out.swapaxes(1, 2)


def _seeds(drop: Drop | None, B: int, H: int) -> list[jax.Array]:
    """Dropout masks of B sequences and H heads as arguments of `_flash`: one array (B, H, 4), or none."""
    if drop is None:
        return []
    seeds = mask_seeds(drop.key, drop.keep, jnp.arange(B * H).reshape(B, H))
    return [jnp.stack(jnp.broadcast_arrays(*seeds), axis=-1)]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
    q, k, v = (to_compute_dtype(x, "bfloat16") for x in (q, k, v))
    return flash.flash_attention(q, k, v, seeds)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """JAX's splash attention for TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    H, T = q.shape[1:3]
    mask = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(H)])
    run = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    q, k, v = (to_compute_dtype(x, "bfloat16") for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(run)(q, k, v)
