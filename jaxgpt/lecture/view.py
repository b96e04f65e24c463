"""The ladder on a terminal: a line per rung, then a table and the samples."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from jaxgpt.display.text import visible
from jaxgpt.lecture.ladder import Result
from jaxgpt.lecture.model import Rung


def line(result: Result) -> str:
    """The result of a rung on one line."""
    found = result.sample if result.loss is None else f"loss {result.loss:.4f}"
    return f"{result.rung.name:<18} {found}  {result.seconds:.1f}s"


def ladder(results: Sequence[Result]) -> Table:
    """Each rung with its loss and the lecture's."""
    sizes = [result.rung.lecture_size for result in results if result.rung.lecture_size]
    table = Table(
        box=box.SIMPLE_HEAD, caption="".join(f"* at {size}" for size in sizes), caption_justify="left", pad_edge=False
    )
    table.add_column("rung", no_wrap=True)
    table.add_column("what it adds")
    for name in ("loss", "lecture", "params", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        loss = "" if result.loss is None else f"{result.loss:.4f}"
        params = f"{result.n_params:,}" if result.n_params else ""
        rung = result.rung
        table.add_row(rung.name, rung.about, loss, published(rung), params, f"{result.seconds:.1f}")
    return table


def published(rung: Rung) -> str:
    """The lecture's figure or range, starred where its model is larger.

    >>> published(Rung("a", "", (2.24, 2.27))), published(Rung("b", "", (1.48,), "6 layers"))
    ('2.24-2.27', '1.48*')
    """
    return "-".join(f"{figure:g}" for figure in rung.lecture) + ("*" if rung.lecture_size else "")


def samples(results: Sequence[Result], width: int = 56) -> Table:
    """The beginning of the sample of each rung, on one line each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rung", no_wrap=True)
    table.add_column("sample", no_wrap=True)
    for result in results:
        if result.loss is not None:
            table.add_row(result.rung.name, Text(visible(result.sample)[:width]))
    return table
