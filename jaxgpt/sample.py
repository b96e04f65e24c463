"""Sampling: weights and a prompt to text.

`Draw` picks the next token from its logits; `generate` and `stream` read the prompt at once and decode with a KV cache;
`write` turns prompts and ids into text, up to a stop.
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from jaxgpt import filters, matmul, model, prng
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.tokenizer import Tokenizer, as_prepared, encode_typed, without_unknown

CHUNK = 16
"""Tokens between two looks of `stream` at the device."""
LONGEST = 128
"""The most tokens that the compiled loop writes at once."""
BUCKET = 16
"""The shortest prompt, and the smallest cache, that is compiled for; then come twice, four times, ... as much."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "min_p"],
    meta_fields=["top_k", "n_ids"],
)
@dataclass(frozen=True)
class Draw:
    """The filters between logits and a token, in this order; those that are None are not compiled either."""

    temperature: jax.Array | float | None
    """None: the most likely token, whatever else is set."""
    top_k: int
    top_p: jax.Array | float | None
    min_p: jax.Array | float | None
    n_ids: int

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """(B, V) logits and (B,) keys -> (B,) int32 tokens."""
        logits = logits[:, : self.n_ids]
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filters.top_k(filters.temperature(logits, self.temperature), self.top_k)
        if self.top_p is not None:
            logits = filters.top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = filters.min_p(logits, self.min_p)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def draw(
    config: ModelConfig,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    n_ids: int = 0,
) -> Draw:
    """A checked `Draw`.

    Args:
      temperature: below 1 sharper, above 1 flatter; 0 takes the most likely token.
      top_k: draw from the k most likely tokens only; 0 from all.
      top_p: draw from the fewest of the most likely tokens that reach this probability together; 1 from all.
      min_p: draw from tokens at least this many times as likely as the most likely one; 0 from all.
      n_ids: draw ids below this only, where the model's vocabulary is padded beyond the tokenizer's; 0 for all V.

    Raises:
      UsageError: a number out of range.
    """
    if temperature != 0 and not 1e-4 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}, expected 0 or a number from 1e-4 up")
    if top_k < 0:
        raise UsageError(f"top_k is {top_k}, expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}, expected a number above 0, up to 1 (all)")
    if not 0 <= min_p <= 1:
        raise UsageError(f"min_p is {min_p}, expected a number from 0 (all) to 1")
    if not 0 <= n_ids <= config.vocab_size:
        raise UsageError(f"n_ids is {n_ids}, expected 0 (all) to the model's {config.vocab_size}")
    n_ids = n_ids or config.vocab_size
    if temperature == 0:  # one program, whatever else was asked for
        return Draw(None, 0, None, None, n_ids)
    return Draw(float(temperature), top_k, float(top_p) if top_p < 1 else None, float(min_p) or None, n_ids)


class Decoding(NamedTuple):
    """Where a generation stands."""

    cache: model.Cache  # of all tokens but the last
    token: jax.Array  # (B,) int32: the last, drawn and not yet read
    step: jax.Array  # () int32: tokens drawn so far
    keys: jax.Array  # (B,) one key per sequence


