"""Losses without a model: uniform, unigram and bigram counts, and published figures."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.tokenizer import Ids

COUNTED, STRETCHES = 2**24, 64
"""Of a larger split, only this many tokens are counted or scored, in this many evenly spaced stretches."""

PUBLISHED = {
    ("shakespeare", "char"): (
        ("nanoGPT, its CPU settings, by random batches", 1.88),
        ("nanoGPT, its GPU settings, by random batches", 1.4697),
    )
}
"""(corpus, tokenizer) to figures in nats per token, from the README of github.com/karpathy/nanoGPT."""


@dataclass(frozen=True)
class Limits:
    """Loss on the validation split, nats per token."""

    uniform: float
    """log V."""
    unigram: float
    """From the frequency of each token in the training split."""
    bigram: float
    """From the frequency of each token after the one before it."""


def unigram(counts: NDArray[Any]) -> NDArray[np.float64]:
    """p(b) = (n(b) + 1) / (N + V), from the counts (V,) of N tokens."""
    return (counts + 1.0) / (counts.sum() + len(counts))


def bigram(pairs: NDArray[Any], before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    """p(b | a) = (n(a b) + p(b)) / (n(a) + 1), element by element: no token is impossible.

    Args:
      pairs: n(a b).
      before: n(a), how often a token follows a.
      after: p(b), from `unigram`.
    """
    return (pairs + after) / (before + 1.0)


def limits(train: Ids, val: Ids, V: int) -> Limits:
    """Count in `train` (N,), and score all of `val` (M,) but its first token."""
    counted = stretches(train)
    single = unigram(occurrences(counted, V))
    (first, second), (before, after) = _pairs(counted), _pairs(stretches(val))
    n_before = np.bincount(first, minlength=V)
    pairs = bigram(_counts(first * V + second, before * V + after), n_before[before], single[after])
    return Limits(math.log(V), float(-np.log(single[after]).mean()), float(-np.log(pairs).mean()))


def stretches(tokens: Ids) -> list[NDArray[np.int64]]:
    """`tokens` (N,) whole, or of more than COUNTED evenly spaced stretches, so that each part of a mixture counts."""
    size = len(tokens) if len(tokens) <= COUNTED else COUNTED // STRETCHES
    starts = np.linspace(0, len(tokens) - size, 1 if size == len(tokens) else STRETCHES).astype(int)
    return [np.asarray(tokens[start : start + size]).astype(np.int64) for start in starts]


def occurrences(parts: list[NDArray[np.int64]], V: int) -> NDArray[np.int64]:
    """How often each id occurs in `parts`, (V,)."""
    return np.sum([np.bincount(part, minlength=V) for part in parts], axis=0, dtype=np.int64)


def _pairs(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All tokens that have a successor in their part, and the successors."""
    return np.concatenate([part[:-1] for part in parts]), np.concatenate([part[1:] for part in parts])


def _counts(where: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """How often each of `wanted` occurs in `where`."""
    found, counts = np.unique(where, return_counts=True)
    places = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    return np.where(found[places] == wanted, counts[places], 0)


def published(meta: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """(source, nats per token) of each figure that is known for the corpus of a tokens.json."""
    return PUBLISHED.get((meta["source"], meta["tokenizer"]["kind"]), ())
