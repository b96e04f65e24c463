"""Losses to compare with: of uniform guesses, and of unigram and bigram counts."""

import math

import numpy as np
from numpy.typing import NDArray

from jaxgpt.tokenizer import Ids

COUNTED, STRETCHES = 2**24, 64
"""Tokens counted or scored of a larger split, and the number of evenly spaced stretches that they come from."""


def ngram_losses(train: Ids, val: Ids, V: int) -> dict[str, float]:
    """The nats per token of each baseline: counted in `train` (N,), scored on all of `val` (M,) but its first token. So
    that no token is impossible, p(b) = (n(b) + 1) / (N + V) and p(b | a) = (n(a b) + p(b)) / (n(a) + 1), of counts n,
    n(a) if a token follows."""
    counted = stretches(train)
    counts = np.bincount(np.concatenate(counted), minlength=V)
    p = (counts + 1.0) / (counts.sum() + V)
    (first, second), (before, after) = _pairs(counted), _pairs(stretches(val))
    found, times = np.unique(first * V + second, return_counts=True)
    pairs = before * V + after
    at = np.searchsorted(found[:-1], pairs)  # without the last, so that every index is valid
    n_pairs = np.where(found[at] == pairs, times[at], 0)
    given = (n_pairs + p[after]) / (np.bincount(first, minlength=V)[before] + 1.0)
    losses = {"unigram counts": -np.log(p[after]).mean(), "bigram counts": -np.log(given).mean()}
    return {"uniform": math.log(V), **{name: float(loss) for name, loss in losses.items()}}


def stretches(tokens: Ids) -> list[NDArray[np.int64]]:
    """All `tokens` (N,), or evenly spaced stretches of more than COUNTED, so that each part of a mixture counts."""
    size = len(tokens) if len(tokens) <= COUNTED else COUNTED // STRETCHES
    starts = np.linspace(0, len(tokens) - size, 1 if size == len(tokens) else STRETCHES).astype(int)
    return [np.asarray(tokens[start : start + size]).astype(np.int64) for start in starts]


def _pairs(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each token that another follows in its stretch, and the token after it."""
    return np.concatenate([part[:-1] for part in parts]), np.concatenate([part[1:] for part in parts])
