"""The runs that are served: found in a folder, told of, opened by name."""

import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxgpt import cost
from jaxgpt.config import UsageError
from jaxgpt.run import Run, RunError

REMEMBERED = 256
"""How many runs' configurations and vocabularies are kept in memory."""


@dataclass(frozen=True)
class Served(Run):
    """A run as it was made at one time: one that is made anew under its name is another."""

    made: int
    """When its config.json was written, in ns."""


@dataclass
class Library:
    """The runs of a folder, or one of them."""

    folder: Path
    only: str | None = None
    _opened: OrderedDict[Served, Served] = field(default_factory=OrderedDict)

    @classmethod
    def at(cls, name: str, runs_dir: Path) -> "Library":
        """What `jaxgpt serve NAME` serves: a run, by its name or folder, or all runs of a folder.

        Raises:
          RunError: it is neither.
        """
        path = Path(os.path.expanduser(name))
        is_run = Run.exists(runs_dir, name) or (path / "config.json").is_file()
        if not is_run and any(path.glob("*/config.json")):
            return cls(path)
        run = Run.open(runs_dir, name)
        library = cls(run.path.resolve().parent, run.path.resolve().name)
        library.run(run.path.resolve().name)
        return library

    @property
    def names(self) -> list[str]:
        """Of all runs, the one that was last saved first."""
        if self.only:
            return [self.only]
        found = [path.parent for path in self.folder.glob("*/config.json") if path.parent.name[0] != "."]
        return [path.name for path in sorted(found, key=lambda path: (-_changed(path), path.name))]

    def run(self, name: str) -> Served:
        """The run of that name.

        Raises:
          RunError: there is none, or what it says of itself cannot be read.
        """
        if self.only and name != self.only:
            raise RunError(f"no run {name!r}: {self.only!r} is served")
        path = Run.named(self.folder, name).path
        run = Served(path, (path / "config.json").stat().st_mtime_ns)
        run = self._opened.setdefault(run, run)
        _ = run.config, run.tokenizer  # read now, so that a later look cannot fail
        self._opened.move_to_end(run)
        while len(self._opened) > REMEMBERED:
            self._opened.popitem(last=False)
        return run

    def summaries(self) -> list[dict[str, Any]]:
        """What a person wants to know of each run before choosing one; of one that cannot be read, why."""
        return [self._summary(name) for name in self.names]

    def _summary(self, name: str) -> dict[str, Any]:
        try:
            run = self.run(name)
        except (UsageError, OSError, ValueError) as error:
            return {"name": name, "problem": str(error)}
        model = run.config.model
        told = {
            "name": name,
            "kind": model.kind,
            "parameters": cost.n_params(model),
            "block_size": model.block_size,
            "layers": model.n_layer if model.kind == "gpt" else 0,
            "heads": model.n_head if model.kind == "gpt" else 0,
            "vocabulary": run.tokenizer.vocab_size,
            "start": "\n" if run.tokenizer.knows("\n").all() else run.tokenizer.decode([0]),
            "corpus": run.corpus_meta["source"],
        }
        if not any(path.name.isdigit() for path in run.checkpoints.glob("*")):
            told["problem"] = "nothing was saved yet"
        return told


def _changed(run: Path) -> float:
    """When a run was last saved."""
    for path in (run / "checkpoints", run):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0  # it has just gone
