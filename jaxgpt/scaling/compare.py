"""Settings of a sweep compared over their seeds: means, standard errors, and how sure the best one is."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


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


def confidence(best: Outcome, other: Outcome, resamples: int = RESAMPLES) -> float | None:
    """How often the mean of `best` is below that of `other` when the seeds that both have are drawn again, with
    replacement (Efron 1979); ties count half. Pairs stay together: members of one seed see the same windows.

    None with fewer than two seeds in common.
    """
    seeds = sorted(best.losses.keys() & other.losses.keys())
    if len(seeds) < 2:
        return None
    ahead: NDArray[np.float64] = np.array([other.losses[seed] - best.losses[seed] for seed in seeds])
    if np.isnan(ahead).any():
        return 1.0
    drawn = np.random.Generator(np.random.Philox(0)).integers(len(seeds), size=(resamples, len(seeds)))
    means = ahead[drawn].mean(axis=1)
    return float((means > 0).mean() + (means == 0).mean() / 2)


def _loss(line: dict[str, Any]) -> float:
    return math.nan if line["val_loss"] is None else float(line["val_loss"])
