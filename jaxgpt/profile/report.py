"""A report of measurements: saved as JSON, shown as Markdown or on a terminal.

A report is a dict of "mode" (its title), "facts" (the machine), "tables", "notes", "failed" (what could not be
measured, and why), maybe a "story" (a paragraph), and raw figures. A table is {"title", "rows"}, a row {column: value}.
"""

import importlib.metadata
import json
import os
import platform
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from jaxgpt import files, machine

Report = dict[str, Any]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
"""CPU flags that decide how fast matmuls are."""
NARROW = 12
"""Characters below which a column of words is not wrapped."""


def facts(device: str) -> dict[str, Any]:
    """The machine and the installed libraries, without importing any of them."""
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


def save(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    files.write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


def show(report: Report, as_markdown: bool = False) -> None:
    """Print a report as Markdown, or as tables for the terminal."""
    from jaxgpt.monitor.terminal import RunConsole

    if as_markdown:
        print(markdown(report))
        return
    console = RunConsole()
    for each in renderables(report, console.width):
        console.print(each)


def markdown(report: Report) -> str:
    parts = [f"## {report['mode']}"]
    parts += [f"**{each['title']}**\n\n" + _markdown_table(each["rows"]) for each in report["tables"] if each["rows"]]
    parts += [f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items()]
    parts += [report["story"]] if report.get("story") else []
    parts += ["\n".join(f"- {note}" for note in report["notes"])] if report["notes"] else []
    parts.append("; ".join(f"{name} {cell(value)}" for name, value in report["facts"].items() if value))
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: list[dict[str, Any]]) -> str:
    names = _columns(rows)
    cells = [[cell(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(each) + " |" for each in [names, ["---"] * len(names), *cells])


def renderables(report: Report, width: int) -> Iterator[RenderableType]:
    """The tables and texts of a report for a terminal of `width` characters."""
    yield from (_rich_table(each["title"], each["rows"], width) for each in report["tables"] if each["rows"])
    yield from (f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items())
    if report.get("story"):
        yield report["story"] + "\n"
    yield from (f"- {note}" for note in report["notes"])


def _rich_table(title: str, rows: list[dict[str, Any]], width: int) -> Table:
    """Numbers are right-aligned and stay whole, if need be beyond `width`; words and headings are wrapped."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    names, least = _columns(rows), 0
    for name in names:
        longest = max(len(word) for row in rows for word in [cell(row.get(name)), *name.split()])
        if all(isinstance(row.get(name), str | None) for row in rows):
            made.add_column(name, no_wrap=name == names[0], overflow="fold")
            longest = longest if name == names[0] else min(longest, NARROW)
        else:
            made.add_column(textwrap.fill(name, longest), justify="right", no_wrap=True)
        least += longest + 3  # characters between two columns
    for row in rows:
        made.add_row(*(cell(row.get(name)) for name in names))
    made.width = least if least > width else None
    return made


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def cell(value: Any) -> str:
    """A value as text; a series (`rounds.series`) as its median with minimum and maximum.

    >>> cell({"median": 1.2345, "low": 1.0, "high": 1.5, "n": 5}), cell(12345.6), cell(True), cell(None)
    ('1.23 (1.00 to 1.50)', '12,346', 'yes', '-')
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case {"median": median, "low": low, "high": high, "n": n}:
            return cell(median) if n == 1 else f"{cell(median)} ({cell(low)} to {cell(high)})"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
        case list() | tuple():
            return ", ".join(map(cell, value))
    return str(value)
