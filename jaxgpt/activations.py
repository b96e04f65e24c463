"""GELU and LayerNorm in float32, with custom backward passes that save only the input.

By default XLA saves several arrays for each, or computes the error function twice. `grad`, `vmap`, `jvp` of `grad` and
`grad` of `grad` work. Plain `jvp` does not: the slope of a loss along v is the dot product of its gradient and v.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxgpt.sharding import varying_alike


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, tanh: bool = False) -> jax.Array:
    """GELU (Hendrycks and Gimpel 2016), x Phi(x), in the dtype of `x`; with `tanh`, GPT-2's approximation of Phi."""
    return _gelu_forward(x, tanh)[0]


def _gelu_forward(x: jax.Array, tanh: bool) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide, tanh)).astype(x.dtype), x


def _normal_cdf(x: jax.Array, tanh: bool) -> jax.Array:
    if tanh:
        return 0.5 * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
    return 0.5 * (1 + lax.erf(x * 0.5**0.5))


def _gelu_backward(tanh: bool, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    phi = _normal_cdf(wide, tanh)
    if tanh:  # the derivative of tanh is 1 - tanh², and 1 - (2 phi - 1)² = 4 phi (1 - phi)
        density = 2 * phi * (1 - phi) * (2 / jnp.pi) ** 0.5 * (1 + 3 * 0.044715 * wide * wide)
    else:
        density = jnp.exp(-0.5 * wide * wide) * (2 * jnp.pi) ** -0.5
    return ((g.astype(jnp.float32) * (phi + wide * density)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm (Ba et al. 2016) without a bias: (..., C) and a scale (C,) -> (..., C) float32. Epsilon is 1e-5, as in
    GPT-2 and PyTorch."""
    return _layer_norm(*varying_alike(x, scale))


@jax.custom_vjp
def _layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return _layer_norm_forward(x, scale)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + 1e-5)
    return centered * inverse * per_channel(scale, x), (x, scale)


def per_channel(w: jax.Array, x: jax.Array) -> jax.Array:
    """Reshape (C,) to broadcast with `x` (..., C)."""
    return w.reshape((1,) * (x.ndim - 1) + (-1,))


def _layer_norm_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    # In one pass: XLA for GPUs then adds up the gradient of the scale without an array of its terms. The rounding of
    # this difference grows with (mean / std)^2.
    variance = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean, 0)
    inverse = lax.rsqrt(variance + 1e-5)
    normal = (wide - mean) * inverse
    d = g * per_channel(scale, x)
    dx = inverse * (d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (g * normal).sum(tuple(range(g.ndim - 1))).astype(scale.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
