"""Causal FlashAttention for GPUs, with dropout of the weights, as Pallas kernels.

The dropout masks are those of `prng.keep_mask`, recomputed block by block in both passes. No two programs add to the
same gradient, so gradients are deterministic. Forward: Dao 2023 (https://arxiv.org/abs/2307.08691), section 3.

Pallas lowers them to Triton, which jax 0.12 deprecates for Mosaic; that needs a kernel for each generation of GPUs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxgpt import prng, sharding

BLOCK = 64
"""Queries, or keys, of a program."""
LOG2_E = 1.4426950408889634


def supports(T: int, D: int) -> bool:
    """Whether the kernels run for contexts of T tokens and heads of D channels."""
    return T % BLOCK == 0 and D in (16, 32, 64, 128)


@jax.custom_vjp
def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None = None) -> jax.Array:
    """Causal attention: queries, keys and values (B, H, T, D) bfloat16 -> (B, H, T, D) bfloat16.

    `grad` and `vmap` work; derivatives of the gradient do not.

    Args:
      seeds: of the dropout masks, (B, H, 4) uint32, from `prng.mask_seeds`. None: no dropout.
    """
    return _flash_forward(q, k, v, seeds)[0]


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, seeds: jax.Array | None) -> tuple[jax.Array, Any]:
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (B, T, H, D), as matmuls write and read them
    B, T, H, _ = q.shape
    sizes = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    out, normalizers = _call(_forward_kernel, [q], [k, v], seeds, [q, sizes])
    return out.swapaxes(1, 2), (q, k, v, seeds, out, normalizers)


def _flash_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, seeds, out, normalizers = saved
    g = g.swapaxes(1, 2)
    sums = jnp.einsum("bthd,bthd->bht", g, out, preferred_element_type=jnp.float32)
    dq, dk, dv = _call(_backward_kernel, [], [q, k, v, g, normalizers, sums], seeds, [q, k, v])
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2), None


flash_attention.defvjp(_flash_forward, _flash_backward)


def _call(kernel: Any, blocks: list[Any], wholes: list[Any], seeds: jax.Array | None, outputs: list[Any]) -> Any:
    """Run program (i, b * H + h) of `kernel` on block i of `blocks` and on `wholes`, for block i of `outputs`: arrays
    (B, T, H, D) or (B, H, T) of which it sees sequence b and head h, (T, D) or (T,)."""
    from jax.experimental.pallas import triton

    def spec(x: Any, size: int) -> pl.BlockSpec:
        def index(i: jax.Array, n: jax.Array) -> tuple[Any, ...]:
            b, h, place = n // H, n % H, i if size < T else 0
            return (b, place, h, 0) if len(x.shape) == 4 else (b, h, place)

        return pl.BlockSpec((None, size, None, x.shape[-1]) if len(x.shape) == 4 else (None, None, size), index)

    B, T, H, _ = wholes[0].shape
    specs = [spec(x, BLOCK) for x in blocks] + [spec(x, T) for x in wholes]
    if seeds is not None:
        specs.append(pl.BlockSpec((None, None, 4), lambda i, n: (n // H, n % H, 0)))
    return pl.pallas_call(
        partial(kernel, dropped=seeds is not None),
        grid=(T // BLOCK, B * H),  # two dimensions, so that `vmap` may add the third that GPUs have
        in_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        out_specs=[spec(x, BLOCK) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=sharding.platform() == "cpu",
    )(*blocks, *wholes, *([] if seeds is None else [seeds]))


def _dropout(seeds_ref: Any) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Dropout of a block of weights (T, S), given its row and column indices."""
    seeds = [seeds_ref[i] for i in range(4)]
    scale = 2.0**24 / seeds[3].astype(jnp.float32)

    def drop(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        return jnp.where(prng.kept(seeds, rows[:, None], columns[None, :]), x * scale, 0.0)

    return drop


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A matmul in bfloat16 that sums over these dimensions, accumulated in float32."""
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Masked scores of queries (T, D) and keys (S, D), to base 2: (T, S)."""
    scores = _dot(q, k, (1, 1)) * (q.shape[-1] ** -0.5 * LOG2_E)
    return jnp.where(rows[:, None] >= columns[None, :], scores, -1e30)


def _indices(i: jax.Array) -> jax.Array:
    return i * BLOCK + lax.iota(jnp.int32, BLOCK)


def _slice(i: jax.Array) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, dropped: bool) -> None:
    """The outputs of a block of queries, and the base 2 logarithms of their normalizers."""
    *seeds_ref, out_ref, normalizers_ref = refs
    drop = _dropout(*seeds_ref) if dropped else lambda x, rows, columns: x
    q, i = q_ref[...], pl.program_id(0)

    def add(j: jax.Array, carry: Any) -> Any:
        out, largest, total = carry
        s = _scores(q, k_ref[_slice(j), :], _indices(i), _indices(j))
        new = jnp.maximum(largest, s.max(axis=1))
        weights, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(largest - new)
        out = out * shrink[:, None] + _dot(drop(weights, _indices(i), _indices(j)), v_ref[_slice(j), :], (1, 0))
        return out, new, total * shrink + weights.sum(axis=1)

    zero = jnp.zeros(q.shape, jnp.float32)
    start = zero, jnp.full(BLOCK, -1e30, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    out, largest, total = lax.fori_loop(0, i + 1, add, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    normalizers_ref[...] = largest + jnp.log2(total)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, normalizers_ref: Any, sums_ref: Any, *refs: Any, dropped: bool
) -> None:
    """The gradients of a block of keys and values, and of a block of queries."""
    *seeds_ref, dq_ref, dk_ref, dv_ref = refs
    drop = _dropout(*seeds_ref) if dropped else lambda x, rows, columns: x
    block, D = pl.program_id(0), q_ref.shape[-1]
    zero, scale = jnp.zeros((BLOCK, D), jnp.float32), D**-0.5

    def gradients(i: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the scores of queries i and keys j, and the weights after dropout."""
        rows, columns = _indices(i), _indices(j)
        scores = _scores(q_ref[_slice(i), :], k_ref[_slice(j), :], rows, columns)
        weights = jnp.exp2(scores - normalizers_ref[_slice(i)][:, None])
        d = drop(_dot(g_ref[_slice(i), :], v_ref[_slice(j), :], (1, 1)), rows, columns)
        return weights * (d - sums_ref[_slice(i)][:, None]) * scale, drop(weights, rows, columns)

    def add_queries(i: jax.Array, carry: Any) -> Any:
        dk, dv = carry
        d, weights = gradients(i, block)
        return dk + _dot(d, q_ref[_slice(i), :], (0, 0)), dv + _dot(weights, g_ref[_slice(i), :], (0, 0))

    def add_keys(j: jax.Array, dq: jax.Array) -> jax.Array:
        return dq + _dot(gradients(block, j)[0], k_ref[_slice(j), :], (1, 0))

    dk, dv = lax.fori_loop(block, q_ref.shape[0] // BLOCK, add_queries, (zero, zero))
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
    dq_ref[...] = lax.fori_loop(0, block + 1, add_keys, zero).astype(dq_ref.dtype)
