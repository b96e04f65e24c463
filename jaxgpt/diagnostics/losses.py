"""The loss as a function of (parameters, batch), which the derivatives of this room are taken of."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig

Loss = Callable[[Any, Any], jax.Array]
"""(params, batch) -> (), a mean over the examples of the batch: any pytrees, each leaf of a batch (B, ...)."""


def exact(config: ModelConfig) -> ModelConfig:
    """`config` as diagnoses compute it: with products of float32, without dropout, nothing left to be recomputed.

    A bfloat16 product brings its own backward pass (`jax.custom_vjp`): it has no derivative along a line, and its
    rounding shows in a product with the Hessian. The fused kernels of attention have no second derivative at all.
    """
    return replace(config, precision="float32", dropout=0.0, remat="none")


def mean_loss(config: ModelConfig, chunk: int = 16) -> Loss:
    """The loss of a model in nats per token, of params and a batch of (B, T) inputs and targets.

    Up to `chunk` windows at a time: of more, the backward pass and derivatives of it compute each part again, so that
    memory does not grow with B.
    """
    config = exact(config)

    def part(params: nn.Params, batch: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # accelerators round the operands of float32 products too
            return nn.losses(config, params, batch.inputs, batch.targets).mean()

    def loss(params: nn.Params, batch: Any) -> jax.Array:
        B = batch.inputs.shape[0]
        parts = next(n for n in range(1, B + 1) if B % n == 0 and B // n <= chunk)
        if parts == 1:
            return part(params, batch)
        split = jax.tree.map(lambda x: x.reshape(parts, B // parts, *x.shape[1:]), batch)
        return jax.lax.map(lambda each: jax.checkpoint(part)(params, each), split).mean()

    return loss
