"""Settings of a sweep compared over their seeds: means, standard errors, and how sure the best one is."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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


def confidence(best: Outcome, other: Outcome) -> float | None:
    """How sure it is that the mean of `best` is below that of `other`: Student's t test of the differences over the
    seeds that both have, one-sided, 0 to 1. Seeds are paired: members of one seed see the same windows.

    None with fewer than two seeds in common.
    """
    from scipy.stats import t

    seeds = sorted(best.losses.keys() & other.losses.keys())
    if len(seeds) < 2:
        return None
    ahead = [other.losses[seed] - best.losses[seed] for seed in seeds]
    if any(map(math.isnan, ahead)):
        return 1.0
    mean, error = float(np.mean(ahead)), standard_error(ahead)
    if error == 0:
        return 0.5 if mean == 0 else float(mean > 0)
    return float(t.cdf(mean / error, len(seeds) - 1))


def _loss(line: dict[str, Any]) -> float:
    return math.nan if line["val_loss"] is None else float(line["val_loss"])
