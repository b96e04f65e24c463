"""The Flax layers that every block is made of, with nanoGPT's initialisation, epsilon and dropout."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import matmul as numerics
from jaxgpt import sharding
from jaxgpt.config import ModelConfig, off


class Linear(nn.Module):
    """A linear layer (..., K) -> (..., N): kernel (K, N) of normal(stddev), or of zeros, and bias (N,) of zeros."""

    config: ModelConfig
    features: int
    stddev: float = 0.02
    use_bias: bool = False

    @nn.compact
    def weights(self, K: int) -> tuple[jax.Array, jax.Array | None]:
        """(kernel, bias or None) for inputs of K channels."""
        init = nn.initializers.normal(self.stddev) if self.stddev else nn.initializers.zeros
        kernel = self.param("kernel", init, (K, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return joined(x, [self])[0]


def joined(x: jax.Array, layers: Sequence[Linear]) -> list[jax.Array]:
    """Each layer's result for the same `x`, as one product: side by side, kernels make fuller use of a processor."""
    kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers), strict=True)
    precision = layers[0].config.precision
    if sharding.parts("width") > 1:  # each kernel is split by its own columns
        outs = [numerics.dot(x, kernel, precision) for kernel in kernels]
    else:
        ends = [sum(layer.features for layer in layers[: i + 1]) for i in range(len(layers) - 1)]
        outs = jnp.split(numerics.dot(x, jnp.concatenate(kernels, axis=1), precision), ends, axis=-1)
    return [
        out if bias is None else out + bias.reshape((1,) * (out.ndim - 1) + (-1,))
        for out, bias in zip(outs, biases, strict=True)
    ]


def dense(config: ModelConfig, features: int, name: str) -> Linear:
    """A linear layer inside a block, normal(0.02)."""
    return Linear(config, features, use_bias=config.bias, name=name)


def residual(config: ModelConfig, name: str) -> Linear:
    """A linear layer that writes into the residual stream. It starts smaller by sqrt(2 L), as in GPT-2, for 2 L of them
    add up; or at zero."""
    stddev = 0.0 if config.zero_init else 0.02 * (2 * config.n_layer) ** -0.5
    return Linear(config, config.n_embd, stddev, config.bias, name=name)


def embed(rows: int, features: int, name: str, stddev: float = 0.02) -> nn.Embed:
    """A table (rows, features), normal(stddev)."""
    init = nn.initializers.normal(stddev) if stddev else nn.initializers.zeros
    return nn.Embed(rows, features, embedding_init=init, name=name)


def norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    """(..., C) -> (..., C): RMSNorm, or LayerNorm with epsilon 1e-5 as in GPT-2 and PyTorch."""
    if config.norm == "rms":
        return numerics.rms_norm
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, use_fast_variance=False, name=name)


class Dropout(nn.Module):
    """Zero each entry with probability `rate`, which JAX may trace, and scale up the others."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        keep = 1.0 - self.rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


def drops(module: nn.Module) -> bool:
    """Whether a module of a model drops activations: it has a rate, and a dropout key was given to `apply`."""
    return module.has_rng("dropout") and not off(module.config.dropout)


def dropout(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array]:
    """Dropout at the rate of `module.config` where the module `drops`; else the identity."""
    return Dropout(module.config.dropout, name=name) if drops(module) else lambda x: x
