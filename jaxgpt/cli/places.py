"""Folders that commands write to: whether they can, before there is anything to write; and the user's cache."""

import os
import tempfile
from pathlib import Path

from jaxgpt.config import UsageError


def require_writable(folder: Path, option: str) -> None:
    """Check that `folder`, or the one it would be made in, can be written to; nothing stays behind.

    Raises:
      UsageError: it cannot; `option` is the flag that names another.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=".jaxgpt-").cleanup()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror}; name another folder: {option}") from error


def require_file(path: Path | None, option: str) -> None:
    """Check that a file can be written at `path`, if there is to be one: nothing else has its name.

    Raises:
      UsageError: it cannot; `option` is the flag that names another.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a folder or a device: name a file, {option} FILE")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}")
    require_writable(path.parent, option)


def cache_dir() -> Path | None:
    """The user's cache folder; None for a user without a home folder who names none in $XDG_CACHE_HOME."""
    folder = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    return None if folder.parts[0] == "~" else folder / "jaxgpt"
