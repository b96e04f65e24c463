"""What was measured, on disk as JSON and before a person as Markdown.

A report is {"mode", "facts", "notes", "failed", "tables"}, maybe a "story", and whatever else was measured; a table is
{"title", "rows"}, and a row is a dict whose names are the table's columns. The Markdown is made from the JSON alone.
"""

import json
from pathlib import Path
from typing import Any

from jaxgpt import files as disk

Report = dict[str, Any]


def markdown(report: Report) -> str:
    """The tables of a report, ratios first, then what they mean and where they were measured."""
    parts = [f"## {report['mode']}"]
    for table in report["tables"]:
        if table["rows"]:
            parts.append(f"**{table['title']}**\n\n" + "\n".join(lines(table["rows"])))
    parts += [f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items()]
    parts += [report["story"]] if report.get("story") else []
    parts += ["\n".join(f"- {note}" for note in report["notes"])] if report["notes"] else []
    parts.append("; ".join(f"{name} {cell(value)}" for name, value in report["facts"].items() if value))
    return "\n\n".join(parts) + "\n"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table; a row that lacks a column, or has None there, shows a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    body = [[cell(row.get(name)) for name in names] for row in rows]
    return ["| " + " | ".join(each) + " |" for each in [names, ["---"] * len(names), *body]]


def cell(value: Any) -> str:
    """A value for a person; a series (`ruler.series`) as its median with least and greatest.

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
        case str():
            return value
    return json.dumps(value)


def save(report: Report, path: Path) -> None:
    """Write a report as JSON, whole or not at all."""
    disk.write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
