"""What can be reached without a model: the losses of guessing and of counting, and what others have published."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.text.tokenizer import Ids

COUNTED = 2**24
"""Of a larger training split, so many of its first tokens are counted."""

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
    """Count in `train` (N,) and score `val` (M,), all but its first token.

    With n counts and N tokens, p(b) = (n(b) + 1) / (N + V) and p(b | a) = (n(a b) + p(b)) / (n(a) + 1): one token's
    worth of doubt each, so that nothing is impossible.
    """
    train, val = np.asarray(train[:COUNTED]).astype(np.int64), np.asarray(val[: COUNTED + 1]).astype(np.int64)
    single = (np.bincount(train, minlength=V) + 1.0) / (len(train) + V)
    before, after = val[:-1], val[1:]
    n_before = np.bincount(train[:-1], minlength=V)
    pairs = (_counts(train[:-1] * V + train[1:], before * V + after) + single[after]) / (n_before[before] + 1.0)
    return Limits(math.log(V), float(-np.log(single[after]).mean()), float(-np.log(pairs).mean()))


def _counts(where: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """How often each of `wanted` is in `where`."""
    found, counts = np.unique(where, return_counts=True)
    places = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    return np.where(found[places] == wanted, counts[places], 0)


def published(meta: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """(who, nats per token) of what is known for the corpus that a tokens.json describes."""
    return PUBLISHED.get((meta["source"], meta["tokenizer"]["kind"]), ())
