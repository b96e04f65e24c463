"""The folder of a run: what is in it, how it is named, made and locked.

config.json      the whole configuration
tokens.json      what it learns from: vocabulary, count, source, SHA-256
metrics.jsonl    every step's numbers; the same, byte for byte, for the same config and tokens
events.jsonl     when things happened: starts, saves, speed
checkpoints/     training state, by step
"""

import errno
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from jaxgpt import config as configs
from jaxgpt.config import Config, UsageError
from jaxgpt.text import corpus as corpora
from jaxgpt.text import tokenizer
from jaxgpt.text.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunError(UsageError):
    """A run cannot be made, found or used."""


@dataclass(frozen=True)
class Run:
    """A run's folder, by its path."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, name: str, config: Config, corpus_meta: dict[str, Any]) -> "Run":
        """Make the folder of a new run, whole or not at all.

        Raises:
          RunError: the name is no plain name, or such a run exists.
        """
        cls.require_free(runs_dir, name)
        path, partial = runs_dir / name, runs_dir / f".{name}.{secrets.token_hex(4)}.part"
        (partial / "checkpoints").mkdir(parents=True)
        try:
            (partial / "config.json").write_text(configs.to_json(config), "utf-8")
            (partial / "tokens.json").write_text(json.dumps(corpus_meta, indent=2) + "\n", "utf-8")
            partial.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                raise cls._taken(path) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(path)

    @classmethod
    def require_free(cls, runs_dir: Path, name: str) -> None:
        """Check that `create` would succeed.

        Raises:
          RunError: the name is no plain name, or such a run exists.
        """
        if (runs_dir / _plain(name)).exists():
            raise cls._taken(runs_dir / name)

    @staticmethod
    def _taken(path: Path) -> RunError:
        if not (path / "config.json").is_file():
            return RunError(f"{path} exists and is no run: remove it, or take another name: --run OTHER-NAME")
        return RunError(
            f"run {path.name!r} exists in {path.parent}: --run {path.name} --resume continues it, "
            "--run OTHER-NAME starts a new one"
        )

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> "Run":
        """An existing run, by its name in `runs_dir` or by its path.

        Raises:
          RunError: there is no such run.
        """
        for path in (runs_dir / name, Path(name).expanduser()):
            if (path / "config.json").is_file():
                return cls(path if path.name else path.resolve())
        known = sorted(path.parent.name for path in runs_dir.glob("*/config.json"))
        raise RunError(
            f"no run {name!r} in {runs_dir}; "
            + (f"there are {', '.join(known)}" if known else "jaxgpt train gpt-demo makes one")
        )

    @cached_property
    def config(self) -> Config:
        """The configuration it was started with."""
        try:
            return configs.from_json((self.path / "config.json").read_text("utf-8"))
        except (configs.ConfigError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path / 'config.json'}: {error}") from error

    @cached_property
    def corpus_meta(self) -> dict[str, Any]:
        """The tokens.json of what it learns from."""
        return corpora.read_meta(self.path / "tokens.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with."""
        return tokenizer.from_json(self.corpus_meta["tokenizer"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def with_config(self, config: Config) -> "Run":
        """The run with `config` in place of its configuration, replaced atomically."""
        partial = self.path / "config.json.part"
        partial.write_text(configs.to_json(config), "utf-8")
        partial.replace(self.path / "config.json")
        return Run(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first."""
        return [json.loads(line) for line in self.metrics_file.read_text("utf-8").splitlines()]

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, oldest first; none if there is no such file yet."""
        path = self.path / "events.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def event(self, name: str, **values: Any) -> None:
        """Add a line with the time of day to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": name, **values}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run: one process may write to it at a time.

        Raises:
          RunError: another process holds it.
        """
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"run {self.path.name!r} is in use by another process") from None
        with lock:
            yield


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RunError(
            f"run name {name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 100 at most"
        )
    return name
