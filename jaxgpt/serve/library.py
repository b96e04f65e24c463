"""The runs that are served: listed, described and opened by name."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt.config import UsageError
from jaxgpt.monitor import cost
from jaxgpt.run import Run, RunError


@dataclass(frozen=True)
class Served(Run):
    """A run as it was created at one time: a run created anew under the same name is a different one."""

    created: int
    """Modification time of its config.json, in ns."""


@lru_cache(256)
def _opened(path: Path, created: int) -> Served:
    run = Served(path, created)
    _ = run.config, run.tokenizer  # both are cached: read them before the files can change
    return run


@dataclass(frozen=True)
class Library:
    """The runs of a folder, or one of them."""

    folder: Path
    only: str | None = None

    @classmethod
    def at(cls, name: str, runs_dir: Path) -> "Library":
        """The runs of `jaxgpt serve NAME`: one run, by its name or folder, or all runs of a folder.

        Raises:
          RunError: it is neither.
        """
        path = Path(os.path.expanduser(name))
        is_run = Run.exists(runs_dir, name) or (path / "config.json").is_file()
        if not is_run and any(path.glob("*/config.json")):
            return cls(path)
        path = Run.open(runs_dir, name).path.resolve()
        library = cls(path.parent, path.name)
        library.run(path.name)
        return library

    @property
    def names(self) -> list[str]:
        """All runs, the most recently saved first."""
        if self.only:
            return [self.only]
        saved = {}
        for path in self.folder.glob("[!.]*/config.json"):
            changed = path.parent / "checkpoints"
            saved[path.parent.name] = changed.stat().st_mtime if changed.is_dir() else 0.0
        return sorted(saved, key=lambda name: (-saved[name], name))

    def run(self, name: str) -> Served:
        """The run of that name.

        Raises:
          RunError: there is no such run.
          UsageError, OSError, ValueError: its files cannot be read.
        """
        if self.only and name != self.only:
            raise RunError(f"no run {name!r}: {self.only!r} is served")
        path = Run.named(self.folder, name).path
        return _opened(path, (path / "config.json").stat().st_mtime_ns)

    def summary(self, name: str) -> dict[str, Any]:
        """What the page shows of a run, with the `problem` of one that cannot be used."""
        try:
            run = self.run(name)
        except (UsageError, OSError, ValueError) as error:
            return {"name": name, "problem": str(error)}
        model, newline = run.config.model, run.tokenizer.knows("\n").all()
        shape = {"layers": model.n_layer, "heads": model.n_head} if model.kind == "gpt" else {"layers": 0, "heads": 0}
        saved = any(path.name.isdigit() for path in run.checkpoints.glob("*"))
        return {
            "name": name,
            "kind": model.kind,
            "parameters": cost.n_params(model),
            "block_size": model.block_size,
            "vocabulary": run.tokenizer.vocab_size,
            "start": "\n" if newline else run.tokenizer.decode([0]),
            "corpus": run.corpus_meta["source"],
            **shape,
            **({} if saved else {"problem": "nothing was saved yet"}),
        }
