"""Matmuls in the compute dtype, in forms that are fast on each kind of device.

Parameters, sums and gradients are float32. The precision of a model is the dtype of its matmuls: "float32", "bfloat16"
with float32 accumulation, or "auto", which `resolve` turns into one of the two.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt import machine, sharding

Precision = Literal["auto", "float32", "bfloat16"]
P = ParamSpec("P")
R = TypeVar("R")
NARROW = {"float64": jnp.float32, "int64": jnp.int32, "uint64": jnp.uint32}


def in_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` ignore JAX_ENABLE_X64, eager or traced: 64-bit arguments become 32-bit, and it creates no 64-bit
    arrays."""

    def narrowed(x: Any) -> Any:
        dtype = NARROW.get(str(getattr(x, "dtype", "")))
        return x if dtype is None else x.astype(dtype)

    @wraps(function)
    def narrow(*args: P.args, **kwargs: P.kwargs) -> R:
        if not jax.config.values["jax_enable_x64"]:
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            args, kwargs = jax.tree.map(narrowed, (args, kwargs))
            return function(*args, **kwargs)

    return narrow


def resolve(precision: Precision) -> Precision:
    """Replace "auto" by "bfloat16" on TPUs, on GPUs of compute capability 8 and up, and on CPUs with amx_bf16 or
    avx512_bf16; by "float32" elsewhere. A fixed table, so that every start on a machine decides alike."""
    if precision != "auto":
        return precision
    platform = sharding.platform()
    if platform == "gpu":  # "8.0", or "gfx90a" on AMD; missing if a plan is for GPUs that are not attached
        capability = str(getattr(jax.local_devices()[0], "compute_capability", "8"))
        fast = not capability.startswith("gfx") and float(capability) >= 8
    elif platform == "cpu":
        fast = not {"amx_bf16", "avx512_bf16"}.isdisjoint(machine.cpu_info().split())
    else:
        fast = platform == "tpu"
    return "bfloat16" if fast else "float32"


def to_compute_dtype(x: jax.Array, precision: Precision) -> jax.Array:
    """`x` in the compute dtype."""
    return x.astype(jnp.bfloat16) if resolve(precision) == "bfloat16" else x


def matmul(x: jax.Array, y: jax.Array, precision: Precision = "float32") -> jax.Array:
    """Matmul of two activations: (..., M, K) @ (..., K, N) -> (..., M, N) float32."""
    x, y = to_compute_dtype(x, precision), to_compute_dtype(y, precision)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def dot(x: jax.Array, w: jax.Array, precision: Precision = "float32") -> jax.Array:
    """Matmul of activations and a kernel: (..., K) @ (K, N) -> (..., N), with x reshaped to two dimensions.

    The result is float32, but bfloat16 on accelerators in that precision, which halves the memory traffic.
    """
    if x.ndim == 3 and sharding.num_shards("time") > 1:  # B and T, both sharded, cannot be merged
        out = lax.dot_general(to_compute_dtype(x, precision), to_compute_dtype(w, precision), (((2,), (0,)), ((), ())))
        return out.astype(jnp.float32) if sharding.platform() == "cpu" else out
    rows = x.reshape(-1, x.shape[-1])
    out = rows @ w if resolve(precision) == "float32" else _dot_bfloat16(*sharding.varying_alike(rows, w))
    return out.reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _dot_bfloat16(x: jax.Array, w: jax.Array) -> jax.Array:
    return _dot_forward(x, w)[0]


def _dot_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _matmul_bfloat16(*low), (*low, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))


def _dot_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like_x, like_w = saved
    g = g.astype(jnp.bfloat16)
    if sharding.platform() != "cpu":  # else XLA computes it twice, once for each matmul
        g = lax.optimization_barrier(g)
    dx = _matmul_bfloat16(g, transposed(w))
    if x.shape[1] <= g.shape[1]:  # transpose the smaller matrix
        dw = _matmul_bfloat16(transposed(x), g, jnp.float32)
    else:
        dw = transposed(_matmul_bfloat16(transposed(g), x, jnp.float32))
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


_dot_bfloat16.defvjp(_dot_forward, _dot_backward)


def _matmul_bfloat16(a: jax.Array, b: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """A matmul of bfloat16 matrices, accumulated in float32; the result is float32 on CPUs, else `dtype`."""
    if sharding.platform() != "cpu":
        return lax.dot(a, b, preferred_element_type=dtype)
    # Without the barrier, XLA folds a transpose of the result (as of a tied head's gradient) into the matmul, and then
    # may have no kernel for it: "UNIMPLEMENTED: ... BF16 x BF16 = F32".
    return lax.optimization_barrier(lax.dot(a, b, preferred_element_type=jnp.float32))


def transposed(x: jax.Array) -> jax.Array:
    """(..., M, N) -> (..., N, M), as an argument of a matmul.

    XLA's CPU backend folds a plain transpose into the matmul, which then runs at half the speed without its fast
    kernels. It does not recognize this detour through a third dimension.
    """
    *batch, M, N = x.shape
    pieces = math.gcd(N, 4)
    if sharding.platform() != "cpu" or pieces == 1:
        return x.swapaxes(-1, -2)
    return jnp.moveaxis(x.reshape(*batch, M, pieces, N // pieces), -3, -1).reshape(*batch, N, M)
