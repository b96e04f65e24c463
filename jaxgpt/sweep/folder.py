"""The folder of a sweep: what was asked for, and a line for each evaluation of each member.

sweep.json       what was asked, and of which tokens; sealed
results.jsonl    a line per member per evaluation, replaced as a whole: never torn
best.json        the best setting as a config: jaxgpt train FOLDER/best.json --run NAME
*.png            plots
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from jaxgpt import files as disk
from jaxgpt.cli import runs
from jaxgpt.config import Config, UsageError, replaced
from jaxgpt.corpus import Corpus
from jaxgpt.sweep import program as sweep
from jaxgpt.sweep.grid import Member

LINE = {"member", "setting", "seed", "step", "val_loss", "done"}
"""What every line of results.jsonl has, and what is read of it."""


class SweepError(UsageError):
    """A sweep cannot be made, or gone on with."""


@dataclass
class SweepFolder:
    """A sweep on disk, held by one process at a time."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of finished members, and of those that are being trained."""

    @classmethod
    @contextmanager
    def held(cls, path: Path, asked: dict[str, Any], restart: str) -> Iterator["SweepFolder"]:
        """Make the folder, or go on with the one that is there: lines of members that were cut off are dropped.

        Args:
          asked: all that the results depend on, as JSON.
          restart: the option that names another folder.

        Raises:
          SweepError: another process holds it, it is of another sweep, or it was damaged.
        """
        if path.is_dir() and not (path / "sweep.json").exists() and any(e.name != ".lock" for e in path.iterdir()):
            raise SweepError(f"{path} exists and is no sweep: name another folder, {restart}")
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise SweepError(f"{path} is in use by another process; wait for it, or name another: {restart}") from None
        with lock:
            cls._require_same(path, asked, restart)
            found = cls(path, cls._read(path / "results.jsonl"))
            finished = found.finished
            found.lines = [line for line in found.lines if line["member"] in finished]
            yield found

    @property
    def finished(self) -> frozenset[int]:
        """Members that have come to their ends."""
        return frozenset(line["member"] for line in self.lines if line["done"])

    def add(self, members: Sequence[Member], scores: Sequence[sweep.Scored]) -> list[dict[str, Any]]:
        """Write the lines of scores, beside all others; these lines."""
        new = [_line(members[score.member], score) for score in scores]
        self.lines += new
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        disk.write_atomically(self.path / "results.jsonl", text.encode())
        return new

    def train(
        self,
        members: Sequence[Member],
        corpus: Corpus,
        devices: Sequence[Any],
        at_once: int = 0,
        watch: Callable[[sweep.Progress | list[dict[str, Any]]], None] = lambda event: None,
    ) -> None:
        """Train the members that are not finished; `watch` is told of progress, and of the lines that are written."""
        configs = [member.config for member in members]
        for event in sweep.run(configs, corpus, devices, at_once, self.finished):
            watch(event if isinstance(event, sweep.Progress) else self.add(members, event))

    @staticmethod
    def _require_same(path: Path, asked: dict[str, Any], restart: str) -> None:
        file = path / "sweep.json"
        if not file.exists():
            disk.write_atomically(file, disk.seal(asked).encode())
            return
        try:
            before = disk.unseal(file.read_bytes())
        except disk.SealError as error:
            raise SweepError(f"{file}: {error}; name another folder, {restart}") from error
        was, now = dict(_leaves(before)), dict(_leaves(json.loads(json.dumps(asked))))
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if names:
            lines = [f"  {name}: {was.get(name)!r} there, {now.get(name)!r} asked for" for name in names]
            raise SweepError(
                f"{path} holds a sweep of other settings; {restart} begins a new one:\n" + "\n".join(lines)
            )

    @staticmethod
    def _read(file: Path) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
            if not all(isinstance(line, dict) and line.keys() >= LINE for line in lines):
                raise ValueError(f"a line without some of {', '.join(sorted(LINE))}")
        except ValueError as error:
            raise SweepError(f"{file} was damaged: {error}; remove it to train its members again") from error
        return lines


def prepare(base: Config, members: Sequence[Member], data_dir: Path) -> tuple[list[Member], Corpus]:
    """The text of a sweep, and its members complete, as `runs.resolve` makes a run's config.

    Raises:
      UsageError: as `runs.tokens_of`.
    """
    longest = max(member.config.model.block_size for member in members)
    corpus = runs.tokens_of(replaced(base, block_size=longest), data_dir)
    return [dataclasses.replace(each, config=runs.resolve(each.config, corpus)) for each in members], corpus


def _line(member: Member, score: sweep.Scored) -> dict[str, Any]:
    """A member after some steps; null stands for what is no number."""
    found = score.evaluation
    values = {"loss": None, "standard_error": None, "bits_per_char": None, "bits_per_byte": None}
    if found:
        values = {name: x if math.isfinite(x := getattr(found, name)) else None for name in values}
    return {
        "member": score.member,
        "setting": member.setting,
        "seed": member.config.train.seed,
        "step": score.step,
        **{f"val_{name}": value for name, value in values.items()},
        "train_loss": score.train_loss,
        "diverged": found is None,
        "done": score.done,
    }


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested dicts that is none itself."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{path}.{name}".lstrip("."))
