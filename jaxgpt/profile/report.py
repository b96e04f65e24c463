"""A report of measurements: saved as JSON, printed as Markdown.

A report is a dict of "mode" (its title), "facts" (the machine), "tables", "notes", perhaps "failed" (what could not be
measured, and why), and raw figures. A table is {"title", "rows"}, a row {column: value}.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from jaxgpt import files, start

Report = dict[str, Any]
Rows = list[dict[str, Any]]


def facts() -> dict[str, Any]:
    """The machine and the versions, as events.jsonl records them, and the load of the machine until now."""
    recorded, names = start.environment(), ("device", "backend", "cpu", "cores", "python", "jax", "jaxgpt")
    return {**{name: recorded[name] for name in names}, "load average before": round(os.getloadavg()[0], 2)}


def save(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    files.write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())


def markdown(report: Report) -> str:
    parts = [f"## {report['mode']}"]
    parts += [f"**{each['title']}**\n\n{table(each['rows'])}" for each in report["tables"] if each["rows"]]
    parts += [f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items()]
    parts += ["\n".join(f"- {note}" for note in report["notes"])] if report["notes"] else []
    parts.append("; ".join(f"{name} {cell(value)}" for name, value in report["facts"].items() if value))
    return "\n\n".join(parts) + "\n"


def table(rows: Rows) -> str:
    """Rows as a Markdown table, aligned to be read on a terminal too; numbers to the right."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        cells = [name, *map(cell, values)]
        align = str.ljust if all(isinstance(value, str | None) for value in values) else str.rjust
        columns.append([align(each, max(map(len, cells))) for each in cells])
    names, *lines = [f"| {' | '.join(line)} |" for line in zip(*columns, strict=True)]
    return "\n".join([names, re.sub(r"[^|]", "-", names), *lines])


def cell(value: Any) -> str:
    """A value as text; a series (`timing.series`) as its median with minimum and maximum.

    >>> cell({"median": 1.2345, "low": 1.0, "high": 1.5, "n": 5}), cell(12345.6), cell(-0.0), cell(True)
    ('1.23 (1.00 to 1.50)', '12,346', '0', 'yes')
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
        case float() if abs(value) < 0.1:
            return f"{value:z.2g}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
        case list() | tuple():
            return ", ".join(map(cell, value))
    return str(value)
