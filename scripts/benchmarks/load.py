"""The share of the machine that other programs took during a measurement."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

QUIET = 0.1
"""Share of the machine from which other programs disturb a measurement."""


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
