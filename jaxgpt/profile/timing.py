"""Timing in rounds (A B C A B C).

A machine's speed drifts. A slow round slows all contestants alike, so ratios are taken within a round.
"""

import statistics
import time
from collections.abc import Callable, Sequence

Series = dict[str, float]
"""`median`, `low` (minimum), `high` (maximum) and `n`, the number of values."""
Rates = dict[str, list[float]]
"""Name -> units of work per second in each round."""


def series(values: Sequence[float]) -> Series:
    """
    >>> series([3.0, 1.0, 2.0, 10.0])
    {'median': 2.5, 'low': 1.0, 'high': 10.0, 'n': 4}
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Series:
    """`ours` / `theirs`, round by round.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'low': 2.0, 'high': 3.0, 'n': 3}
    """
    return series([a / b for a, b in zip(ours, theirs, strict=True)])


def repeat(run: Callable[[], int], seconds: float, wait: Callable[[], None] = lambda: None) -> tuple[int, float]:
    """Call `run` until `seconds` have passed, at least once, then `wait`: (sum of its results, seconds it took)."""
    units, began = 0, time.perf_counter()
    while not units or time.perf_counter() - began < seconds:
        units += run()
    wait()
    return units, time.perf_counter() - began
