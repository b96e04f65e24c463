"""The memory of a training step: on paper, by XLA's own analysis of the compiled program, and as measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxgpt.bench import ruler
from jaxgpt.bench.facts import facts
from jaxgpt.bench.ruler import Contest
from jaxgpt.bench.shapes import ABOUT, PRECISIONS, config_of
from jaxgpt.bench.table import Report
from jaxgpt.config import to_tree

SHAPES = {"cpu": ("tiny", "baby"), "gpu": ("tiny", "baby", "small")}

NOTES = (
    "paper: training.memory.needed, an estimate from below. XLA: arguments, results and temporaries of the compiled "
    "step by its memory analysis. measured: on a CPU (Linux) by how much the process grew in its first step at most, "
    "with the state that was there before; on a GPU the most that arrays have held.",
)


def measure(
    device: str = "cpu",
    shapes: Sequence[str] | None = None,
    until: float = float("inf"),
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on one step of each of `shapes`, in each precision; a process each."""
    report: Report = {"mode": "memory", "facts": facts(device), "notes": list(NOTES), "failed": {}}
    rows: list[dict[str, Any]] = []
    report["tables"] = [{"title": "Bytes of a training step", "rows": rows}]
    for shape in shapes or SHAPES[device]:
        if time.monotonic() > until:
            report["failed"][shape] = ruler.TOO_LATE
            continue
        report["notes"].append(f"{shape}: {ABOUT[shape]}")
        for precision in PRECISIONS:
            config = config_of(shape, device, precision)
            config = replace(config, train=replace(config.train, scan_steps=1))
            name = f"{shape} {precision}"
            with Contest(device, tell) as contest:
                contest.enter(name, {"task": "memory-jaxgpt", "config": to_tree(config)})
                contest.measure(rounds=1, seconds=0)
            report["facts"]["device"] = contest.device_name
            report["failed"] |= contest.failed
            if name in contest.workers:
                rows.append(_row(name, contest.workers[name].about, contest.peak_bytes[name], device))
    return report


def _row(name: str, about: dict[str, Any], peak: int, device: str) -> dict[str, Any]:
    paper, compiled = about["paper_bytes"], about["compiled_bytes"]
    held = peak if device == "gpu" else about["step_bytes"]
    return {
        "step": name,
        "XLA / paper": compiled / paper if compiled else None,
        "measured / paper": held / paper if held else None,
        "paper, MB": paper / 1e6,
        "XLA, MB": compiled / 1e6 if compiled else None,
        "measured, MB": held / 1e6 if held else None,
        "whole process, MB": peak / 1e6 if device == "cpu" else None,
    }
