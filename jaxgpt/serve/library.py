"""The runs that are served: listed, described and opened by name."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt.cli.places import local_path
from jaxgpt.config import UsageError
from jaxgpt.monitor import cost
from jaxgpt.run import Run, RunError


@lru_cache(256)
def _opened(path: Path) -> Run:
    run = Run(path)
    _ = run.config, run.tokenizer  # cached: read both before the files can change
    return run


@dataclass(frozen=True)
class Library:
    """The runs of a folder, or `only` one of them."""

    folder: Path
    only: str | None = None

    @classmethod
    def at(cls, name: str | None, runs_dir: Path) -> "Library":
        """The runs of `jaxgpt serve NAME`: one run, by its name or folder, or all runs of a folder (`runs_dir`).

        Raises:
          RunError: there is no such run or folder.
        """
        path = local_path(name or runs_dir)
        is_run = (name and Run.exists(runs_dir, name)) or (path / "config.json").is_file()
        if not is_run and any(path.glob("*/config.json")):
            return cls(path)
        path = Run.open(runs_dir, name or str(path)).path.resolve()
        library = cls(path.parent, path.name)
        library.run(path.name)
        return library

    @property
    def names(self) -> list[str]:
        """All runs, the newest first."""
        if self.only:
            return [self.only]
        configs = sorted(self.folder.glob("[!.]*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.parent.name for path in configs]

    def run(self, name: str) -> Run:
        """A run by its name, as it was when it was first asked for.

        Raises:
          RunError: there is no such run.
          UsageError: its files cannot be read.
        """
        if self.only and name != self.only:
            raise RunError(f"no run {name!r}: only {self.only!r} is served")
        return _opened(self.folder / name if self.only else Run.named(self.folder, name).path)

    def summary(self, name: str) -> dict[str, Any]:
        """What the page shows of a run, with a `problem` if it cannot be used."""
        try:
            run = self.run(name)
        except UsageError as error:
            return {"name": name, "problem": str(error)}
        model, is_gpt = run.config.model, run.config.model.kind == "gpt"
        saved = any(path.name.isdigit() for path in run.checkpoints.glob("*"))
        return {
            "name": name,
            "kind": model.kind,
            "parameters": cost.n_params(model),
            "block_size": model.block_size,
            "vocabulary": run.tokenizer.vocab_size,
            "start": "\n" if run.tokenizer.knows("\n").all() else run.tokenizer.decode([0]),
            "corpus": run.corpus_meta["source"],
            "layers": model.n_layer if is_gpt else 0,
            "heads": model.n_head if is_gpt else 0,
        } | ({} if saved else {"problem": "it has no checkpoint yet"})
