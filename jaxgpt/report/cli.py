"""`jaxgpt report`: an HTML page of one or more runs."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse, refuse_unused
from jaxgpt.config import UsageError


@dataclass(frozen=True)
class Report:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Names of runs, or their paths, as ./NAME."""
    out: Path | None = None
    """The HTML file; by default report.html in the run's folder, or for several runs in the runs folder."""
    png: Path | None = None
    """Draw the charts into this folder too, as PNG and SVG."""
    watch: bool = False
    """Update the page until the run ends; meanwhile it reloads itself."""
    every: int = 30
    """With --watch, seconds between updates."""
    folders: Folders = field(default_factory=Folders)


def run(args: list[str]) -> int:
    given = parse(Report, args, "report")
    if not given.runs:
        raise UsageError("expected the names of one or more runs: jaxgpt report RUN [RUN ...]")
    if given.every < 1:
        raise UsageError(f"every is {given.every}, expected 1 second or more")
    refuse_unused(given, Report(()), {"every": "" if given.watch else "without --watch"})
    from jaxgpt.display import charts
    from jaxgpt.report import page
    from jaxgpt.report.reporter import reports, require_replaceable
    from jaxgpt.run import Run

    charts.require()
    page.environment()  # fails here if jinja2 is missing
    named = [Run.open(given.folders.runs_dir, name) for name in given.runs]
    runs = list({run.path.resolve(): run for run in named}.values())
    out = given.out or (runs[0].path if len(runs) == 1 else given.folders.runs_dir) / "report.html"
    require_replaceable(out)
    places.require_writable(out.parent, "--out")
    if given.png:
        places.require_writable(given.png, "--png")
    use_compile_cache()
    report = None
    try:
        for report in reports(runs, given.folders.data_dir):
            watching = given.watch and report.running
            size = report.write(out, refresh=given.every if watching else 0)
            print(f"{out}  {size / 1e6:.2f} MB, {report.summary}", flush=True)
            if not watching:
                break
            time.sleep(given.every)
    except KeyboardInterrupt:
        if not report:
            raise
        report.write(out)  # does not reload itself any more
    assert report
    if given.png:
        print(f"{given.png}  {', '.join(path.name for path in report.draw(given.png))}")
    return 0
