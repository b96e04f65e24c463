"""The results of a sweep: its folder, and settings compared over their seeds.

sweep.json       the settings and the hash of the tokens; sealed
results.jsonl    a line per member and evaluation; the file is replaced as a whole
best.json        the best setting as a config: jaxgpt train FOLDER/best.json --run NAME
*.png            plots
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from jaxgpt import files
from jaxgpt.cli import runs
from jaxgpt.config import Config, UsageError, replaced
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
    """A sweep on files, locked by one process at a time."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
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
                found = cls(path, _read(path / "results.jsonl"))
                finished = found.finished
                found.lines = [line for line in found.lines if line["member"] in finished]
                yield found
        except filelock.Timeout:
            raise SweepError(f"{path} is in use by another process; wait for it, or use {RESTART}") from None

    @property
    def finished(self) -> frozenset[int]:
        """Members that ended."""
        return frozenset(line["member"] for line in self.lines if line["done"])

    def add(self, members: Sequence[Member], scores: Sequence[sweep.Scored]) -> list[dict[str, Any]]:
        """Add scores to results.jsonl; returns their lines."""
        new = [_line(members[score.member], score) for score in scores]
        self.lines += new
        files.write_atomically(self.path / "results.jsonl", "".join(json.dumps(x) + "\n" for x in self.lines).encode())
        return new

    def train(
        self,
        members: Sequence[Member],
        corpus: Corpus,
        devices: Sequence[Any],
        at_once: int = 0,
        watch: Callable[[sweep.Progress | list[dict[str, Any]]], None] = lambda event: None,
    ) -> None:
        """Train the unfinished members; `watch` gets their progress and the lines that are written."""
        for event in sweep.run([member.config for member in members], corpus, devices, at_once, self.finished):
            watch(event if isinstance(event, sweep.Progress) else self.add(members, event))


def _require_same(file: Path, asked: dict[str, Any]) -> None:
    """Write what is asked, or check that it is what is there."""
    if not file.exists():
        files.write_atomically(file, files.seal(asked).encode())
        return
    try:
        before = files.unseal(file.read_bytes())
    except files.SealError as error:
        raise SweepError(f"{file}: {error}; choose another folder, {RESTART}") from error
    was, now = dict(_leaves(before)), dict(_leaves(json.loads(json.dumps(asked))))
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names:
        lines = [f"  {name}: {was.get(name)!r} there, {now.get(name)!r} given" for name in names]
        raise SweepError(
            f"{file.parent} holds a sweep with other settings; {RESTART} starts a new one:\n" + "\n".join(lines)
        )


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
        if not all(isinstance(line, dict) and line.keys() >= LINE for line in lines):
            raise ValueError(f"a line must have {', '.join(sorted(LINE))}")
    except ValueError as error:
        raise SweepError(f"{file} is damaged: {error}; remove it to train its members again") from error
    return lines


def prepare(base: Config, members: Sequence[Member], data_dir: Path) -> tuple[list[Member], Corpus]:
    """The corpus of a sweep, and its members with configs completed by `runs.resolve`.

    Raises:
      UsageError: as `runs.tokens_of`.
    """
    longest = max(member.config.model.block_size for member in members)
    corpus = runs.tokens_of(replaced(base, block_size=longest), data_dir)
    return [each._replace(config=runs.resolve(each.config, corpus)) for each in members], corpus


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


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of the leaves of nested dicts."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{path}.{name}".lstrip("."))


class Outcome(NamedTuple):
    setting: dict[str, Any]
    losses: dict[int, float]  # of each seed: the last over the whole validation split, nats per token; nan if diverged
    curve: tuple[tuple[int, float, float], ...]  # (step, mean, standard error) of each evaluation that did not diverge

    @property
    def mean(self) -> float:
        """Over the seeds; nan if one diverged."""
        return float(np.mean(list(self.losses.values()))) if self.losses else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean over the seeds; nan for a single one."""
        return standard_error(list(self.losses.values()))

    @property
    def diverged(self) -> int:
        return sum(math.isnan(loss) for loss in self.losses.values())


class Difference(NamedTuple):
    """How much higher the loss of one setting is than that of another, paired by seed: members with the same seed see
    the same windows."""

    mean: float  # in nats per token
    n: int  # seeds
    interval: tuple[float, float] | None  # Student's t interval of the mean; None for fewer than two seeds


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of `values`; nan for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def outcomes(lines: Sequence[dict[str, Any]], *, so_far: bool = False) -> list[Outcome]:
    """The outcome of each setting with finished members, best first, diverged ones last.

    Args:
      so_far: use the newest score of all members, finished or not.
    """
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
        last = {line["seed"]: line["val_loss"] for line in mine if so_far or line["done"]}
        if last:
            losses = {seed: math.nan if loss is None else loss for seed, loss in last.items()}
            found.append(Outcome(mine[0]["setting"], losses, curve))
    return sorted(found, key=lambda outcome: (math.isnan(outcome.mean), outcome.mean))


def difference(best: Outcome, other: Outcome, settings: int = 2) -> Difference:
    """The losses of `other` minus those of `best`, which must not have diverged, over the seeds that both have.

    Args:
      settings: how many settings the best was chosen from by these losses. The Bonferroni correction over all pairs
        makes the interval hold for whichever pair is looked at.
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
