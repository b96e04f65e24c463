"""The results of a sweep: its folder, and settings compared over their seeds.

sweep.json       the settings and the hash of the tokens; sealed
results.jsonl    a line per member and evaluation; the file is replaced as a whole
best.json        the best setting as a config: jaxgpt train FOLDER/best.json --run NAME
*.png            plots
"""

import json
import math
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
from jaxgpt.corpus import Corpus
from jaxgpt.sweep import program as sweep
from jaxgpt.sweep.grid import Member

LEVEL = 0.95
"""The probability that all intervals of a sweep hold at once."""
RESTART = "--name OTHER"
LINE = {"member", "setting", "seed", "step", "val_loss", "done"}
"""The fields of results.jsonl that are read."""


class SweepError(UsageError):
    """A sweep cannot be started or resumed."""


@dataclass
class SweepFolder:
    """A sweep on disk, locked by one process at a time."""

    path: Path
    lines: list[dict[str, Any]]
    """Results of finished members and of those in training."""

    @classmethod
    @contextmanager
    def held(cls, path: Path, asked: dict[str, Any]) -> Iterator["SweepFolder"]:
        """Make the folder, or resume the sweep in it, without the results of unfinished members.

        Args:
          asked: everything that the results depend on, as JSON.

        Raises:
          SweepError: another process holds the folder, it is another sweep's, or it is damaged.
        """
        if path.is_dir() and not (path / "sweep.json").exists() and any(e.name != ".lock" for e in path.iterdir()):
            raise SweepError(f"{path} exists but is not a sweep: choose another folder, {RESTART}")
        path.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path / ".lock", timeout=0):
                _require_same(path / "sweep.json", asked)
                lines = _read(path / "results.jsonl")
                finished = {line["member"] for line in lines if line["done"]}
                yield cls(path, [line for line in lines if line["member"] in finished])
        except filelock.Timeout:
            raise SweepError(f"{path} is in use by another process; wait for it, or use {RESTART}") from None

    @property
    def finished(self) -> frozenset[int]:
        """Members that ended."""
        return frozenset(line["member"] for line in self.lines if line["done"])

    def add(self, members: Sequence[Member], scores: Sequence[sweep.Scored]) -> None:
        """Add scores to results.jsonl."""
        self.lines += [_line(members[score.member], score) for score in scores]
        files.write_atomically(self.path / "results.jsonl", "".join(json.dumps(x) + "\n" for x in self.lines).encode())

    def train(
        self, members: Sequence[Member], corpus: Corpus, devices: Sequence[Any], at_once: int
    ) -> Iterator[int | list[sweep.Scored]]:
        """Train the unfinished members; yields as `program.run`, scores once they are on disk."""
        for event in sweep.run([member.config for member in members], corpus, devices, at_once, self.finished):
            if isinstance(event, list):
                self.add(members, event)
            yield event


def _require_same(file: Path, asked: dict[str, Any]) -> None:
    """Write what is asked, or check that it is what is there."""
    if not file.exists():
        files.write_atomically(file, files.seal(asked).encode())
        return
    try:
        was, now = (_leaves(tree) for tree in (files.unseal(file.read_bytes()), json.loads(json.dumps(asked))))
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


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
        if not all(isinstance(line, dict) and line.keys() >= LINE for line in lines):
            raise ValueError(f"a line must have {', '.join(sorted(LINE))}")
    except ValueError as error:
        raise SweepError(f"{file} is damaged: {error}; remove it to train its members again") from error
    return lines


def _line(member: Member, score: sweep.Scored) -> dict[str, Any]:
    """The line of a score; null for non-finite numbers."""
    found, names = score.evaluation, ("loss", "standard_error", "bits_per_char", "bits_per_byte")
    values = [getattr(found, name, math.nan) for name in names]
    return {
        "member": score.member,
        "setting": member.setting,
        "seed": member.config.train.seed,
        "step": score.step,
        **{f"val_{name}": x if math.isfinite(x) else None for name, x in zip(names, values, strict=True)},
        "train_loss": score.train_loss,
        "diverged": found is None,
        "done": score.done,
    }


class Outcome(NamedTuple):
    setting: dict[str, Any]
    losses: dict[int, float]  # of each seed: the last over the whole validation split, nats per token; nan if diverged
    curve: tuple[tuple[int, float, float], ...]  # (step, mean, standard error) of each evaluation that did not diverge

    @property
    def mean(self) -> float:
        """Over the seeds; nan if one diverged."""
        return float(np.mean(list(self.losses.values())))

    @property
    def standard_error(self) -> float:
        """Of the mean over the seeds; nan for a single one."""
        return standard_error(list(self.losses.values()))

    @property
    def diverged(self) -> int:
        return sum(math.isnan(loss) for loss in self.losses.values())


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; nan for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def outcomes(lines: Sequence[dict[str, Any]]) -> list[Outcome]:
    """The outcome of each setting, from the lines of finished members: best first, diverged ones last."""
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_setting.setdefault(json.dumps(line["setting"]), []).append(line)
    found = []
    for mine in by_setting.values():
        steps: dict[int, list[float]] = {}
        for line in mine:
            if line["val_loss"] is not None:
                steps.setdefault(line["step"], []).append(line["val_loss"])
        curve = tuple((step, float(np.mean(each)), standard_error(each)) for step, each in sorted(steps.items()))
        last = {line["seed"]: line["val_loss"] for line in mine if line["done"]}
        losses = {seed: math.nan if loss is None else loss for seed, loss in last.items()}
        found.append(Outcome(mine[0]["setting"], losses, curve))
    return sorted(found, key=lambda outcome: (math.isnan(outcome.mean), outcome.mean))


def difference(best: Outcome, other: Outcome, settings: int = 2) -> tuple[float, int, tuple[float, float] | None]:
    """How much higher the loss of `other` is than that of `best`, neither diverged, paired by seed: members with the
    same seed see the same windows.

    Args:
      settings: how many settings the best was chosen from by these losses. The Bonferroni correction over all pairs
        makes the interval hold for whichever pair is looked at.

    Returns:
      The mean in nats per token, the number of seeds that both have, and Student's t interval of the mean; None for
      fewer than two seeds.
    """
    from scipy.stats import t

    higher = [other.losses[seed] - best.losses[seed] for seed in sorted(best.losses.keys() & other.losses.keys())]
    mean, n = float(np.mean(higher)), len(higher)
    if n < 2:
        return mean, n, None
    tail = (1 - LEVEL) / math.comb(settings, 2) / 2
    around = float(t.isf(tail, n - 1)) * standard_error(higher)
    return mean, n, (mean - around, mean + around)
