"""The directory of a run: its files, its name and its lock.

config.json      the whole configuration, sealed
tokens.json      the corpus: tokenizer, token count, source, SHA-256; sealed
metrics.jsonl    the metrics of every step and evaluation; the same bytes for the same config and tokens
events.jsonl     a log with times: starts, saves, speed, warnings
checkpoints/     training state, by step
wandb-id         the id under which --log wandb resumes it
report.html, tensorboard/    written by jaxgpt report and --log tensorboard; never read
"""

import errno
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import filelock

from jaxgpt import config as configs
from jaxgpt import corpus as corpora
from jaxgpt import files, processes, tokenizer
from jaxgpt.config import Config, UsageError
from jaxgpt.tokenizer import Tokenizer

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
UNREADABLE = re.compile(r"[\[\\\ud800-\udfff]")
"""Where a path contains "[" or a backslash, Orbax saves what it cannot read back. TensorStore takes no path that is not
UTF-8, whose other bytes are surrogates."""


class RunError(UsageError):
    """A run cannot be created, found or used."""


@dataclass(frozen=True)
class Run:
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
        """Create the directory of a new run atomically; `fill` may add files before it gets its name.

        Raises:
          RunError: the name is invalid or taken, or the directory cannot be written.
        """
        cls.require_free(runs_dir, name)
        path, partial = runs_dir / name, runs_dir / f".{name}.{secrets.token_hex(4)}.part"
        try:
            (partial / "checkpoints").mkdir(parents=True)
            files.write_atomically(partial / "config.json", files.seal(asdict(config)).encode())
            files.write_atomically(partial / "tokens.json", files.seal(corpus_meta).encode())
            fill(cls(partial))
            partial.rename(path)
            files.sync(runs_dir)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was first
                cls.require_free(runs_dir, name)
            raise RunError(f"{path} cannot be created: {error.strerror}; choose another folder: --runs-dir") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(path)

    @classmethod
    def require_free(cls, runs_dir: Path, name: str) -> None:
        """Raise a RunError if the name is invalid or taken, or checkpoints there could not be read."""
        path = runs_dir / _valid(name)
        _require_readable(path)
        if (path / "config.json").is_file():
            raise RunError(
                f"run {name!r} exists in {runs_dir}: --run {name} --resume continues it, "
                "--run OTHER-NAME starts a new one"
            )
        if os.path.lexists(path):
            raise RunError(f"{path} exists but is not a run directory: rename it, or choose another name: --run NAME")

    @classmethod
    def open(cls, runs_dir: Path, name: str) -> "Run":
        """An existing run, by its name in `runs_dir` or by its path, such as ./NAME.

        Raises:
          RunError: there is no such run, or it is a link out of `runs_dir` or an export.
        """
        path = Path(os.path.expanduser(name))
        found = (path / "config.json").is_file()
        if cls.exists(runs_dir, name) or not (found or "/" in name):
            return cls.named(runs_dir, name)
        if not found:
            raise RunError(f"no run in {path}: {'it has no config.json' if path.is_dir() else 'no such folder'}")
        if (path / "model.safetensors").is_file():
            raise RunError(
                f"{path} is an export, not a run directory: jaxgpt sample {shlex.quote(str(path))} samples from "
                f"it, jaxgpt import-gpt2 {shlex.quote(str(path))} --run NAME makes a run of it"
            )
        return cls(path.resolve() if path.name in ("", "..") else path)

    @staticmethod
    def exists(runs_dir: Path, name: str) -> bool:
        """Whether `runs_dir` has a run of this name."""
        return bool(NAME.fullmatch(name)) and (runs_dir / name / "config.json").is_file()

    @classmethod
    def named(cls, runs_dir: Path, name: str) -> "Run":
        """An existing run, by its name in `runs_dir`; a RunError if there is none or it is a link out of there."""
        path = runs_dir / _valid(name)
        if not cls.exists(runs_dir, name):
            known = sorted(path.parent.name for path in runs_dir.glob("[!.]*/config.json"))
            found = f"there are {', '.join(known)}" if known else "jaxgpt train gpt-demo makes one"
            raise RunError(f"no run {name!r} in {runs_dir}; {found}")
        if (target := path.resolve()) != runs_dir.resolve() / name:
            raise RunError(f"{path} is a link to {target}: name that folder itself, --runs-dir {target.parent}")
        return cls(path)

    @cached_property
    def config(self) -> Config:
        try:
            return configs.from_tree(files.unseal((self.path / "config.json").read_bytes()))
        except (configs.ConfigError, files.SealError, OSError) as error:
            reason = getattr(error, "strerror", error)
            raise RunError(f"{self.path / 'config.json'}: {reason}; restore a copy of the file") from error

    @cached_property
    def corpus_meta(self) -> dict[str, Any]:
        return corpora.read_meta(self.path / "tokens.json", "restore a copy; the folder of its corpus has one")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer.from_json(self.corpus_meta["tokenizer"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    def command(self, command: str, *flags: str, data_dir: Path = Path("data")) -> str:
        """The `jaxgpt COMMAND` line for this run, to type in the same working directory."""
        named = ["--run", self.path.name] if command == "train" else [self.path.name]
        where = [] if data_dir == Path("data") else ["--data-dir", str(data_dir)]
        where += [] if self.path.parent == Path("runs") else ["--runs-dir", str(self.path.parent)]
        return shlex.join(["jaxgpt", command, *named, *flags, *where])

    @property
    def resume_command(self) -> str:
        return self.command("train", "--resume")

    def with_config(self, config: Config) -> "Run":
        """Replace config.json; a RunError if it cannot be written."""
        try:
            files.write_atomically(self.path / "config.json", files.seal(asdict(config)).encode())
        except OSError as error:
            raise RunError(f"{self.path / 'config.json'} cannot be written: {error.strerror}; make room") from error
        return Run(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl; a RunError if one is damaged."""
        lines = [_parsed(line, "step") for line in _lines(self.metrics_file)[:-1]]
        if None in lines:
            raise RunError(
                f"{self.metrics_file}, line {lines.index(None) + 1}: it is damaged; restore a copy of the file, or "
                f"resume from the newest checkpoint before it: {self.resume_command}"
            )
        return [line for line in lines if line]

    def val_losses(self) -> dict[int, float]:
        """Finite validation losses in nats per token, by step. Damaged lines are ignored."""
        lines = [_parsed(line, "val_loss") for line in _lines(self.metrics_file) if b'"val_loss"' in line]
        return {line.get("step", -1): line["val_loss"] for line in lines if line and type(line["val_loss"]) is float}

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl, oldest first, except incomplete ones."""
        return [event for line in _lines(self.events_file) if (event := _parsed(line, "event"))]

    def event(self, name: str, **values: Any) -> None:
        """Append a line with the time to events.jsonl, in process 0 only. Errors, as of a full disk, are ignored."""
        if not processes.is_primary():
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": name, **values}
        with suppress(OSError), self.events_file.open("ab+", buffering=0) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # a kill left an incomplete line
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")

    def last_event(self, *names: str) -> dict[str, Any]:
        """The newest event with one of these names; empty if there is none."""
        return next((event for event in reversed(self.events()) if event["event"] in names), {})

    @property
    def cut_off(self) -> bool:
        """Whether the last process that trained it, on this machine, died without recording its end."""
        last = self.last_event("start", "end", "broken-off")  # only a start has a process and a host
        process, here = last.get("process"), last.get("host") == platform.node()
        if not here or type(process) is not int:
            return False
        try:
            os.kill(process, 0)
        except OSError as error:  # any other error means that the process lives, but belongs to another user
            return isinstance(error, ProcessLookupError)
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for writing; process 0 takes the lock for all. The lock of a dead process is free.

        Raises:
          RunError: another process, which is named, holds it; or the directory cannot be written to, or checkpoints
            there could not be read.
        """
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        processes.on_primary(partial(self._acquire, lock))
        try:
            yield
        finally:
            lock.release()

    def _acquire(self, lock: filelock.BaseFileLock) -> None:
        _require_readable(self.path)
        try:
            lock.acquire()
        except filelock.Timeout:
            by, last = "another process", self.last_event("start", "end", "broken-off")
            if last.get("event") == "start" and not self.cut_off:
                process, host, command = (last.get(name) for name in ("process", "host", "command"))
                by = f"process {process} on {host} since {last.get('time')} ({command})"
            raise RunError(f"run {self.path.name!r} is in use by {by}") from None
        except OSError as error:
            copied = "a copy of it can be resumed: --runs-dir FOLDER-OF-THE-COPY"
            raise RunError(f"{self.path} cannot be written to: {error.strerror}; {copied}") from error


def _lines(path: Path) -> list[bytes]:
    """The lines of a file, if it exists; the last one is empty or still being written."""
    return path.read_bytes().split(b"\n") if path.exists() else []


def _parsed(line: bytes, field: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if it has no such field, or the line is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and field in value else None


def _require_readable(path: Path) -> None:
    if found := UNREADABLE.search(str(path.resolve())):
        raise RunError(f"{path.resolve()}: checkpoints under {found[0]!a} could not be read; use another folder")


def _valid(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RunError(
            f"run name {name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 100 at most; "
            "for a run in another folder: --run NAME --runs-dir FOLDER"
        )
    return name
