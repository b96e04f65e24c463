"""The arithmetic under the layers: which dtypes products and norms use, and the paths that are fast.

Parameters, sums and gradients are float32. A precision says what the operands of products are: "float32", or
"bfloat16", whose products are added up in float32; "auto" is the one of these that is faster here (`resolve`).
"""

import math
import statistics
import time
import warnings
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgpt import sharding

Precision = Literal["auto", "float32", "bfloat16"]

FASTER = 1.25
"""How many times the rate of float32 makes bfloat16 worth its rounding."""


@lru_cache
def resolve(precision: Precision) -> Precision:
    """What "auto" means here, "float32" or "bfloat16"; any other precision is itself.

    TPUs, and GPUs from compute capability 8 on, have units for bfloat16. A CPU is asked: a small product in both, some
    milliseconds once a process.
    """
    if precision != "auto":
        return precision
    if sharding.platform() != "cpu":
        capability = getattr(jax.local_devices()[0], "compute_capability", "8")
        return "bfloat16" if float(capability) >= 8 else "float32"
    with jax.ensure_compile_time_eval():
        try:
            float32, bfloat16 = _seconds()
        except (RuntimeError, NotImplementedError) as error:
            warnings.warn(f"products of bfloat16 do not run here, float32 is used: {error}", stacklevel=2)
            return "float32"
    return "bfloat16" if float32 > FASTER * bfloat16 else "float32"


def _seconds() -> tuple[float, float]:
    """The median time of a product in float32 and in bfloat16, of ten in turn: what disturbs one disturbs the other. Of
    up to a hundred while neither is clearly ahead, as on a machine that does other work. (The least times will not do:
    beside other work one of the two may find both cores free, and the other never.)"""
    x, w, head = (jax.device_put(np.ones(shape, np.float32)) for shape in ((512, 256), (256, 1024), (65, 256)))
    # An odd size, forward and backward: XLA has refused some of these.
    odd = jax.jit(jax.grad(lambda x, head: dot(x, head.T, "bfloat16").sum(), (0, 1)))
    jax.block_until_ready(odd(x, head))
    products = [jax.jit(partial(dot, precision=precision)) for precision in ("float32", "bfloat16")]
    jax.block_until_ready([product(x, w) for product in products])  # compiled
    times: list[list[float]] = [[], []]
    while len(times[1]) < 100:
        for product, seconds in zip(products, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(product(x, w))
            seconds.append(time.perf_counter() - began)
        float32, bfloat16 = map(statistics.median, times)
        if len(times[1]) >= 10 and not 1 / FASTER < float32 / bfloat16 < FASTER**2:
            break
    return float32, bfloat16


def operand(x: jax.Array, precision: Precision) -> jax.Array:
    """`x` as an operand of a product."""
    return x.astype(jnp.bfloat16) if resolve(precision) == "bfloat16" else x


def dot(x: jax.Array, w: jax.Array, precision: Precision = "float32") -> jax.Array:
    """(..., K) @ (K, N) -> (..., N), as one two-dimensional product.

    The result is float32, on accelerators in "bfloat16" of that type, which halves what is written.
    """
    if x.ndim == 3 and sharding.parts("time") > 1:  # (B, T) split both ways are no rows of one matrix
        return _dot_split(x, w, precision)
    rows = x.reshape(-1, x.shape[-1])
    product = rows @ w if resolve(precision) == "float32" else _dot_bfloat16(rows, w)
    return product.reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _dot_bfloat16(x: jax.Array, w: jax.Array) -> jax.Array:
    return _product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _dot_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _product(*low), (*low, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))


def _dot_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like_x, like_w = saved
    g = g.astype(jnp.bfloat16)
    dx = _product(g, transposed(w))
    # Of the two ways to the same product, the one that transposes the smaller operand.
    if x.shape[1] <= g.shape[1]:
        dw = _product(transposed(x), g, jnp.float32)
    else:
        dw = transposed(_product(transposed(g), x, jnp.float32))
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


_dot_bfloat16.defvjp(_dot_forward, _dot_backward)


def _dot_split(x: jax.Array, w: jax.Array, precision: Precision) -> jax.Array:
    x, w = operand(x, precision), operand(w, precision)
    out = lax.dot_general(x, w, (((2,), (0,)), ((), ())))
    return out.astype(jnp.float32) if sharding.platform() == "cpu" else out


def matmul(x: jax.Array, y: jax.Array, precision: Precision = "float32") -> jax.Array:
    """`x @ y` in float32, (..., M, K) @ (..., K, N) -> (..., M, N), for products that are no layer's."""
    x, y = operand(x, precision), operand(y, precision)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _product(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """A product of bfloat16 operands, added up in float32."""
    cpu = sharding.platform() == "cpu"
    return lax.dot(a, b, preferred_element_type=jnp.float32 if cpu else dtype or jnp.bfloat16)


def transposed(x: jax.Array) -> jax.Array:
    """(..., a, b) -> (..., b, a), for a product.

    XLA's CPU backend folds a plain transpose into the product and then misses its fast kernels, half the speed. It does
    not see through this one, by way of a third dimension.
    """
    *batch, a, b = x.shape
    pieces = math.gcd(b, 4)
    if sharding.platform() != "cpu" or pieces == 1:
        return x.swapaxes(-1, -2)
    return jnp.moveaxis(x.reshape(*batch, a, pieces, b // pieces), -3, -1).reshape(*batch, b, a)


def softmax(x: jax.Array) -> jax.Array:
    """Softmax over the last axis in float32, (..., T) to (..., T)."""
    return jax.nn.softmax(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array) -> jax.Array:
    """(..., C) divided by the root of its mean square, in float32: RMSNorm (Zhang and Sennrich 2019) without a gain."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """`cap * tanh(x / cap)`, which stays within (-cap, cap): the logit soft-capping of Gemma 2 (2024)."""
    return cap * jnp.tanh(x / cap)
