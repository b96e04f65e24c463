"""Weights to text: the prompt read at once, then a compiled loop in which each token costs the work of one."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from jaxgpt import model as nn
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.draw import Draw, draw

CHUNK = 16
"""Tokens between two looks of `stream` at the device."""
LONGEST = 128
"""The most tokens that the compiled loop writes at once."""
BUCKET = 16
"""The shortest prompt, and the smallest cache, that is compiled for; then come twice, four times, ... as much."""


class Decoding(NamedTuple):
    """Where a generation stands."""

    cache: nn.Cache  # of all tokens but the last
    token: jax.Array  # (B,) int32: the last, drawn and not yet read
    step: jax.Array  # () int32: tokens drawn so far
    keys: jax.Array  # (B,) one key per sequence


def generate(
    config: ModelConfig, params: nn.Params, prompt: ArrayLike, n_tokens: int, key: jax.Array, **how: Any
) -> jax.Array:
    """Continue each prompt by `n_tokens`: ids (B, P) -> (B, n_tokens) int32.

    Token i of sequence b depends on (key, b, i) and its own past alone, not on the rest of the batch. Of the past, the
    last block_size tokens of a prompt are read. As long as all tokens together are no more than block_size, each is
    drawn from the logits that `nn.forward` gives for those before it. Beyond, it depends on the positions (`nn.extend`
    says why):

    - rotated ones slide: a token sees the block_size before it, and through these what they saw
    - learned ones cannot: whenever block_size tokens were read, the last half of them (block_size // 2) is read again
      as the beginning of a new context, which grows to block_size in turn

    Args:
      prompt: at least one token a sequence.
      how: temperature, top_k, top_p, min_p and n_ids, as `draw` takes them.

    Raises:
      UsageError: an empty prompt, an id that the model does not have, or a number out of range.
    """
    pieces = list(_pieces(config, params, prompt, n_tokens, key, LONGEST, how))
    return jax.device_put(np.concatenate([np.empty((np.shape(prompt)[0], 0), np.int32), *pieces], axis=1))


def stream(
    config: ModelConfig, params: nn.Params, prompt: ArrayLike, n_tokens: int, key: jax.Array, **how: Any
) -> Iterator[NDArray[np.int32]]:
    """As `generate`, in pieces (B, up to CHUNK) as they come; joined, they are what `generate` returns."""
    return _pieces(config, params, prompt, n_tokens, key, CHUNK, how)


def _pieces(
    config: ModelConfig,
    params: nn.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    chunk: int,
    how: dict[str, Any],
) -> Iterator[NDArray[np.int32]]:
    """The checks of a request at once, then its tokens in pieces of at most `chunk`."""
    text = np.asarray(prompt, np.int32)
    if text.ndim != 2 or text.size == 0:
        raise UsageError(f"the prompt has shape {text.shape}, expected (B, P) with at least one token")
    if text.min() < 0 or text.max() >= config.vocab_size:
        found = f"ids from {text.min()} to {text.max()}"
        raise UsageError(f"the prompt has {found}, expected ids from 0 to {config.vocab_size - 1}")
    if n_tokens < 0:
        raise UsageError(f"tokens is {n_tokens}, expected 0 or more")
    return _write(config, params, text[:, -config.block_size :], n_tokens, key, chunk, draw(config, **how))


def _write(
    config: ModelConfig,
    params: nn.Params,
    text: NDArray[np.int32],
    n_tokens: int,
    key: jax.Array,
    chunk: int,
    draw: Draw,
) -> Iterator[NDArray[np.int32]]:
    W = config.block_size
    slides = config.kind == "bigram" or config.position == "rope"
    state, written = None, 0
    while written < n_tokens:
        if state is None:
            read = text.shape[1]
            slots = W if written else bucket(read + n_tokens - 1, W)  # for all that will be read
            state, tokens = _read(config, params, _padded(text, W), np.int32(written), key, draw, slots)
            n = 1
        else:
            n = min(chunk, n_tokens - written, n_tokens if slides else W - read)
            state, tokens = _decode(config, params, state, np.int32(n), draw)
            read += n
        piece = np.asarray(tokens)[:, :n]
        yield piece
        written += n
        if not slides:
            text = np.concatenate([text, piece], axis=1)[:, -max(1, W // 2) :]
            state = state if read < W else None


def _padded(ids: NDArray[np.int32], W: int) -> tuple[NDArray[np.int32], np.int32]:
    """(B, P) ids with zeros behind them, up to their `bucket`, and P."""
    P = ids.shape[1]
    return np.pad(ids, [(0, 0), (0, bucket(P, W) - P)]), np.int32(P)


def bucket(n: int, W: int) -> int:
    """The size that is compiled for n tokens: the least power of two that holds them, from BUCKET up, or W."""
    return min(W, max(BUCKET, 1 << (n - 1).bit_length()))


@partial(jax.jit, static_argnames=("config", "slots"))
def _read(
    config: ModelConfig, params: nn.Params, text: tuple[Any, Any], step: Any, key: jax.Array, draw: Draw, slots: int
) -> tuple[Decoding, jax.Array]:
    """A text, ids (B, T) and how many of the T are real, read into a new cache of `slots`; token number `step`, drawn,
    (B, 1)."""
    (idx, length), B = text, len(text[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    logits, cache = nn.extend(config, params, nn.init_cache(config, B, slots), idx, length)
    token = draw(logits, _at(keys, step))
    return Decoding(cache, token, step + 1, keys), token[:, None]


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def _decode(
    config: ModelConfig, params: nn.Params, state: Decoding, n: jax.Array, draw: Draw
) -> tuple[Decoding, jax.Array]:
    """`n` more tokens: the state after them, and the tokens (B, LONGEST), of which the first n are real."""

    def body(i: jax.Array, carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        (cache, token, step, keys), tokens = carry
        logits, cache = nn.extend(config, params, cache, token[:, None])
        token = draw(logits, _at(keys, step))
        return Decoding(cache, token, step + 1, keys), lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)

    tokens = jnp.zeros((state.token.shape[0], LONGEST), jnp.int32)
    return lax.fori_loop(0, n, body, (state, tokens))


def _at(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The key of each sequence (B,) for token number `step`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
