"""The Flax layers that every block is made of, with nanoGPT's initialisation, epsilon and dropout."""

from collections.abc import Callable

import flax.linen as nn
import jax

from jaxgpt.config import ModelConfig
from jaxgpt.nn import numerics


def dense(config: ModelConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    """A linear layer (..., K) -> (..., features), normal(0.02) kernel, zero bias.

    A layer that writes into the residual stream starts smaller, by sqrt(2 L), as in GPT-2: 2 L layers add up.
    """
    stddev = 0.02 * (2 * config.n_layer) ** -0.5 if residual else 0.02
    return nn.Dense(
        features,
        use_bias=config.bias,
        kernel_init=nn.initializers.normal(stddev),
        dot_general=numerics.dot_general,
        name=name,
    )


def embed(rows: int, features: int, name: str) -> nn.Embed:
    """A table (rows, features), normal(0.02)."""
    return nn.Embed(rows, features, embedding_init=nn.initializers.normal(0.02), name=name)


def layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    """(..., C) -> (..., C), epsilon 1e-5 as in GPT-2 and PyTorch."""
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, use_fast_variance=False, name=name)


def dropout(module: nn.Module, name: str) -> Callable[[jax.Array], jax.Array]:
    """Dropout at the rate of `module.config`, when a dropout key was given to `apply`; else the identity."""
    rate: float = module.config.dropout
    return nn.Dropout(rate, deterministic=not module.has_rng("dropout"), name=name)
