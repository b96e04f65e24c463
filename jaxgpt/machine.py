"""The CPU of this machine."""

import os
import platform
import re
from pathlib import Path


def cpu_info() -> str:
    """The entry of the first core in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""


def cpu_name() -> str:
    """The model name where Linux gives it, else what Python knows."""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu_info(), re.M)
    return model[1] if model else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
