"""The folder of a run: what is in it, how it is named, made and locked.

config.json      the whole configuration, sealed
tokens.json      what it learns from: vocabulary, count, source, SHA-256; sealed
metrics.jsonl    every step's numbers; the same, byte for byte, for the same config and tokens
events.jsonl     a diary: starts, saves, speed, what went wrong
checkpoints/     training state, by step
holder.json      which process writes here, while one does
wandb-id         by what name --log wandb goes on with it
report.html      what jaxgpt report made of it, and tensorboard/ what --log tensorboard did: nothing reads them
"""

import errno
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from jaxgpt import config as configs
from jaxgpt import corpus as corpora
from jaxgpt import files as disk
from jaxgpt import processes, tokenizer
from jaxgpt.config import Config, UsageError
from jaxgpt.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunError(UsageError):
    """A run cannot be made, found or used."""


@dataclass(frozen=True)
class Run:
    """A run's folder, by its path."""

    path: Path

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        name: str,
        config: Config,
        corpus_meta: dict[str, Any],
        fill: Callable[["Run"], None] = lambda run: None,
    ) -> "Run":
        """Make the folder of a new run, whole or not at all.

        Args:
          fill: puts more into it, before it gets its name.

        Raises:
          RunError: the name is no plain name, such a run exists, or the folder cannot be written.
        """
        cls.require_free(runs_dir, name)
        path, partial = runs_dir / name, runs_dir / f".{name}.{secrets.token_hex(4)}.part"
        try:
            (partial / "checkpoints").mkdir(parents=True)
            disk.write_atomically(partial / "config.json", disk.seal(configs.to_tree(config)).encode())
            disk.write_atomically(partial / "tokens.json", disk.seal(corpus_meta).encode())
            fill(cls(partial))
            partial.rename(path)
            disk.sync(runs_dir)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                raise cls._taken(path) from error
            raise RunError(f"{path} cannot be made: {error.strerror}; name another folder: --runs-dir") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(path)

    @classmethod
    def require_free(cls, runs_dir: Path, name: str) -> None:
        """Check that `create` would succeed.

        Raises:
          RunError: the name is no plain name, or such a run exists.
        """
        if os.path.lexists(runs_dir / _plain(name)):
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
          RunError: there is no such run, its name is a link that leaves `runs_dir`, or the folder is an export.
        """
        path = Path(os.path.expanduser(name))
        if cls.exists(runs_dir, name):
            return cls.named(runs_dir, name)
        if (path / "config.json").is_file():
            if (path / "model.safetensors").is_file():
                line, folder = "is an export and no run: jaxgpt sample writes with it", shlex.quote(str(path))
                raise RunError(f"{path} {line}, jaxgpt import-gpt2 {folder} --run NAME makes a run of it")
            return cls(path if path.name else path.resolve())
        if not NAME.fullmatch(name) and len(path.parts) > 1:
            raise RunError(f"no run in {path}: {'it holds no config.json' if path.is_dir() else 'no such folder'}")
        return cls.named(runs_dir, name)

    @staticmethod
    def exists(runs_dir: Path, name: str) -> bool:
        """Whether `name` names a run in `runs_dir`; a folder of that name is written ./NAME."""
        return bool(NAME.fullmatch(name)) and (runs_dir / name / "config.json").is_file()

    @classmethod
    def named(cls, runs_dir: Path, name: str) -> "Run":
        """An existing run, by its name in `runs_dir`.

        Raises:
          RunError: as `open`, or the name is no plain name.
        """
        path = runs_dir / _plain(name)
        if (path / "config.json").is_file():
            found, expected = path.resolve(), runs_dir.resolve() / name
            if found != expected:
                raise RunError(f"{path} is a link to {found}: name that folder itself, --runs-dir {found.parent}")
            return cls(path)
        known = sorted(path.parent.name for path in runs_dir.glob("*/config.json"))
        raise RunError(
            f"no run {name!r} in {runs_dir}; "
            + (f"there are {', '.join(known)}" if known else "jaxgpt train gpt-demo makes one")
        )

    @cached_property
    def config(self) -> Config:
        """The configuration it was started with."""
        try:
            return configs.from_tree(disk.unseal((self.path / "config.json").read_bytes()))
        except (configs.ConfigError, disk.SealError, OSError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise RunError(f"{self.path / 'config.json'}: {what}; put back the file of the run") from error

    @cached_property
    def corpus_meta(self) -> dict[str, Any]:
        """The tokens.json of what it learns from."""
        return corpora.read_meta(self.path / "tokens.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with."""
        return tokenizer.from_json(self.corpus_meta["tokenizer"])

    def command(self, verb: str, *flags: str) -> str:
        """The command line that does `verb` with it, to be typed where `path` leads to it."""
        named = ["--run", self.path.name] if verb == "train" else [self.path.name]
        where = [] if self.path.parent == Path("runs") else ["--runs-dir", str(self.path.parent)]
        return shlex.join(["jaxgpt", verb, *named, *flags, *where])

    @property
    def resume_command(self) -> str:
        """What goes on with it."""
        return self.command("train", "--resume")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    def with_config(self, config: Config) -> "Run":
        """The run with `config` in place of its configuration, replaced atomically.

        Raises:
          RunError: it cannot be written.
        """
        try:
            disk.write_atomically(self.path / "config.json", disk.seal(configs.to_tree(config)).encode())
        except OSError as error:
            raise RunError(f"{self.path / 'config.json'} cannot be written: {error.strerror}; make room") from error
        return Run(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first, but for one that is still being written.

        Raises:
          RunError: one is damaged.
        """
        found = []
        for number, line in enumerate(self.metrics_file.read_bytes().split(b"\n")[:-1], 1):
            if (told := _told(line, "step")) is None:
                raise RunError(
                    f"{self.metrics_file}, line {number}: it is damaged; put back a copy of the file, or let "
                    f"{self.resume_command} go back to the newest step before it"
                )
            found.append(told)
        return found

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, oldest first, but for any torn by a kill; none if there is no such file yet."""
        lines = self.events_file.read_bytes().split(b"\n") if self.events_file.exists() else []
        return [event for line in lines if (event := _told(line, "event"))]

    def event(self, name: str, **values: Any) -> None:
        """Add a line with the time of day to events.jsonl: a diary, so a full disk is no reason to stop.

        Of several processes the first writes."""
        if not processes.first():
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": name, **values}
        with suppress(OSError), self.events_file.open("ab+", buffering=0) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run: one process may write to it at a time, or one group of processes, whose first holds it. A
        process that dies lets go of it.

        Raises:
          RunError: another process holds it, and which; or the folder cannot be written to.
        """
        with ExitStack() as stack:
            processes.by_first(lambda: stack.enter_context(self._held()))
            yield

    @property
    def cut_off(self) -> bool:
        """Whether the process that held it last is gone and had no time to say so, as far as this machine can tell."""
        try:
            said = json.loads((self.path / "holder.json").read_bytes())
            return said["host"] == platform.node() and not _alive(int(said["process"]))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _n_starts(self) -> int:
        return sum(event["event"] == "start" for event in self.events())

    @contextmanager
    def _held(self) -> Iterator[None]:
        lock, holder = filelock.FileLock(self.path / ".lock", timeout=0), self.path / "holder.json"
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"run {self.path.name!r} is in use by {_described(holder)}") from None
        except OSError as error:
            raise RunError(f"{self.path} cannot be written to: {error.strerror}") from error
        with lock:
            killed, starts = (holder.read_bytes(), self._n_starts()) if self.cut_off else (None, 0)
            me = {"process": os.getpid(), "host": platform.node(), "command": " ".join(sys.argv)}
            me["since"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            with suppress(OSError):  # a full disk: the lock holds without it
                disk.write_atomically(holder, json.dumps(me).encode())
            try:
                yield
            finally:
                if killed is None or self._n_starts() > starts:
                    holder.unlink(missing_ok=True)
                else:  # it was not gone on with, and was killed still
                    with suppress(OSError):
                        disk.write_atomically(holder, killed)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere such a signal is not only a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _described(holder: Path) -> str:
    """Who holds a run, as far as it said so."""
    try:
        said = json.loads(holder.read_bytes())
        return f"process {said['process']} on {said['host']} since {said['since']} ({said['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _told(line: bytes, field: str) -> dict[str, Any] | None:
    """The object of a line, if it is one and has that field."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) and field in told else None


def _plain(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RunError(
            f"run name {name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 100 at most"
        )
    return name
