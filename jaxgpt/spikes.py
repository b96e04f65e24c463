"""Losses that leap out of those before them."""

import math
from collections import deque

WINDOW, FEWEST, DEVIATIONS = 100, 50, 6.0
"""A loss is compared with the last 100, once there are 50; it leaps at 6 of their standard deviations above their
mean, of at least a hundredth of it each."""


class Spikes:
    """Watches the losses of a run, one step after another."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._high = False

    def leap(self, loss: float) -> float | None:
        """The mean of the losses before `loss` if it leaps out of them, None if it does not.

        A loss that stays high is told of once. What is no number belongs to nothing and is passed over.
        """
        if not math.isfinite(loss):
            return None
        n, before = len(self._recent), self._recent
        mean = sum(before) / n if n else 0.0
        deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / (n - 1)) if n > 1 else 0.0
        deviation = max(deviation, 0.01 * abs(mean))
        was_high, self._high = self._high, n >= FEWEST and loss > mean + DEVIATIONS * deviation
        before.append(loss)
        return mean if self._high and not was_high else None