def generate(
    config: ModelConfig, params: model.Params, prompt: ArrayLike, n_tokens: int, key: jax.Array, **how: Any
) -> jax.Array:
    """Continue each prompt by `n_tokens`: ids (B, P) -> (B, n_tokens) int32.

    Token i of sequence b depends on (key, b, i) and its own past alone, not on the rest of the batch. Of the past, the
    last block_size tokens of a prompt are read. As long as all tokens together are no more than block_size, each is
    drawn from the logits that `model.forward` gives for those before it. Beyond, it depends on the positions
    (`model.extend` says why):

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
    config: ModelConfig, params: model.Params, prompt: ArrayLike, n_tokens: int, key: jax.Array, **how: Any
) -> Iterator[NDArray[np.int32]]:
    """As `generate`, in pieces (B, up to CHUNK) as they come; joined, they are what `generate` returns."""
    return _pieces(config, params, prompt, n_tokens, key, CHUNK, how)


def _pieces(
    config: ModelConfig,
    params: model.Params,
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
    params: model.Params,
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
@matmul.in_32_bits
def _read(
    config: ModelConfig, params: model.Params, text: tuple[Any, Any], step: Any, key: jax.Array, draw: Draw, slots: int
) -> tuple[Decoding, jax.Array]:
    """A text, ids (B, T) and how many of the T are real, read into a new cache of `slots`; token number `step`, drawn,
    (B, 1)."""
    (idx, length), B = text, len(text[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    logits, cache = model.extend(config, params, model.init_cache(config, B, slots), idx, length)
    token = draw(logits, _at(keys, step))
    return Decoding(cache, token, step + 1, keys), token[:, None]


@partial(jax.jit, static_argnames="config", donate_argnames="state")
@matmul.in_32_bits
def _decode(
    config: ModelConfig, params: model.Params, state: Decoding, n: jax.Array, draw: Draw
) -> tuple[Decoding, jax.Array]:
    """`n` more tokens: the state after them, and the tokens (B, LONGEST), of which the first n are real."""

    def body(i: jax.Array, carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        (cache, token, step, keys), tokens = carry
        logits, cache = model.extend(config, params, cache, token[:, None])
        token = draw(logits, _at(keys, step))
        return Decoding(cache, token, step + 1, keys), lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)

    tokens = jnp.zeros((state.token.shape[0], LONGEST), jnp.int32)
    return lax.fori_loop(0, n, body, (state, tokens))


def _at(keys: jax.Array, step: jax.Array) -> jax.Array:
    """The key of each sequence (B,) for token number `step`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def write(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    prompt: str | bytes | None,
    n_tokens: int,
    *,
    temperature: float = 0.8,
    stop: Sequence[str] = (),
    seed: int = 1337,
    samples: int = 1,
    unknown: str = "error",
    **how: Any,
) -> Iterator[Iterator[str]]:
    """`samples` texts that begin with `prompt`, each as pieces of text; a single one streams while it is made.

    Args:
      prompt: None for a line feed, or the first character of a vocabulary that has none; bytes need not be UTF-8.
        Its line ends, and those of `stop`, become those of the training text.
      stop: a text ends before the first of these that is written after the prompt.
      how: top_k, top_p and min_p, as `generate` takes them.

    Raises:
      UsageError: an empty prompt, one with characters outside the vocabulary, an empty stop, or a number out of range.
    """
    if prompt is None:
        prompt = "\n" if tokenizer.knows("\n").all() else tokenizer.decode([0])
    stop = [as_prepared(tokenizer, each) for each in stop]
    if isinstance(prompt, str):
        prompt = as_prepared(tokenizer, prompt)
    if unknown == "skip" and isinstance(prompt, str):
        prompt = without_unknown(tokenizer, prompt)
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one character of the vocabulary: --prompt TEXT")
    if samples < 1 or not 0 <= seed < 2**32:
        raise UsageError(f"samples is {samples}, expected 1 or more; seed is {seed}, expected 0 to 2**32 - 1")
    if "" in stop:
        raise UsageError("stop is '', expected at least one character: --stop TEXT")
    if any(re.search("[\ud800-\udfff]", each) for each in stop):
        raise UsageError(f"stop is {list(stop)}, expected UTF-8, as all that is written: --stop TEXT")
    prompt_ids = encode_typed(tokenizer, prompt)
    written = prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids)
    ids = np.tile(prompt_ids, (samples, 1))
    given: dict[str, Any] = {"temperature": temperature, "n_ids": tokenizer.vocab_size, **how}
    key = prng.key(seed)
    if samples == 1:
        pieces = (piece[0] for piece in stream(config, params, ids, n_tokens, key, **given))
        yield _texts(tokenizer, written, pieces, stop)
    else:
        for row in np.asarray(generate(config, params, ids, n_tokens, key, **given)):
            yield _texts(tokenizer, written, iter([row]), stop)


def _texts(tokenizer: Tokenizer, prompt: str, pieces: Iterator[Any], stop: Sequence[str] = ()) -> Iterator[str]:
    """The prompt, then each piece of ids as text, up to a `stop`."""
    yield prompt
    yield from until(_decoded(tokenizer, pieces), stop)


def _decoded(tokenizer: Tokenizer, pieces: Iterator[Any]) -> Iterator[str]:
    """Each piece of ids as text; a character whose bytes are split waits for its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    token_bytes = tokenizer.token_bytes
    for ids in pieces:
        yield decoder.decode(b"".join(token_bytes[i] for i in ids))
    yield decoder.decode(b"", final=True)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to where the first `stop` to be complete begins; no piece after that is asked for.

    An end of the text that a stop may begin with waits for what follows it.

    >>> list(until(iter(["one t", "wo th", "ree"]), ["two"]))
    ['one ', '']
    >>> list(until(iter(["one t", "en"]), ["two"]))
    ['one ', 'ten', '']
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(start + len(each), start) for each in stop if (start := held.find(each)) >= 0]
        if found:
            yield held[: min(found)[1]]
            return
        # The longest end of the text that is the beginning of a stop.
        waits = max((n for each in stop for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        cut = len(held) - waits
        yield held[:cut]
        held = held[cut:]
    yield held
