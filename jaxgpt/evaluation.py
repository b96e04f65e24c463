"""Loss over a whole split: exact, deterministic and independent of the batch size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from jaxgpt import matmul, model, sharding
from jaxgpt.config import Config, ModelConfig
from jaxgpt.data import Starts, evaluation_windows, gather, inputs_and_targets, window_starts
from jaxgpt.loss import logits_at_once
from jaxgpt.tokenizer import Ids, Tokenizer

BATCH_TOKENS = 8192
"""Maximum tokens in a batch on each accelerator."""
CACHED_TOKENS = 2048
"""The same on CPUs, where activations then fit into the caches and a split takes a quarter less time."""
BATCHES = 16
"""Batches in a call of the compiled program on accelerators. On CPUs one, as a loop takes longer to compile."""


@dataclass(frozen=True)
class Evaluation:
    """The loss over every predicted token of a split."""

    loss: float
    """Nats per token."""
    standard_error: float
    """Of `loss`, as if windows were independent; NaN for a single window. Neighbours in one text are not: losses of
    other texts of the kind vary by 3 to 5 times as much (docs/learn/concepts.md)."""
    bits_per_char: float
    bits_per_byte: float
    n_tokens: int
    """Predicted tokens: all but the first."""


def evaluate(
    config: ModelConfig,
    params: model.Params,
    tokens: Ids,
    tokenizer: Tokenizer,
    batch_size: int | None = None,
    program: Callable[..., jax.Array] | None = None,
) -> Evaluation:
    """Loss over `tokens` (N,) in windows of block_size; each of the N - 1 predictions counts once.

    The last window ends at the last token and skips the predictions of the window before it.

    Args:
      batch_size: windows per batch; None chooses. Results agree up to float32 reassociation.
      program: from `compiled`, for N tokens and no batch_size.

    Raises:
      ValueError: fewer than block_size + 1 tokens, or an id that the tokenizer lacks.
    """
    T = config.block_size
    starts, skip = evaluation_windows(len(tokens), T)
    B = batch_size or windows_per_batch(config, len(starts))
    losses = partial(program or partial(_loss_sums, config), params)
    return evaluation(loss_sums(losses, tokens, T, starts, skip, B), T, tokens, tokenizer)


def compiled(config: ModelConfig, params: model.Params, n_tokens: int) -> Callable[..., jax.Array]:
    """The program of `evaluate` for `n_tokens` and `params` (arrays or shapes), compiled ahead of time."""
    T, K = config.block_size, batches_per_call()
    B = windows_per_batch(config, len(evaluation_windows(n_tokens, T)[0]))
    windows, skip = jax.ShapeDtypeStruct((K, B, T + 1), jnp.int32), jax.ShapeDtypeStruct((K, B), jnp.int32)
    return _loss_sums.lower(config, params, windows, skip).compile()


def evaluation(sums: NDArray[np.float64], T: int, tokens: Ids, tokenizer: Tokenizer) -> Evaluation:
    """From the summed losses (n_windows,) of the `evaluation_windows` of `tokens`."""
    n, total, counts = len(sums), float(sums.sum()), T - evaluation_windows(len(tokens), T)[1]
    loss = total / (len(tokens) - 1)
    # The loss is a ratio of two sums over windows; its standard error is that of a ratio estimator.
    with np.errstate(invalid="ignore"):  # NaN where the loss is infinite
        deviations = sums - loss * counts
    error = math.sqrt((deviations**2).sum() / (n * (n - 1))) / float(counts.mean()) if n > 1 else math.nan
    n_chars, n_bytes = text_size(tokenizer, tokens[1:])
    bits = total / math.log(2)
    return Evaluation(loss, error, bits / max(1, n_chars), bits / n_bytes, len(tokens) - 1)


def estimate(config: Config, params: model.Params, tokens: Ids, step: int) -> float:
    """Mean loss over `eval_batches` random batches, as in nanoGPT's estimate_loss: noisy, for comparison only."""
    T, n = config.model.block_size, config.train.eval_batches * config.train.batch_size
    starts = window_starts(config.train.seed, step, len(tokens), T, n, "estimate")
    losses, B = partial(_loss_sums, config.model, params), windows_per_batch(config.model, n)
    return float(loss_sums(losses, tokens, T, starts, np.zeros_like(starts), B).sum() / (n * T))


