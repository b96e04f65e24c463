"""The n-gram baselines: how likely a token is by counting. One token's worth of doubt keeps everything possible."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def unigram(counts: NDArray[Any]) -> NDArray[np.float64]:
    """p(b) = (n(b) + 1) / (N + V), from the counts (V,) of N tokens."""
    return (counts + 1.0) / (counts.sum() + len(counts))


def bigram(pairs: NDArray[Any], before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    """p(b | a) = (n(a b) + p(b)) / (n(a) + 1), element by element.

    Args:
      pairs: n(a b).
      before: n(a), how often a token follows a.
      after: p(b), from `unigram`.
    """
    return (pairs + after) / (before + 1.0)
