"""Where something was measured: processor, versions, settings."""

import importlib.metadata
import os
import platform
import re
from typing import Any

from jaxgpt import machine

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
"""What a CPU may be able to do that decides how fast its products are."""

WHAT_PRECISIONS_MEAN = (
    "float32: products of float32 numbers in float32; on a GPU true float32, not TF32",
    "tf32: float32 numbers, products by TF32 units (10 bits of fraction), float32 sums",
    "bfloat16: products of bfloat16 operands with float32 sums; parameters, gradients' sums and AdamW stay float32",
)


def facts(device: str) -> dict[str, Any]:
    """The machine and what is installed on it, without importing any of it."""
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.+)$", machine.cpu_info(), re.M) or ["", ""])[1].split())
    libraries = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
    return {
        "device": device,
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
        "cpu flags": [flag for flag in FLAGS if flag in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in libraries},
        **{name: os.environ.get(name) for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "load average before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
