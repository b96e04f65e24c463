"""Sampling: weights and a prompt to text.

`generate` and `stream` read the prompt at once and decode with a KV cache; `next_tokens` draws from the logits; `write`
turns prompts and ids into text, up to a stop.
"""

import codecs
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from jaxgpt import matmul, model, prng, sharding
from jaxgpt.attention import Cache, init_cache
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.tokenizer import Tokenizer, drop_unknown, encode_prompt, normalize_line_ends

CHUNK = 16
"""Tokens between two pieces of `stream`."""
LONGEST = 128
"""The most tokens of one call of the compiled loop."""
BUCKET = 16
"""The shortest prompt, and the smallest cache, that is compiled for; longer ones are padded to powers of two."""

Number = jax.Array | float
STATIC = {"static": True}
"""Of a field: part of the compiled program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The filters between logits and a token."""

    temperature: Number | None = 0.8
    """Below 1 sharper, above 1 flatter; 0 takes the most likely token, whatever else is set."""
    top_k: int = dataclasses.field(default=0, metadata=STATIC)
    """Draw from the k most likely tokens only; 0 from all."""
    top_p: Number | None = 1.0
    """Draw from the fewest of the most likely tokens that reach this probability together; 1 from all."""
    min_p: Number | None = 0.0
    """Draw from tokens at least this many times as likely as the most likely one; 0 from all."""
    n_ids: int = dataclasses.field(default=0, metadata=STATIC)
    """Draw ids below this only, where the model's vocabulary is padded beyond the tokenizer's; 0 all."""


def checked(sampling: SamplingParams) -> SamplingParams:
    """`sampling` with None for each filter that is off, so that `next_tokens` does not compile it.

    Raises:
      UsageError: a number out of range.
    """
    t, p, m = (float(x or 0) for x in (sampling.temperature, sampling.top_p, sampling.min_p))
    if t != 0 and not 1e-4 <= t < math.inf:
        raise UsageError(f"temperature is {t}, expected 0 or a number from 1e-4 up")
    if sampling.top_k < 0:
        raise UsageError(f"top_k is {sampling.top_k}, expected 0 (all) or more")
    if not 0 < p <= 1:
        raise UsageError(f"top_p is {p}, expected a number above 0, up to 1 (all)")
    if not 0 <= m <= 1:
        raise UsageError(f"min_p is {m}, expected a number from 0 (all) to 1")
    if t == 0:
        return SamplingParams(None, 0, None, None, sampling.n_ids)
    return SamplingParams(t, sampling.top_k, p if p < 1 else None, m or None, sampling.n_ids)


