"""`jaxgpt report`: runs to a page that can be kept."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse
from jaxgpt.config import UsageError


@dataclass(frozen=True)
class Report:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Names of runs, or their folders, as ./NAME."""
    out: Path | None = None
    """The HTML file; by default report.html in the folder of the run, or of several in the runs folder."""
    png: Path | None = None
    """Draw the figures into this folder too, as PNG and SVG."""
    watch: bool = False
    """Make it again while the run trains, until it ends; the page then loads itself again."""
    every: int = 30
    """With --watch, seconds between two."""
    folders: Folders = field(default_factory=Folders)


def run(args: list[str]) -> int:
    given = parse(Report, args, "report")
    if not given.runs:
        raise UsageError("no run is named, expected one or more: jaxgpt report RUN [RUN ...]")
    if given.every < 1:
        raise UsageError(f"every is {given.every}, expected 1 second or more")
    from jaxgpt.display import vega
    from jaxgpt.report.reporter import Reporter, require_ours
    from jaxgpt.run import Run

    vega.require()
    named = [Run.open(given.folders.runs_dir, name) for name in given.runs]
    runs = list({run.path.resolve(): run for run in named}.values())
    out = given.out or (runs[0].path if len(runs) == 1 else given.folders.runs_dir) / "report.html"
    require_ours(out)
    use_compile_cache()
    reporter, made, goes_on = Reporter(runs, given.folders.data_dir), None, True
    try:
        while goes_on:
            made = reporter.make()
            goes_on = given.watch and made.running
            size = made.write(out, refresh=given.every if goes_on else 0)
            print(f"{out}  {size / 1e6:.2f} MB, {made.said}", flush=True)
            time.sleep(given.every if goes_on else 0)
    except KeyboardInterrupt:
        if not made:
            raise
        made.write(out)  # the page of last, which does not load itself again
    assert made
    if given.png:
        print(f"{given.png}  {', '.join(path.name for path in made.draw(given.png))}")
    return 0
