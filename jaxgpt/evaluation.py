"""Loss over a whole split: exact, deterministic, the same for every batch size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxgpt import matmul as numerics
from jaxgpt import model as nn
from jaxgpt import sharding
from jaxgpt.config import Config, ModelConfig
from jaxgpt.corpus import pieces_of
from jaxgpt.data import Batch, Ids, Starts, estimate_starts, take, windows
from jaxgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """The loss over every predicted token of a split."""

    loss: float
    """Nats per token."""
    standard_error: float
    """Of `loss`, over windows; nan for a single window."""
    bits_per_char: float
    bits_per_byte: float
    n_tokens: int
    """How many tokens were predicted: all but the first."""


def evaluate(
    config: ModelConfig, params: nn.Params, tokens: Ids, tokenizer: Tokenizer, batch_size: int | None = None
) -> Evaluation:
    """Loss over the whole of `tokens` (N,) in windows of block_size, each of the N - 1 predictions counted once.

    The last window ends at the last token; what the window before it has counted already is left out.

    Args:
      batch_size: windows at once; None picks one. The result does not depend on it but for float32 reassociation.

    Raises:
      ValueError: fewer than block_size + 1 tokens.
    """
    starts, skip = windows(len(tokens), config.block_size)
    sums = loss_sums(config, params, tokens, starts, skip, batch_size)
    return evaluation(sums, config.block_size - skip, tokens, tokenizer)


def evaluation(sums: NDArray[np.float64], counts: Starts, tokens: Ids, tokenizer: Tokenizer) -> Evaluation:
    """From the summed loss of each window (n_windows,) and how many predictions that is, for all of `tokens`."""
    n = len(sums)
    loss = float(sums.sum() / counts.sum())
    # The loss is a ratio of two sums over windows; this is the standard error of such a ratio.
    deviations = sums - loss * counts
    error = math.sqrt((deviations**2).sum() / (n * (n - 1))) / float(counts.mean()) if n > 1 else math.nan
    n_chars, n_bytes = text_size(tokenizer, tokens[1:])
    bits = float(sums.sum()) / math.log(2)
    return Evaluation(loss, error, bits / n_chars, bits / n_bytes, int(counts.sum()))


def estimate(config: Config, params: nn.Params, tokens: Ids, step: int) -> float:
    """Mean loss over `eval_batches` random batches, as nanoGPT's estimate_loss: noisy, for comparison only.

    A pure function of (config, params, tokens, step), with a random stream of its own.
    """
    T, n = config.model.block_size, config.train.eval_batches * config.train.batch_size
    starts = estimate_starts(config.train.seed, step, len(tokens), T, n)
    return float(loss_sums(config.model, params, tokens, starts, np.zeros_like(starts)).sum() / (n * T))


def text_size(tokenizer: Tokenizer, tokens: Ids) -> tuple[int, int]:
    """Characters and bytes of the text that `tokens` stand for. A character counts where its first byte is."""
    counts = sum(np.bincount(piece, minlength=tokenizer.vocab_size) for piece in pieces_of(tokens))
    chars = np.array([sum(byte & 0xC0 != 0x80 for byte in data) for data in tokenizer.token_bytes])
    sizes = np.array([len(data) for data in tokenizer.token_bytes])
    return int(counts @ chars), int(counts @ sizes)


def loss_sums(
    config: ModelConfig,
    params: nn.Params,
    tokens: Ids,
    starts: Starts,
    skip: Starts,
    batch_size: int | None = None,
    *,
    side_by_side: int = 1,
    losses: Callable[..., jax.Array] | None = None,
) -> NDArray[np.float64]:
    """Summed loss of each window but for its first `skip` predictions, (n_windows,).

    Args:
      side_by_side: models that are scored at once on a device.
      losses: in place of `window_losses`; that of many models gives (M, B), and so here (M, n_windows).
    """
    T, n = config.block_size, len(starts)
    B = batch_size or rows_at_once(config, n, side_by_side)
    padding = (0, -n % B)  # a last batch of the same shape, so that one program serves
    sums = [
        (losses or window_losses)(config, params, take(tokens, starts, T), skip)
        for starts, skip in zip(
            np.pad(starts, padding).reshape(-1, B), np.pad(skip, padding).reshape(-1, B), strict=True
        )
    ]
    return np.concatenate(jax.device_get(sums), axis=-1).astype(np.float64)[..., :n]


def rows_at_once(config: ModelConfig, n: int, side_by_side: int = 1) -> int:
    """How many of n windows are scored in a batch: some 8,192 tokens on each device, fewer of a large vocabulary; of
    few windows a power of two of them, so that splits of like sizes share a program."""
    parts = sharding.parts("batch")
    most = max(1, min(8192, 2**26 // config.vocab_size) // config.block_size // side_by_side)
    return parts * min(most, max(32, 1 << (-(-n // parts) - 1).bit_length()))


@partial(jax.jit, static_argnums=0)
@numerics.in_32_bits
def window_losses(config: ModelConfig, params: nn.Params, batch: Batch, skip: jax.Array) -> jax.Array:
    """Summed loss of each window, (B,) float32, without its first `skip` (B,) predictions and without dropout."""
    losses = nn.losses(config, params, batch.inputs, batch.targets)
    counted = jnp.arange(losses.shape[1])[None, :] >= skip[:, None]
    return sharding.constrain(jnp.where(counted, losses, 0).sum(axis=1), None)
