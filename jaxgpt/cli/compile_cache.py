"""Compiled programs kept from one process to the next, in a folder that is the user's alone."""

import hashlib
import os
import platform
import stat
import sys
from contextlib import suppress
from pathlib import Path

from jaxgpt.cli.places import cache_dir

MAX_BYTES = 256 * 2**20
"""Size of all compiled programs of a user; one has 10 to 200 kB on a CPU."""


def use_compile_cache() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless $JAX_COMPILATION_CACHE_DIR names another.

    A compiled program is code that will run: a folder that others may write to, or own, is not used.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if not (cache := cache_dir()):
        print("jaxgpt: compiled programs are not cached: no home folder; set XDG_CACHE_HOME", file=sys.stderr)
        return
    folder = cache / f"compiled-{processor()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = None if is_private(folder) else "others may write to it, or own it: chmod 700 it, or remove it"
    except OSError as error:
        problem = error.strerror
    if problem:
        print(f"jaxgpt: compiled programs are not kept in {folder}: {problem}", file=sys.stderr)
        return
    prune(cache, MAX_BYTES)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def prune(cache: Path, max_bytes: int) -> None:
    """Remove the least recently used files in compiled-*/ until the rest have `max_bytes` at most.

    JAX's own limit, jax_compilation_cache_max_size, reads all entries' times under a lock whenever it adds one: 0.1 s
    with 1,000 entries. In jax 0.10 it also adds no more after a process was killed while it wrote one.
    """
    found = []
    for path in cache.glob("compiled-*/**/*"):
        with suppress(OSError):  # another process may remove it at the same time, here and below
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


def processor() -> str:
    """A name for what this processor can do: a home folder may be shared by machines that differ."""
    try:
        said = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        features = [line for line in said if line.lower().startswith(("flags", "features"))]
    except OSError:
        features = [platform.machine(), platform.processor()]
    return hashlib.sha256("".join(features).encode()).hexdigest()[:8]


def is_private(folder: Path) -> bool:
    """Whether `folder` is a folder of this user, no link, and closed to all others."""
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and stat.S_ISDIR(found.st_mode) and (os.name == "nt" or not stat.S_IMODE(found.st_mode) & 0o077)
