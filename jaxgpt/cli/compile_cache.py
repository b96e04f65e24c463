"""JAX's cache of compiled programs, in a folder that only the user can write to."""

import hashlib
import os
import platform
import stat
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgpt.cli.places import cache_dir
from jaxgpt.machine import cpu_info

MAX_BYTES = 256 * 2**20
"""Limit of a user's whole cache; a program for a CPU has 10 to 200 kB."""


def use_compile_cache() -> None:
    """Let JAX cache compiled programs in the user's cache folder, unless $JAX_COMPILATION_CACHE_DIR names another.

    A compiled program is code that will run, so a folder that others own or may write to is not used.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A home folder may be shared by machines whose processors have different features.
    features = [line for line in cpu_info().splitlines() if line.lower().startswith(("flags", "features"))]
    features = features or [platform.machine(), platform.processor()]
    try:
        folder = private_cache(f"compiled-{hashlib.sha256(''.join(features).encode()).hexdigest()[:8]}")
    except OSError as error:
        where = f" in {error.filename}" if error.filename else ""
        print(f"jaxgpt: compiled programs are not kept{where}: {error.strerror}", file=sys.stderr)
        return
    prune(folder.parent, MAX_BYTES)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    show = warnings.showwarning

    def showwarning(message: Any, *args: Any, **kwargs: Any) -> None:
        if "persistent compilation cache entry" in str(message):  # a full disk or a kill cut it off
            prune(folder.parent, 0)  # JAX replaces no entry, and would warn at every start
        show(message, *args, **kwargs)

    warnings.showwarning = showwarning


def private_cache(name: str) -> Path:
    """A folder in the user's cache, made if missing. Raises OSError if there is none that only the user can write to.
    What is in compiled-*/ is removed when it is old."""
    if not (cache := cache_dir()):
        raise FileNotFoundError(None, "no home folder; set XDG_CACHE_HOME")
    folder = cache / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()  # not of what a link names
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(None, "others may write to it, or own it: chmod 700 it, or remove it", str(folder))
    return folder


def prune(cache: Path, max_bytes: int) -> None:
    """Delete the least recently used files in compiled-*/ until the rest have at most `max_bytes`.

    JAX's own limit, jax_compilation_cache_max_size, reads the times of all entries under a lock to add one: 0.1 s with
    1,000 entries. In jax 0.10 it also adds none after a process was killed while writing one.
    """
    found = []
    for path in cache.glob("compiled-*/**/*"):
        with suppress(OSError):  # here and below: another process may delete it at the same time
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in found) - max_bytes
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        with suppress(OSError):
            path.unlink()
        excess -= size
