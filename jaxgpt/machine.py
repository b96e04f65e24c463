"""The CPU of this machine."""

import os
import platform
import re
from pathlib import Path


def cpu_info() -> str:
    """The entry of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""


def cpu_name() -> str:
    """The model name from /proc/cpuinfo, or else what Python reports."""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu_info(), re.M)
    return model[1] if model else platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
