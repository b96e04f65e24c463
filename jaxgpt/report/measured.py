"""What a person reads of a report of measurements (`bench.table.Report`), on a terminal."""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from jaxgpt.bench.table import Report, cell


def parts(report: Report) -> Iterator[RenderableType]:
    """Its tables, what was not measured and why, its story and its notes."""
    for each in report["tables"]:
        if each["rows"]:
            yield table(each["title"], each["rows"])
    yield from (f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items())
    if report.get("story"):
        yield report["story"] + "\n"
    yield from (f"- {note}" for note in report["notes"])


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows as a table: columns of numbers to the right, a dash where there is none."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        words = all(isinstance(row.get(name), str | None) for row in rows)
        made.add_column(name, justify="left" if words else "right", no_wrap=name == names[0], overflow="fold")
    for row in rows:
        made.add_row(*(cell(row.get(name)) for name in names))
    return made
