"""The machine of a comparison, and the libraries of both sides."""

import importlib.metadata
import os
import platform
import re
from typing import Any

from jaxgpt import machine

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
"""CPU flags that decide how fast matmuls are."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def facts(device: str) -> dict[str, Any]:
    """The machine and the installed libraries, without importing any of them."""
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.+)$", machine.cpu_info(), re.M) or ["", ""])[1].split())
    installed = {each.name.lower(): each.version for each in importlib.metadata.distributions() if each.name}
    return {
        "device": device,
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "cpu flags": [flag for flag in FLAGS if flag in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: installed.get(name) for name in LIBRARIES},
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "load average before": round(os.getloadavg()[0], 2),
    }
