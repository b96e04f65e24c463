"""Random keys whose stream depends only on the seed, and dropout masks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


def key(seed: jax.Array | int) -> jax.Array:
    """`jax.random.key(seed)` of JAX's default generator and seed offset, whatever the flags. The seed, 0 to 2**32 - 1,
    may be traced. Commands also set JAX_THREEFRY_PARTITIONABLE, which changes this generator's stream (`cli.main`)."""
    return jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32), impl="threefry2x32")


def keep_mask(
    key: jax.Array, keep: jax.Array | float, shape: tuple[int, ...], rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """The dropout mask of an array (*shape, T, S): bool, each entry True with probability `keep`, in steps of 2**-24.

    An entry is a hash of the key, its index in `shape`, its row in `rows` (T,) and its column in `columns` (S,), so the
    mask of one block can be computed alone. It is cheap enough to recompute: 3 million entries take 2 ms on two CPU
    cores, but 58 ms with `jax.random.bernoulli`, whose bits are better than dropout needs.
    """
    first = jnp.arange(math.prod(shape))[:, None, None]
    bits = kept(mask_seeds(key, keep, first), rows[None, :, None], columns[None, None])
    return bits.reshape(*shape, len(rows), len(columns))


class Drop(NamedTuple):
    """Dropout of an array block by block: each entry is kept with probability `keep`."""

    key: jax.Array
    keep: jax.Array | float

    def __call__(self, x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """A block (..., T, S) of the array, its row indices (T,) and column indices (S,) -> the block after dropout."""
        mask = keep_mask(self.key, self.keep, x.shape[:-2], rows, columns)
        return jnp.where(mask, x / jnp.asarray(self.keep, x.dtype), jnp.zeros_like(x))


def mask_seeds(key: jax.Array, keep: jax.Array | float, indices: jax.Array) -> list[jax.Array]:
    """The first argument of `kept`, four arrays of uint32. `indices` are those of the leading dimensions, flattened."""
    high, low, *_ = jax.random.key_data(key)  # a key of rbg has two more words
    first, row, column = (_mix(high ^ _mix(low + jnp.uint32(0x9E3779B9 * i % 2**32))) for i in (1, 2, 3))
    return [_mix(indices.astype(jnp.uint32) ^ first), row, column, jnp.asarray(keep * 2**24).astype(jnp.uint32)]


def kept(seeds: Sequence[jax.Array], rows: jax.Array, columns: jax.Array) -> jax.Array:
    """A block of a dropout mask, True where an entry is kept: `mask_seeds` and indices, all broadcast together."""
    first, row_seed, column_seed, threshold = seeds
    row, column = _mix(rows.astype(jnp.uint32) ^ row_seed), _mix(columns.astype(jnp.uint32) ^ column_seed)
    return _mix((first ^ row) ^ column) >> 8 < threshold


def _mix(x: jax.Array) -> jax.Array:
    """A bijective 32-bit hash: lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
