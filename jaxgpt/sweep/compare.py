"""Settings of a sweep compared over their seeds: means, standard errors, and paired differences with intervals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
"""The probability with which all intervals of a sweep hold at once."""


@dataclass(frozen=True)
class Outcome:
    """What the members of one setting came to."""

    setting: dict[str, Any]
    losses: dict[int, float]
    """Seed to its last loss over the whole validation split, in nats per token; nan where it has diverged."""
    curve: tuple[tuple[int, float, float], ...]
    """(step, mean, standard error) of each evaluation of those that have not."""

    @property
    def mean(self) -> float:
        """Over the seeds; nan where one has diverged."""
        return float(np.mean(list(self.losses.values()))) if self.losses else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean, over the seeds; nan for a single one."""
        return standard_error(list(self.losses.values()))

    @property
    def diverged(self) -> int:
        return sum(math.isnan(loss) for loss in self.losses.values())


@dataclass(frozen=True)
class Difference:
    """How much higher the loss of one setting is than that of another, seed by seed: members of one seed see the same
    windows."""

    mean: float
    """In nats per token."""
    n: int
    """Seeds."""
    interval: tuple[float, float] | None
    """Student's t interval of the mean, which covers the true one with probability LEVEL; None for fewer than two
    seeds."""


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; nan for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def outcomes(lines: Sequence[dict[str, Any]], *, so_far: bool = False) -> list[Outcome]:
    """The outcome of each setting that has finished members, best first, those that diverged last.

    Args:
      so_far: the newest score of each member, finished or not.
    """
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_setting.setdefault(json.dumps(line["setting"]), []).append(line)
    found = []
    for mine in by_setting.values():
        losses = {line["seed"]: _loss(line) for line in mine if so_far or line["done"]}
        steps: dict[int, list[float]] = {}
        for line in mine:
            if not math.isnan(loss := _loss(line)):
                steps.setdefault(line["step"], []).append(loss)
        curve = tuple((step, float(np.mean(each)), standard_error(each)) for step, each in sorted(steps.items()))
        if losses:
            found.append(Outcome(mine[0]["setting"], losses, curve))
    return sorted(found, key=lambda outcome: (math.isnan(outcome.mean), outcome.mean))


def difference(best: Outcome, other: Outcome, settings: int = 2) -> Difference:
    """The losses of `other` less those of `best`, neither of which has diverged, over the seeds that both have.

    Args:
      settings: from how many the best was chosen by these same losses. The chance that any interval of a sweep misses
        is shared by all pairs of settings (Bonferroni), so it holds for whichever pair is looked at afterwards.
    """
    from scipy.stats import t

    seeds = sorted(best.losses.keys() & other.losses.keys())
    higher = [other.losses[seed] - best.losses[seed] for seed in seeds]
    mean = float(np.mean(higher)) if seeds else math.nan
    if len(seeds) < 2:
        return Difference(mean, len(seeds), None)
    tail = (1 - LEVEL) / math.comb(settings, 2) / 2
    around = float(t.isf(tail, len(seeds) - 1)) * standard_error(higher)
    return Difference(mean, len(seeds), (mean - around, mean + around))


def _loss(line: dict[str, Any]) -> float:
    return math.nan if line["val_loss"] is None else float(line["val_loss"])
