"""Which windows of the training text a prediction owes to: products of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxgpt.diagnostics.gradients import per_example
from jaxgpt.diagnostics.losses import Loss


def influence(loss: Loss, params: Any, train: Any, val: Any, chunk: int = 8) -> jax.Array:
    """The product of the gradient of each validation example with that of each training example, (N_val, N_train).

    To first order, a step of plain gradient descent with learning rate r on a training example lowers the loss of a
    validation example by r times it; below zero it raises it. This is a term of TracIn (Pruthi et al. 2020,
    arXiv:2002.08484), whose influence is the sum of these over checkpoints, each times its learning rate. Units: nats
    per token, per unit of learning rate. The steps of AdamW or Muon are no plain ones: it ranks, it does not foretell.

    Memory: the gradients of all validation examples, and of `chunk` training examples.
    """
    wanted = per_example(loss, params, val, lambda gradient: ravel_pytree(gradient)[0], chunk)  # (N_val, P)

    def products(gradient: Any) -> jax.Array:
        return jnp.matmul(wanted, ravel_pytree(gradient)[0], precision="highest")

    return per_example(loss, params, train, products, chunk).T
