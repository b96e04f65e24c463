"""The results of a sweep: its folder, and settings compared over their seeds.

sweep.json       the settings and the hash of the tokens; sealed
results.jsonl    a `program.Score` per line; replaced as a whole
best.json        the best setting as a config: jaxgpt train FOLDER/best.json --run NAME
*.png            plots
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np

from jaxgpt import files
from jaxgpt.config import UsageError
from jaxgpt.sweep.program import Score

LEVEL = 0.95
"""Probability that all intervals of a sweep hold at once."""
RESTART = "--name OTHER"


class SweepError(UsageError):
    """A sweep cannot be started or resumed."""


@dataclass
class SweepFolder:
    """A sweep on disk, locked by one process at a time."""

    path: Path
    scores: list[Score]  # of members that are finished or in training

    @classmethod
    @contextmanager
    def locked(cls, path: Path, identity: dict[str, Any]) -> Iterator["SweepFolder"]:
        """Create the folder, or resume the sweep in it, without the scores of unfinished members. A SweepError if it is
        in use, damaged, not a sweep, or a sweep of another `identity`: everything that the results depend on, as JSON.
        """
        others = path.is_file() or (path.is_dir() and any(e.name[0] != "." for e in path.iterdir()))
        if others and not (path / "sweep.json").exists():
            raise SweepError(f"{path} exists but is not a sweep: choose another folder, {RESTART}")
        path.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path / ".lock", timeout=0):
                _require_same(path / "sweep.json", identity)
                scores = _read(path / "results.jsonl")
                finished = {score.member for score in scores if score.done}
                yield cls(path, [score for score in scores if score.member in finished])
        except filelock.Timeout:
            raise SweepError(f"{path} is in use by another process; wait for it, or use {RESTART}") from None

    @property
    def finished(self) -> frozenset[int]:
        """Members that are done."""
        return frozenset(score.member for score in self.scores if score.done)

    def add(self, scores: Sequence[Score]) -> None:
        """Add the scores of unfinished members to results.jsonl."""
        finished = self.finished
        self.scores += [score for score in scores if score.member not in finished]
        lines = "".join(json.dumps(score._asdict()) + "\n" for score in self.scores)
        files.write_atomically(self.path / "results.jsonl", lines.encode())


def _require_same(file: Path, identity: dict[str, Any]) -> None:
    """Write the identity of a sweep to `file`, or check that it is the one in it."""
    if not file.exists():
        files.write_atomically(file, files.seal(identity).encode())
        return
    try:
        was, now = (_leaves(tree) for tree in (files.unseal(file.read_bytes()), json.loads(json.dumps(identity))))
    except files.SealError as error:
        raise SweepError(f"{file}: {error}; choose another folder, {RESTART}") from error
    if was != now:
        names = (name for name in {**was, **now} if was.get(name) != now.get(name))
        lines = "".join(f"\n  {name}: {was.get(name)!r} there, {now.get(name)!r} given" for name in names)
        raise SweepError(f"{file.parent} holds a sweep with other settings; {RESTART} starts a new one:{lines}")


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their path, joined with dots."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in leaves}


def _read(file: Path) -> list[Score]:
    try:
        return [Score(**json.loads(line)) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    except (ValueError, TypeError) as error:
        raise SweepError(
            f"{file} is damaged: {error}; each line must be a JSON object with {', '.join(Score._fields)}; remove it "
            "to train its members again"
        ) from error


class Outcome(NamedTuple):
    """A setting over its seeds; losses in nats per token."""

    setting: dict[str, Any]
    losses: dict[int, float]  # seed to last validation loss; NaN if diverged
    diverged: int  # number of seeds
    mean: float  # of the losses; NaN if one diverged
    standard_error: float  # of the mean; NaN for a single seed
    curve: list[tuple[int, float, float]]  # (step, mean, standard error) over the seeds that had not diverged


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of `values` and its standard error, NaN for a single one."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def outcomes(scores: Sequence[Score]) -> list[Outcome]:
    """The outcome of each setting, from all scores of its finished members: best first, diverged ones last."""
    by_setting: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        by_setting[json.dumps(score.setting)].append(score)
    found = []
    for alike in by_setting.values():
        by_step: dict[int, list[float]] = defaultdict(list)
        for score in alike:
            if score.val_loss is not None:
                by_step[score.step].append(score.val_loss)
        curve = [(step, *mean_and_error(losses)) for step, losses in sorted(by_step.items())]
        last = {score.seed: math.nan if score.val_loss is None else score.val_loss for score in alike if score.done}
        diverged = sum(map(math.isnan, last.values()))
        found.append(Outcome(alike[0].setting, last, diverged, *mean_and_error(list(last.values())), curve))
    return sorted(found, key=lambda outcome: (outcome.diverged > 0, outcome.mean))


def difference(best: Outcome, other: Outcome, settings: int = 2) -> tuple[float, int, tuple[float, float] | None]:
    """How much higher the loss of `other` is than that of `best`, paired by seed: members with the same seed train on
    the same windows. Neither may have diverged.

    Args:
      settings: number of settings that the best was chosen from. The Bonferroni correction over all pairs makes every
        interval hold at once.

    Returns:
      The mean in nats per token, the number of seeds that both have, and Student's t interval; None for a single seed.
    """
    from scipy.special import stdtrit  # the negative of scipy.stats.t.isf, whose import takes half a second

    differences = [other.losses[seed] - best.losses[seed] for seed in sorted(best.losses.keys() & other.losses.keys())]
    (mean, error), n = mean_and_error(differences), len(differences)
    if n < 2:
        return mean, n, None
    margin = -float(stdtrit(n - 1, (1 - LEVEL) / math.comb(settings, 2) / 2)) * error
    return mean, n, (mean - margin, mean + margin)
