"""Sampling: weights and a prompt -> text.

`generate` and `stream` read the prompt in one pass and decode with a KV cache; `next_tokens` draws from the logits;
`write` encodes the prompt and decodes the tokens, up to a stop text.
"""

import codecs
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from jaxgpt import matmul, model, prng, sharding
from jaxgpt.attention import Cache, init_cache
from jaxgpt.config import ModelConfig, UsageError
from jaxgpt.tokenizer import Ids, Tokenizer, drop_unknown, normalize_line_ends

CHUNK = 16
"""Tokens per piece of `stream`."""
LONGEST = 128
"""Most tokens per call of the compiled loop."""
BUCKET = 16
"""Smallest compiled length of a prompt or a cache; longer ones are padded to powers of two."""

Number = jax.Array | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from logits."""

    temperature: Number | None = 0.8
    """Below 1 sharper, above 1 flatter; 0 takes the most likely token, whatever the filters."""
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    """Draw only from the k most likely tokens; 0 turns it off."""
    top_p: Number | None = 1.0
    """Draw only from the fewest most likely tokens whose probabilities add up to this; 1 turns it off."""
    min_p: Number | None = 0.0
    """Draw only from tokens at least this many times as likely as the most likely one; 0 turns it off."""
    n_ids: int = dataclasses.field(default=0, metadata={"static": True})
    """Draw only ids below this, if the model's vocabulary is padded beyond the tokenizer's; 0 turns it off."""


def checked(sampling: SamplingParams) -> SamplingParams:
    """`sampling` with None for filters that are off, so that `next_tokens` leaves them out. Traced numbers stay in, and
    only their shape is checked.

    Raises:
      UsageError: a number out of range, or an array of several.
    """
    traced: dict[str, Any] = {}
    for name, off in {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}.items():
        x = getattr(sampling, name)
        if np.shape(x):
            raise UsageError(f"{name} has shape {np.shape(x)}, expected one number: jax.vmap maps over several")
        if isinstance(x, jax.core.Tracer):
            traced[name], sampling = x, dataclasses.replace(sampling, **{name: off})  # type: ignore[arg-type]
    t, m = float(sampling.temperature or 0), float(sampling.min_p or 0)
    p = 1.0 if sampling.top_p is None else float(sampling.top_p)
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
    if (x := traced.get("temperature")) is not None:  # 0 is replaced by a number that makes the random part negligible
        traced["temperature"] = jnp.where(x == 0, np.float32(1e-30), x)
    if (x := traced.get("top_p")) is not None:  # 1 must keep all tokens, though a rounded sum reaches it earlier
        traced["top_p"] = jnp.where(x < 1, x, np.float32(math.inf))
    known = SamplingParams(t, sampling.top_k, p if p < 1 else None, m or None, sampling.n_ids)
    return dataclasses.replace(known, **traced)


def next_tokens(sampling: SamplingParams, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draw the next token of each sequence, with `checked` parameters: logits (B, V), keys (B,) -> ids (B,) int32."""
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
    """Logits (..., V), -inf except for the `k` largest (and any that equal the k-th); 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest_kept = lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def top_p(logits: jax.Array, p: Number) -> jax.Array:
    """Logits (..., V), -inf except for the nucleus: the fewest most likely tokens, at least one, whose probabilities
    add up to `p`, and any as likely as the last of them (Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)[..., :-1]  # of all tokens before the 2nd, 3rd, ...
    kept = jnp.concatenate([jnp.ones_like(ordered[..., :1], bool), before < p], axis=-1)
    smallest_kept = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest_kept, -jnp.inf, logits)


