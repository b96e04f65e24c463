"""What can be reached without a model: the losses of guessing and of counting, and what others have published."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.display import ngrams
from jaxgpt.tokenizer import Ids

COUNTED, STRETCHES = 2**24, 64
"""Of a larger split, so many tokens are counted or scored, in so many stretches evenly apart."""

PUBLISHED = {
    ("shakespeare", "char"): (
        ("nanoGPT, its CPU settings, by random batches", 1.88),
        ("nanoGPT, its GPU settings, by random batches", 1.4697),
    )
}
"""(corpus, tokenizer) to figures in nats per token: the README of github.com/karpathy/nanoGPT."""


@dataclass(frozen=True)
class Limits:
    """Loss on the validation split, nats per token."""

    uniform: float
    """Every token equally likely: log V."""
    unigram: float
    """Each token as likely as it is frequent in the training split."""
    bigram: float
    """Each token as likely as it is frequent there after the token before it."""


def limits(train: Ids, val: Ids, V: int) -> Limits:
    """Count in `train` (N,) and score `val` (M,), all but its first token, by `text.ngrams`."""
    counted = stretches(train)
    single = ngrams.unigram(occurrences(counted, V))
    (first, second), (before, after) = _pairs(counted), _pairs(stretches(val))
    n_before = np.bincount(first, minlength=V)
    pairs = ngrams.bigram(_counts(first * V + second, before * V + after), n_before[before], single[after])
    return Limits(math.log(V), float(-np.log(single[after]).mean()), float(-np.log(pairs).mean()))


def stretches(tokens: Ids) -> list[NDArray[np.int64]]:
    """All of `tokens` (N,), or of more than COUNTED that many: any part of a text or of a mixture has its share."""
    size = len(tokens) if len(tokens) <= COUNTED else COUNTED // STRETCHES
    starts = np.linspace(0, len(tokens) - size, 1 if size == len(tokens) else STRETCHES).astype(int)
    return [np.asarray(tokens[start : start + size]).astype(np.int64) for start in starts]


def occurrences(parts: list[NDArray[np.int64]], V: int) -> NDArray[np.int64]:
    """How often each id is in `parts`, (V,)."""
    return np.sum([np.bincount(part, minlength=V) for part in parts], axis=0, dtype=np.int64)


def _pairs(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens of `parts` that another follows there, and those that follow them."""
    return np.concatenate([part[:-1] for part in parts]), np.concatenate([part[1:] for part in parts])


def _counts(where: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """How often each of `wanted` is in `where`."""
    found, counts = np.unique(where, return_counts=True)
    places = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    return np.where(found[places] == wanted, counts[places], 0)


def published(meta: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """(who, nats per token) of what is known for the corpus that a tokens.json describes."""
    return PUBLISHED.get((meta["source"], meta["tokenizer"]["kind"]), ())