def text_size(tokenizer: Tokenizer, tokens: Ids) -> tuple[int, int]:
    """Characters and bytes of the text of `tokens`. A character belongs to the token with its first byte."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for i in range(0, len(tokens), 2**24):
        found = np.bincount(np.asarray(tokens[i : i + 2**24]), minlength=len(counts))
        if len(found) > len(counts):
            raise ValueError(f"id {len(found) - 1} is outside the vocabulary, expected 0 to {len(counts) - 1}")
        counts += found
    chars = np.array([sum(byte & 0xC0 != 0x80 for byte in data) for data in tokenizer.token_bytes])
    sizes = np.array([len(data) for data in tokenizer.token_bytes])
    return int(counts @ chars), int(counts @ sizes)


def loss_sums(
    losses: Callable[..., jax.Array], tokens: Ids, T: int, starts: Starts, skip: Starts, B: int
) -> NDArray[np.float64]:
    """Summed loss of each window without its first `skip` predictions, (n_windows,), computed in batches of B.

    Args:
      losses: a model's `map_batches`, compiled: windows (K, B, T + 1), skip (K, B) -> (K, B); or (M, K, B) for M
        models, and the result is (M, n_windows).
    """
    K, n, sums = batches_per_call(), len(starts), list[jax.Array]()
    padded = (np.pad(x, (0, -n % (K * B))).reshape(-1, K, B) for x in (starts, skip))  # one shape, one program
    for windows, skipped in zip(*padded, strict=True):
        jax.block_until_ready(sums[:-1])  # at most two calls are in flight, however large the corpus
        sums.append(losses(gather(tokens, windows, T).astype(np.int32), skipped.astype(np.int32)))
    found = np.concatenate(jax.device_get(sums), axis=-2).astype(np.float64)
    return found.reshape(*found.shape[:-2], -1)[..., :n]


def batches_per_call() -> int:
    return 1 if sharding.platform() == "cpu" else BATCHES


def map_batches(losses: Callable[..., jax.Array], windows: jax.Array, skip: jax.Array) -> jax.Array:
    """Summed loss of each window without its first `skip` predictions: windows (K, B, T + 1), skip (K, B) -> (K, B).
    `losses` maps inputs and targets (B, T) to the loss of each prediction (B, T)."""

    def batch_sums(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        windows, skip = batch
        found = losses(*inputs_and_targets(windows))
        counted = jnp.arange(found.shape[1])[None, :] >= skip[:, None]
        return sharding.constrain(jnp.where(counted, found, 0).sum(axis=1), None)

    return lax.map(batch_sums, (windows, skip))


def windows_per_batch(config: ModelConfig, n: int, models: int = 1) -> int:
    """Batch size for `n` windows of `models` at once: on each device at most BATCH_TOKENS (CACHED_TOKENS on CPUs) and
    `logits_at_once`. For few windows it is a power of two, so that splits of similar sizes share a program."""
    shards, tokens = sharding.num_shards("batch"), CACHED_TOKENS if sharding.platform() == "cpu" else BATCH_TOKENS
    most = max(1, min(tokens, logits_at_once() // config.vocab_size) // config.block_size // models)
    return shards * min(most, max(32, 1 << (-(-n // shards) - 1).bit_length()))


@partial(jax.jit, static_argnums=0)
@matmul.in_32_bits
def _loss_sums(config: ModelConfig, params: model.Params, windows: jax.Array, skip: jax.Array) -> jax.Array:
    return map_batches(partial(model.losses, config, params), windows, skip)