def next_tokens(sampling: SamplingParams, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draw a token of each sequence, by `checked` parameters: logits (B, V) and keys (B,) -> ids (B,) int32."""
    logits = logits[:, : sampling.n_ids or None]
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = top_k(logits / sampling.temperature, sampling.top_k)
    if sampling.top_p is not None:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p(logits, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """(..., V) with -inf everywhere but at the `k` largest (and any that equal the k-th); 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest_kept = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def top_p(logits: jax.Array, p: Number) -> jax.Array:
    """(..., V) with -inf everywhere but at the nucleus: the fewest of the most likely tokens whose probabilities reach
    `p` together, at least one, and any as likely as the last of them (Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)[..., :-1]  # of the tokens before the second, third..
    kept = jnp.concatenate([jnp.ones_like(ordered[..., :1], bool), before < p], axis=-1)
    smallest_kept = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def min_p(logits: jax.Array, p: Number) -> jax.Array:
    """(..., V) with -inf at each token less than `p` times as likely as the most likely one (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


class Decoding(NamedTuple):
    """The state of a generation."""

    cache: Cache  # of all tokens but the last
    token: jax.Array  # (B,) int32: the last, drawn and not yet read
    step: jax.Array  # () int32: tokens drawn so far
    keys: jax.Array  # (B,) one key per sequence


def generate(
    config: ModelConfig,
    params: model.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    sampling: SamplingParams = SamplingParams(),
) -> jax.Array:
    """Continue each prompt by `n_tokens`: ids (B, P), with P at least 1 -> (B, n_tokens) int32.

    Token i of sequence b depends on (key, b, i) and its own past alone, not on the rest of the batch. Of a prompt, the
    last block_size tokens are read. As long as there are no more than block_size tokens in all, each is drawn from the
    logits that `model.forward` gives for those before it. Beyond, it depends on the positions (see `model.extend`):

    - rotated ones slide: a token attends to the block_size tokens up to itself
    - learned ones cannot: when block_size tokens were read, the last half of them (block_size // 2) is read again as
      the beginning of a new context, which grows to block_size in turn

    Raises:
      UsageError: an empty prompt, an id that the model does not have, or a number out of range.
    """
    pieces = stream(config, params, prompt, n_tokens, key, sampling, LONGEST)
    return jax.device_put(np.concatenate([np.empty((np.shape(prompt)[0], 0), np.int32), *pieces], axis=1))


def stream(
    config: ModelConfig,
    params: model.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    sampling: SamplingParams = SamplingParams(),
    chunk: int = CHUNK,
) -> Iterator[NDArray[np.int32]]:
    """As `generate`, in pieces (B, n) of n <= chunk <= LONGEST tokens as they come; errors are raised at once."""
    text, draw, V, W = np.asarray(prompt, np.int32), checked(sampling), config.vocab_size, config.block_size
    if text.ndim != 2 or text.size == 0:
        raise UsageError(f"the prompt has shape {text.shape}, expected (B, P) with at least one token")
    if text.min() < 0 or text.max() >= V:
        raise UsageError(f"the prompt has ids from {text.min()} to {text.max()}, expected ids from 0 to {V - 1}")
    if n_tokens < 0:
        raise UsageError(f"tokens is {n_tokens}, expected 0 or more")
    if not 0 <= draw.n_ids <= V:
        raise UsageError(f"n_ids is {draw.n_ids}, expected 0 (all) to {V}")
    slides = config.kind == "bigram" or config.position == "rope"
    # XLA for CPUs casts before the loop, not for each token.
    if config.kind == "gpt" and matmul.resolve(config.precision) == "bfloat16" and sharding.platform() != "cpu":
        config, params = cast_kernels(config, params)

    def pieces(text: NDArray[np.int32]) -> Iterator[NDArray[np.int32]]:
        state, written = None, 0
        while written < n_tokens:
            if state is None:
                read = text.shape[1]
                slots = W if written else bucket(read + n_tokens - 1, W)  # for all that will be read
                padded = np.pad(text, [(0, 0), (0, bucket(read, W) - read)])
                state = _read(config, params, padded, np.int32(read), np.int32(written), key, draw, slots)
                piece = np.asarray(state.token)[:, None]
            else:
                n = min(chunk, n_tokens - written, n_tokens if slides else W - read)
                state, tokens = _decode(config, params, state, np.int32(n), draw)
                piece = np.asarray(tokens)[:, :n]
                read += n
            yield piece
            written += piece.shape[1]
            if not slides:
                text = np.concatenate([text, piece], axis=1)[:, -max(1, W // 2) :]
                state = state if read < W else None

    return pieces(text[:, -W:])


def bucket(n: int, W: int) -> int:
    """The size that is compiled for n tokens: the least power of two that holds them, from BUCKET up, or W."""
    return min(W, max(BUCKET, 1 << (n - 1).bit_length()))


def cast_kernels(config: ModelConfig, params: model.Params) -> tuple[ModelConfig, model.Params]:
    """The same GPT with its kernels in the compute dtype, so that they are cast once and not for each token. A tied
    head becomes a kernel of its own, beside the float32 rows that the lookup reads."""
    params = model.unstacked(params) | {"lm_head": {"kernel": model.head_kernel(config, params)}}
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: matmul.to_compute_dtype(x, config.precision) if path[-1].key == "kernel" else x, params
    )
    return dataclasses.replace(config, tie_weights=False, scan_layers=False), params


@partial(jax.jit, static_argnames=("config", "slots"))
@matmul.in_32_bits
def _read(
    config: ModelConfig,
    params: model.Params,
    idx: Any,
    length: Any,
    step: Any,
    key: Any,
    draw: SamplingParams,
    slots: int,
) -> Decoding:
    """The first `length` tokens of idx (B, T) read into a new cache of `slots`, and token number `step` drawn."""
    B = idx.shape[0]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    empty = Decoding(init_cache(config, B, slots), jnp.zeros(B, jnp.int32), step, keys)
    return _advance(config, params, empty, idx, draw, length)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
@matmul.in_32_bits
def _decode(
    config: ModelConfig, params: model.Params, state: Decoding, n: Any, draw: SamplingParams
) -> tuple[Decoding, jax.Array]:
    """`n` more tokens: the state after them, and the tokens (B, LONGEST), of which the first n are real."""

    def body(i: jax.Array, carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        state, tokens = carry
        state = _advance(config, params, state, state.token[:, None], draw)
        return state, lax.dynamic_update_index_in_dim(tokens, state.token, i, axis=1)

    return lax.fori_loop(0, n, body, (state, jnp.zeros((state.token.shape[0], LONGEST), jnp.int32)))


def _advance(
    config: ModelConfig, params: model.Params, state: Decoding, idx: Any, draw: SamplingParams, length: Any = None
) -> Decoding:
    """The state after reading idx (B, T), or its first `length` tokens, and drawing the next token."""
    logits, cache = model.extend(config, params, state.cache, idx, length)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    return Decoding(cache, next_tokens(draw, logits, keys), state.step + 1, state.keys)


def write(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    prompt: str | bytes | None,
    n_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    *,
    stop: Sequence[str] = (),
    seed: int = 1337,
    samples: int = 1,
    unknown: str = "error",
) -> Iterator[Iterator[str]]:
    """`samples` texts that begin with `prompt`, each as pieces of text; a single one streams while it is made.

    Args:
      prompt: None for a line feed, or the first character of a vocabulary that has none; bytes need not be UTF-8.
        Its line ends, and those of `stop`, become those of the training text.
      stop: a text ends before the first of these that is written after the prompt.

    Raises:
      UsageError: an empty prompt, one with characters outside the vocabulary, an empty stop, or a number out of range.
    """
    if prompt is None:
        prompt = "\n" if tokenizer.knows("\n").all() else tokenizer.decode([0])
    if isinstance(prompt, str):
        prompt = normalize_line_ends(tokenizer, prompt)
        prompt = drop_unknown(tokenizer, prompt) if unknown == "skip" else prompt
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one character of the vocabulary: --prompt TEXT")
    if samples < 1:
        raise UsageError(f"samples is {samples}, expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}, expected 0 to 2**32 - 1")
    stop = [normalize_line_ends(tokenizer, each) for each in stop]
    if not all(re.fullmatch("[^\ud800-\udfff]+", each) for each in stop):
        raise UsageError(f"stop is {stop}, expected UTF-8 of at least one character each: --stop TEXT")
    ids = encode_prompt(tokenizer, prompt)
    begin = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    sampling = dataclasses.replace(sampling, n_ids=tokenizer.vocab_size)
    given = np.tile(ids, (samples, 1)), n_tokens, prng.key(seed), sampling
    if samples == 1:
        yield _texts(tokenizer, begin, (piece[0] for piece in stream(config, params, *given)), stop)
    else:
        for row in np.asarray(generate(config, params, *given)):
            yield _texts(tokenizer, begin, [row], stop)


def _texts(tokenizer: Tokenizer, prompt: str, pieces: Iterable[Any], stop: Sequence[str] = ()) -> Iterator[str]:
    """The prompt, then each piece of ids as text, up to a `stop`; a character whose bytes are split waits for its last
    one."""
    token_bytes = tokenizer.token_bytes
    data = (b"".join(token_bytes[i] for i in ids) for ids in pieces)
    yield prompt
    yield from until(codecs.iterdecode(data, "utf-8", errors="replace"), stop)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to the first `stop` to be complete; no piece after it is asked for.

    An end of the text that may be the beginning of a stop is held back until the text goes on.

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
        # The longest end of the text that is the beginning of a stop:
        waits = max((n for each in stop for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        cut = len(held) - waits
        yield held[:cut]
        held = held[cut:]
    yield held
