"""The results of the ladder: lines and a table for a terminal, and a chart."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from jaxgpt.display.charts import Spec, dots
from jaxgpt.display.text import visible
from jaxgpt.lecture.ladder import Result

KINDS = ["here", "in the lecture", "in the lecture, at a larger size"]


def line(result: Result) -> str:
    """A rung's loss and time and the beginning of its sample, on one line."""
    return f"{result.rung.name:<18} loss {result.loss:.4f}  {result.seconds:5.1f}s  {visible(result.sample)[:56]}"


def table(results: Sequence[Result]) -> Table:
    """Each rung with its loss and the lecture's; a star marks a larger model in the lecture."""
    sizes = [result.rung.lecture_size for result in results if result.rung.lecture_size]
    caption = "".join(f"* at {size}" for size in sizes)
    shown = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    shown.add_column("rung", no_wrap=True)
    shown.add_column("what it adds")
    for name in ("loss", "lecture", "params", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        rung = result.rung
        published = "-".join(f"{figure:g}" for figure in rung.lecture) + ("*" if rung.lecture_size else "")
        figures = f"{result.loss:.4f}", published, f"{result.n_params:,}", f"{result.seconds:.1f}"
        shown.add_row(rung.name, rung.about, *figures)
    return shown


def chart(results: Sequence[Result]) -> Spec:
    """The loss of each rung beside the lecture's."""
    rows = []
    for result in results:
        rows.append({"what": result.rung.name, "loss": result.loss, "kind": KINDS[0]})
        kind = KINDS[2 if result.rung.lecture_size else 1]
        rows += [{"what": result.rung.name, "loss": figure, "kind": kind} for figure in result.rung.lecture]
    return dots(rows, KINDS, "loss on the validation split, nats per character")
