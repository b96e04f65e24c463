"""Timing in rounds (A B C A B C), and the share of the machine that other programs took meanwhile.

A machine's speed drifts. A slow round slows all contestants alike, so ratios are taken within a round.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Series = dict[str, float]
"""`median`, `low` (minimum), `high` (maximum) and `n`, the number of values."""
Rates = dict[str, list[float]]
"""Name -> units of work per second in each round."""
QUIET = 0.1
"""Share of the machine from which other programs disturb a measurement."""


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


def machine_seconds() -> tuple[float, float] | None:
    """(busy seconds, all seconds), summed over the cores since boot; None without /proc."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and waiting for a disk


def others(before: tuple[float, float] | None, after: tuple[float, float] | None, own: float) -> float:
    """The share of the machine that other programs took between two readings of `machine_seconds`, in which we took
    `own` seconds; 0 if unknown.

    >>> others((100.0, 200.0), (108.0, 210.0), 6.0)
    0.2
    """
    if not before or not after or after[1] <= before[1]:
        return 0.0
    return max(0.0, after[0] - before[0] - own) / (after[1] - before[1])


def disturbance(shares: Sequence[float]) -> str:
    """A note on shares from `others`; none if the load is unknown."""
    if not shares:
        return "the load of other programs is unknown on this system"
    median, most = 100 * statistics.median(shares), 100 * max(shares)
    found = f"other programs took {median:.0f}% of the machine ({most:.0f}% at most)"
    return found if max(shares) < QUIET else f"NOT QUIET: {found}; measure again on a quiet machine"
