"""What a person reads of a report of measurements (`bench.table.Report`), on a terminal."""

import textwrap
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from jaxgpt.bench.table import Report, cell

NARROW = 12
"""Characters that a column of words is not folded below."""
BETWEEN = 3
"""Characters between two columns."""


def parts(report: Report, width: int) -> Iterator[RenderableType]:
    """Its tables, what was not measured and why, its story and its notes, for a terminal of so many characters."""
    for each in report["tables"]:
        if each["rows"]:
            yield table(each["title"], each["rows"], width)
    yield from (f"{name} was not measured: {why}" for name, why in report.get("failed", {}).items())
    if report.get("story"):
        yield report["story"] + "\n"
    yield from (f"- {note}" for note in report["notes"])


def table(title: str, rows: list[dict[str, Any]], width: int) -> Table:
    """Rows as a table: columns of numbers to the right, a dash where there is none. Where `width` is too narrow, words
    are folded and headings broken at their blanks; numbers stay whole, if the table be wider for it."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    names, least = list(dict.fromkeys(name for row in rows for name in row)), 0
    for name in names:
        cells = [cell(row.get(name)) for row in rows]
        whole = max(map(len, [*cells, *name.split()]))
        if all(isinstance(row.get(name), str | None) for row in rows):
            made.add_column(name, no_wrap=name == names[0], overflow="fold")
            whole = whole if name == names[0] else min(whole, NARROW)
        else:
            made.add_column(textwrap.fill(name, whole), justify="right", no_wrap=True)
        least += whole + BETWEEN
    for row in rows:
        made.add_row(*(cell(row.get(name)) for name in names))
    made.width = least if least > width else None
    return made