def min_p(logits: jax.Array, p: Number) -> jax.Array:
    """Logits (..., V), -inf for tokens less than `p` times as likely as the most likely one (Nguyen et al. 2024,
    arXiv:2407.01082)."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


class Decoding(NamedTuple):
    cache: Cache  # of all tokens but the last
    token: jax.Array  # (B,) int32: the last token, drawn but not yet read
    step: jax.Array  # () int32: number of tokens drawn
    keys: jax.Array  # (B,) one key per sequence


def generate(
    config: ModelConfig,
    params: model.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    sampling: SamplingParams = SamplingParams(),
) -> jax.Array:
    """Continue each prompt by `n_tokens`: ids (B, P), with P at least 1 -> (B, n_tokens) int32. The prompt, the
    parameters, the key and the numbers of `sampling` may be traced, as by `vmap` over models or temperatures.

    Token i of sequence b depends only on (key, b, i) and the tokens before it, not on the rest of the batch. Only the
    last block_size tokens of a prompt are read. Up to block_size tokens in total, the logits are those of
    `model.forward`. Beyond that:

    - RoPE slides: each token attends to the last block_size tokens (see `model.extend`).
    - Learned positions cannot: whenever the context is full, its last block_size // 2 tokens are read again as the
      start of a new one.

    Raises:
      UsageError: a prompt that is empty or not of integers, an id outside the vocabulary (unless the prompt is traced),
        or a number out of range (unless it is traced).
    """
    pieces = [*stream(config, params, prompt, n_tokens, key, sampling, LONGEST)]
    pieces += [np.empty((np.shape(prompt)[0], 0), np.int32)]  # of no tokens, if none are asked for
    return jax.device_put(_numpy_for(pieces[0]).concatenate(pieces, axis=1))


def _numpy_for(x: Any) -> Any:
    """jax.numpy if an array is traced, else numpy, which compiles nothing."""
    return jnp if isinstance(x, jax.core.Tracer) else np


def stream(
    config: ModelConfig,
    params: model.Params,
    prompt: ArrayLike,
    n_tokens: int,
    key: jax.Array,
    sampling: SamplingParams = SamplingParams(),
    chunk: int = CHUNK,
) -> Iterator[NDArray[np.int32]]:
    """`generate` in pieces (B, n), n <= chunk <= LONGEST. Errors are raised before the first piece is requested."""
    text: Any = prompt if isinstance(prompt, jax.core.Tracer) else np.asarray(prompt)
    draw, V, W = checked(sampling), config.vocab_size, config.block_size
    if text.ndim != 2 or text.size == 0 or text.dtype.kind not in "iu":
        found = f"shape {text.shape} and dtype {text.dtype}"
        raise UsageError(f"the prompt has {found}, expected (B, P) integers with at least one token")
    if isinstance(text, np.ndarray) and not (text.min() >= 0 and text.max() < V):
        raise UsageError(f"the prompt has ids from {text.min()} to {text.max()}, expected ids from 0 to {V - 1}")
    if n_tokens < 0:
        raise UsageError(f"tokens is {n_tokens}, expected 0 or more")
    if not 0 <= draw.n_ids <= V:
        raise UsageError(f"n_ids is {draw.n_ids}, expected 0 (all) to {V}")
    slides = config.kind == "bigram" or config.position == "rope"
    config, params = for_decoding(config, params)

    def pieces(text: Any) -> Iterator[Any]:
        state, written = None, 0
        while written < n_tokens:
            if state is None:
                read = text.shape[1]
                slots = W if written else bucket(read + n_tokens - 1, W)  # the last token is not read
                padded = _numpy_for(text).pad(text, [(0, 0), (0, bucket(read, W) - read)])
                state = _read(config, params, padded, np.int32(read), np.int32(written), key, draw, slots)
                xp = _numpy_for(state.token)
                piece = xp.asarray(state.token)[:, None]
            else:
                n = min(chunk, n_tokens - written, n_tokens if slides else W - read)
                decode = _decode_traced if xp is jnp else _decode_donated
                state, tokens = decode(config, params, state, np.int32(n), draw)
                piece = xp.asarray(tokens)[:, :n]
                read += n
            yield piece
            written += piece.shape[1]
            if not slides:
                text = xp.concatenate([text, piece], axis=1)[:, -max(1, W // 2) :]
                state = state if read < W else None

    return pieces(text[:, -W:].astype(np.int32))


def bucket(n: int, W: int) -> int:
    """The compiled length for n tokens: n rounded up to a power of two, at least BUCKET and at most W."""
    return min(W, max(BUCKET, 1 << int(n - 1).bit_length()))


def for_decoding(config: ModelConfig, params: model.Params) -> tuple[ModelConfig, model.Params]:
    """A config and parameters with which a token takes less time: on accelerators, in bfloat16, `cast_kernels`. XLA for
    CPUs casts before its loop over tokens."""
    casts = config.kind == "gpt" and matmul.resolve(config.precision) == "bfloat16" and sharding.platform() != "cpu"
    return cast_kernels(config, params) if casts else (config, params)


def cast_kernels(config: ModelConfig, params: model.Params) -> tuple[ModelConfig, model.Params]:
    """Cast the kernels of a GPT to the compute dtype and transpose them. A tied head becomes a kernel of its own,
    because the embedding stays float32.

    One token's matmul with a transposed kernel sums over rows. With a kernel (K, N) it sums over columns: XLA for GPUs
    first writes all K N terms to memory if N is small.
    """

    def cast(tree: model.Params) -> model.Params:
        done = {name: cast(x) if isinstance(x, dict) else x for name, x in tree.items() if name != "kernel"}
        if "kernel" in tree:
            done["transposed"] = matmul.to_compute_dtype(tree["kernel"], config.precision).T
        return done

    params = model.unstacked(params) | {"lm_head": {"kernel": model.head_kernel(config, params)}}
    return dataclasses.replace(config, tie_weights=False, scan_layers=False), cast(params)


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
    """Read the first `length` tokens of idx (B, T) into a new cache of `slots`, and draw token number `step`."""
    B = idx.shape[0]
    leaves, tree = jax.tree.flatten((params, idx, step, key, draw))
    params, idx, step, key, draw = jax.tree.unflatten(tree, sharding.varying_alike(*leaves))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    empty = Decoding(init_cache(config, B, slots), jnp.zeros(B, jnp.int32), step, keys)
    return _advance(config, params, empty, idx, draw, length)


@matmul.in_32_bits
def _decode(
    config: ModelConfig, params: model.Params, state: Decoding, n: Any, draw: SamplingParams
) -> tuple[Decoding, jax.Array]:
    """Draw `n` more tokens: the new state, and the tokens (B, LONGEST), of which the first n are valid."""

    def body(i: jax.Array, carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        state, tokens = carry
        state = _advance(config, params, state, state.token[:, None], draw)
        return state, lax.dynamic_update_index_in_dim(tokens, state.token, i, axis=1)

    blank = jnp.zeros((state.token.shape[0], LONGEST), jnp.int32)
    return lax.fori_loop(0, n, body, (state, sharding.varying_alike(blank, state.token)[0]))


_decode_donated = jax.jit(_decode, static_argnames="config", donate_argnames="state")
_decode_traced = jax.jit(_decode, static_argnames="config")  # under `vmap`, parts of the state could not be reused


def _advance(
    config: ModelConfig, params: model.Params, state: Decoding, idx: Any, draw: SamplingParams, length: Any = None
) -> Decoding:
    """Read idx (B, T), or its first `length` tokens, and draw the next token."""
    logits, cache = model.extend(config, params, state.cache, idx, length)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    return Decoding(cache, next_tokens(draw, logits, keys), state.step + 1, state.keys)


def write(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    prompt: str | None,
    n_tokens: int,
    sampling: SamplingParams = SamplingParams(),
    *,
    stop: str | Sequence[str] = (),
    seed: int = 1337,
    samples: int = 1,
    unknown: str = "error",
) -> Iterator[Iterator[str]]:
    """Write `samples` texts that begin with `prompt`, each as pieces of text. A single text is streamed.

    Args:
      prompt: None: a line feed, or the vocabulary's first character if it has no line feed. Line ends, also in `stop`,
        become those of the training text.
      stop: a text ends before this, or the first of these, that appears after the prompt.

    Raises:
      UsageError: an empty prompt, one with characters outside the vocabulary, an empty stop, or a number out of range.
    """
    if prompt is None:
        prompt = "\n" if tokenizer.knows("\n").all() else tokenizer.decode([0])
    prompt = normalize_line_ends(tokenizer, prompt)
    prompt = drop_unknown(tokenizer, prompt) if unknown == "skip" else prompt
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one character of the vocabulary: --prompt TEXT")
    if samples < 1:
        raise UsageError(f"samples is {samples}, expected 1 or more")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}, expected 0 to 2**32 - 1")
    stop = [normalize_line_ends(tokenizer, each) for each in ([stop] if isinstance(stop, str) else stop)]
    for option, text in [("prompt", prompt), *(("stop", each) for each in stop)]:
        if not re.fullmatch("[^\ud800-\udfff]+", text):
            raise UsageError(f"{option} is {text!r}, expected UTF-8 of at least one character: --{option} TEXT")
    ids = tokenizer.encode(prompt)
    sampling = dataclasses.replace(sampling, n_ids=tokenizer.vocab_size)
    inputs = np.tile(ids, (samples, 1)), n_tokens, prng.key(seed), sampling
    if samples == 1:
        yield _texts(tokenizer, prompt, (piece[0] for piece in stream(config, params, *inputs)), stop)
    else:
        for row in np.asarray(generate(config, params, *inputs)):
            yield _texts(tokenizer, prompt, [row], stop)


def _texts(tokenizer: Tokenizer, prompt: str, pieces: Iterable[Ids], stop: Sequence[str] = ()) -> Iterator[str]:
    """The prompt, then the decoded pieces of ids, up to a `stop`. Incomplete UTF-8 waits for the next piece."""
    token_bytes, decoder = tokenizer.token_bytes, codecs.getincrementaldecoder("utf-8")("replace")
    decoded = (decoder.decode(b"".join(token_bytes[i] for i in ids)) for ids in pieces)
    rest = map(decoder.decode, [b""], [True])  # a U+FFFD if the last character is incomplete
    yield prompt
    yield from until(chain(decoded, rest), stop)


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to the first complete `stop`; later pieces are not requested.

    A suffix of the text that may be the beginning of a stop is held back until the next piece.

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
        # The longest suffix of the text that begins a stop waits.
        n_held = max((n for each in stop for n in range(1, len(each)) if held.endswith(each[:n])), default=0)
        cut = len(held) - n_held
        yield held[:cut]
        held = held[cut:]
    yield held
