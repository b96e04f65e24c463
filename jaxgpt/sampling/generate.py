"""Weights to text: the whole generation in one compiled loop."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxgpt import nn
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.sampling import filters

CHUNK = 16
"""Tokens between two looks of `stream` at the device."""


class Decoding(NamedTuple):
    """Where a generation stands."""

    window: jax.Array  # (B, W) int32: the last tokens, left-aligned
    length: jax.Array  # () int32: how many of them are real, up to W
    step: jax.Array  # () int32: tokens generated so far
    keys: jax.Array  # (B,) one key per sequence


class Draw(NamedTuple):
    """How a token is drawn, as far as it is compiled in."""

    n_ids: int
    top_k: int
    greedy: bool


def generate(
    config: ModelConfig,
    params: nn.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    n_ids: int = 0,
) -> jax.Array:
    """Continue each prompt by `n_tokens`: ids (B, P) -> (B, n_tokens) int32.

    Every token is drawn from the logits that the last block_size tokens give; what lies further back, of a prompt too,
    is out of sight. Token i of sequence b depends on (key, b, i) and its own past alone, not on the rest of the batch.

    Args:
      prompt: at least one token a sequence.
      temperature: 0 takes the most likely token.
      top_k: draw from the k most likely tokens only; 0 from all.
      n_ids: draw ids below this only, where the model's vocabulary is padded beyond the tokenizer's; 0 for all V.

    Raises:
      UsageError: an empty prompt, or a temperature, top_k or n_tokens out of range.
    """
    state, draw = _start(config, prompt, n_tokens, key, temperature, top_k, n_ids)
    return _advance(config, params, state, n_tokens, draw, temperature or 1.0)[1]


def stream(
    config: ModelConfig,
    params: nn.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    n_ids: int = 0,
) -> Iterator[NDArray[np.int32]]:
    """As `generate`, in pieces (B, up to CHUNK) as they come; joined, they are what `generate` returns."""
    state, draw = _start(config, prompt, n_tokens, key, temperature, top_k, n_ids)
    for left in range(n_tokens, 0, -CHUNK):
        state, tokens = _advance(config, params, state, CHUNK, draw, temperature or 1.0)
        yield np.asarray(tokens)[:, : min(left, CHUNK)]


def _start(
    config: ModelConfig, prompt: ArrayLike, n_tokens: int, key: jax.Array, temperature: float, top_k: int, n_ids: int
) -> tuple[Decoding, Draw]:
    ids = np.asarray(prompt, np.int32)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise UsageError(f"the prompt has shape {ids.shape}, expected (B, P) with at least one token")
    if n_tokens < 0 or top_k < 0:
        raise UsageError(f"tokens is {n_tokens} and top_k is {top_k}, expected 0 or more")
    if temperature != 0 and not 1e-4 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}, expected 0 or a number from 1e-4 up")
    B, W = ids.shape[0], config.block_size
    ids = ids[:, -W:]
    window = np.zeros((B, W), np.int32)
    window[:, : ids.shape[1]] = ids
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    state = Decoding(jnp.asarray(window), jnp.int32(ids.shape[1]), jnp.int32(0), keys)
    return state, Draw(n_ids or config.vocab_size, top_k, greedy=temperature == 0)


@partial(jax.jit, static_argnames=("config", "n_tokens", "draw"), donate_argnames="state")
def _advance(
    config: ModelConfig,
    params: nn.Params,
    state: Decoding,
    n_tokens: int,
    draw: Draw,
    temperature: float,
) -> tuple[Decoding, jax.Array]:
    """`n_tokens` more tokens: the state after them, and the tokens (B, n_tokens)."""

    def body(state: Decoding, _: None) -> tuple[Decoding, jax.Array]:
        logits = nn.forward(config, params, state.window)
        logits = jax.lax.dynamic_index_in_dim(logits, state.length - 1, axis=1, keepdims=False)[:, : draw.n_ids]
        if draw.greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            logits = filters.top_k(filters.temperature(logits, temperature), draw.top_k)
            keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
            token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return _append(state, token), token

    state, tokens = jax.lax.scan(body, state, length=n_tokens)
    return state, tokens.T


def _append(state: Decoding, token: jax.Array) -> Decoding:
    """The state with `token` (B,) behind its window; a full window lets go of its oldest token."""
    W = state.window.shape[1]
    full = state.length == W
    window = jnp.where(full, jnp.roll(state.window, -1, axis=1), state.window)
    place = jnp.minimum(state.length, W - 1)
    window = jax.lax.dynamic_update_index_in_dim(window, token, place, axis=1)
    return Decoding(window, jnp.minimum(state.length + 1, W), state.step + 1, state.keys)
