"""Compiled programs kept from one process to the next, in a folder that is the user's alone."""

import hashlib
import os
import platform
import stat
import sys
from pathlib import Path

from jaxgpt.text.sources import cache_dir


def use_compile_cache() -> None:
    """Let JAX keep what it compiles in the user's cache folder, unless $JAX_COMPILATION_CACHE_DIR names another.

    A compiled program is code that will run: a folder that others may write to, or own, is not used, and that is said.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = cache_dir()
    if not cache:
        print("jaxgpt: compiled programs are not cached: no home folder; set XDG_CACHE_HOME", file=sys.stderr)
        return
    folder = cache / f"compiled-{processor()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = None if is_private(folder) else "others may write to it, or own it: chmod 700 it, or remove it"
    except OSError as error:
        why = error.strerror
    if why:
        print(f"jaxgpt: compiled programs are not kept in {folder}: {why}", file=sys.stderr)
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
