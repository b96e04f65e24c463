"""The machine of a comparison, the libraries of both sides, and the share that other programs took meanwhile."""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt import machine

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
"""CPU flags that decide how fast matmuls are."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
QUIET = 0.1
"""Share of the machine from which other programs disturb a measurement."""


def facts(device: str) -> dict[str, Any]:
    """The machine and the installed libraries, without importing any of them."""
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    return {
        "device": device,
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "cpu flags": [flag for flag in FLAGS if flag in machine.cpu_info().split()],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in installed},
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "load average before": round(os.getloadavg()[0], 2),
    }


def machine_seconds() -> tuple[float, float]:
    """(busy seconds, all seconds), summed over the cores since boot; zeros without /proc."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and waiting for a disk


def others(before: tuple[float, float], own: float) -> float | None:
    """The share of the machine that other programs took since `before`, a reading of `machine_seconds`, in which we
    took `own` seconds; None if unknown."""
    busy, seconds = (now - then for now, then in zip(machine_seconds(), before, strict=True))
    return max(0.0, busy - own) / seconds if seconds > 0 else None


def disturbance(shares: Sequence[float | None]) -> str:
    """A note on shares from `others`."""
    known = [100 * share for share in shares if share is not None]
    if not known:
        return "the load of other programs is unknown on this system"
    found = f"other programs took {statistics.median(known):.0f}% of the machine ({max(known):.0f}% at most)"
    return found if max(known) < 100 * QUIET else f"NOT QUIET: {found}; measure again on a quiet machine"
