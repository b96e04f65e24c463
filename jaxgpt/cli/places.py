"""Paths as users type them, checks that results can be written before the work starts, and the user's cache folder."""

import os
import tempfile
from pathlib import Path

from jaxgpt.config import UsageError


def local_path(path: str | Path) -> Path:
    """The path of a file or folder; ~ is the home folder. Path.expanduser() would raise for "~draft.txt"."""
    return Path(os.path.expanduser(path))


def require_writable(folder: Path, option: str) -> None:
    """Raise a UsageError, which names the flag `option`, unless `folder` can be written to or created."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=".jaxgpt-").cleanup()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror}; name another folder: {option}") from error


def require_file(path: Path | None, option: str, other: Path | None = None) -> None:
    """Raise a UsageError, which names the flag `option`, unless `path` is None or a file can be written there that is
    not `other`, which the command writes too."""
    if path is None:
        return
    if other and path.resolve() == other.resolve():
        raise UsageError(f"{path} is for another result: name another file, {option} FILE")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a folder or a device: name a file, {option} FILE")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    require_writable(path.parent, option)


def cache_dir() -> Path | None:
    """The user's cache folder; None if there is neither $XDG_CACHE_HOME nor a home folder."""
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return None if folder.parts[0] == "~" else folder / "jaxgpt"
