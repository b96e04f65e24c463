"""The loss of every token of a text, and what the model would rather have read."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig
from jaxgpt.data import Ids
from jaxgpt.diagnostics.losses import exact


class Scores(NamedTuple):
    """Of the N - 1 tokens after the first of a text, in order."""

    losses: Any  # (N - 1,) nats: -log of the probability of the token that stands there
    ids: Any  # (N - 1, k) the most likely tokens there, the likeliest first
    probabilities: Any  # (N - 1, k) of these


def token_scores(
    config: ModelConfig, params: nn.Params, tokens: Ids, k: int = 5, stride: int = 0, batch_size: int = 16
) -> Scores:
    """The loss of each token of a text (N,) given those before it, in float32, and the k likeliest in its place.

    Args:
      k: up to V.
      stride: how far windows of block_size are apart. 0: block_size, the windows of `training.evaluate`, whose loss the
        mean then is; 1: each token sees all of the block_size tokens before it, at block_size times the work.

    Raises:
      ValueError: fewer than 2 tokens, or k or stride is out of range.
    """
    N, T = len(tokens), min(config.block_size, len(tokens) - 1)
    stride = stride or T
    if N < 2:
        raise ValueError(f"{N} tokens have none to predict, expected at least 2")
    if not 1 <= k <= config.vocab_size:
        raise ValueError(f"k is {k}, expected 1 to {config.vocab_size}, the vocabulary")
    if not 1 <= stride <= T:
        raise ValueError(f"stride is {stride}, expected 1 to {T}, the tokens of a window")
    starts = np.minimum(np.arange(0, N - 1 - T + stride, stride), N - 1 - T)
    places = starts[:, None] + np.arange(T)[None]  # (windows, T) of the token before the one that is scored
    B = min(batch_size, len(starts))
    rows = np.pad(places, ((0, -len(starts) % B), (0, 0)))  # a last batch of the same shape, so that one program serves
    parts = [_scores(exact(config), k, params, tokens[part], tokens[part + 1]) for part in rows.reshape(-1, B, T)]
    # Each token is scored where it stands furthest from the start of its window: by the first window that reaches it.
    first = np.unique(places, return_index=True)[1]
    return Scores(*(np.concatenate(each).reshape(-1, *each[0].shape[2:])[first] for each in zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=(0, 1))
def _scores(config: ModelConfig, k: int, params: nn.Params, inputs: jax.Array, targets: jax.Array) -> Scores:
    with jax.default_matmul_precision("highest"):
        logits = nn.forward(config, params, inputs.astype(jnp.int32))
    chances, ids = jax.lax.top_k(jax.nn.softmax(logits), k)
    return Scores(nn.token_losses(logits, targets.astype(jnp.int32)), ids, chances)
