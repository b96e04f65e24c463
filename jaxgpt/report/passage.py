"""A passage of text as the model reads it: what each token cost, and what was expected in its place."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig
from jaxgpt.tokenizer import Ids


@dataclass(frozen=True)
class Passage:
    """N tokens that follow each other."""

    ids: Ids  # (N,)
    losses: NDArray[np.float32]  # (N,) nats
    likely: Ids  # (N, K) the most likely tokens in the place of each, the likeliest first
    chances: NDArray[np.float32]  # (N, K) their probabilities


def read(config: ModelConfig, params: nn.Params, tokens: Ids, n: int, k: int, n_ids: int) -> Passage:
    """The first tokens of `tokens` (M,) that have some context: about `n`, fewer where M is small.

    Windows of block_size overlap by half, and the later half of each counts: every token is predicted from at least
    block_size // 2 before it.

    Args:
      k: how many alternatives to tell of each.
      n_ids: ids from here on stand for nothing and are left out.

    Raises:
      ValueError: fewer than block_size + 1 tokens.
    """
    T = config.block_size
    half = max(1, T // 2)
    rows = min(-(-n // half), (len(tokens) - 1 - T) // half + 1)
    if rows < 1:
        raise ValueError(f"{len(tokens)} tokens hold no window of {T} inputs and a target")
    windows = np.stack([tokens[i * half : i * half + T + 1] for i in range(rows)]).astype(np.int32)  # (rows, T + 1)
    losses, likely, chances = jax.device_get(_scores(config, params, windows, half, min(k, n_ids), n_ids))
    return Passage(*(np.concatenate(part) for part in (windows[:, -half:], losses, likely, chances)))


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _scores(config: ModelConfig, params: nn.Params, windows: jax.Array, last: int, k: int, n_ids: int) -> Any:
    """Of the `last` tokens of each window (B, T + 1): losses (B, last), and the k likeliest, (B, last, k) each."""

    def score(window: jax.Array) -> Any:
        logits = nn.forward(config, params, window[None, :-1])[0, -last:]
        chances, likely = jax.lax.top_k(jax.nn.softmax(logits)[:, :n_ids], k)
        return nn.token_losses(logits, window[-last:]), likely, chances

    return jax.lax.map(score, jnp.asarray(windows))  # one after another: the logits of all may be very many
