"""Reports of runs, made again while they train."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jaxgpt import files
from jaxgpt.config import UsageError
from jaxgpt.display.charts import save
from jaxgpt.display.text import fixed
from jaxgpt.monitor.facts import POINTS, Facts, gather
from jaxgpt.report.charts import charts
from jaxgpt.report.looks import Looks, look, steps
from jaxgpt.report.page import page
from jaxgpt.run import Run

GENERATOR = b'content="jaxgpt report"'


@dataclass(frozen=True)
class Report:
    """The contents of a report."""

    runs: list[Facts]
    looks: list[Looks]

    @property
    def running(self) -> bool:
        return any(facts.running for facts in self.runs)

    @property
    def summary(self) -> str:
        """The step and best loss of each run, on one line."""
        return ", ".join(
            f"{facts.name} at step {facts.step:,}"
            + (f", best loss {fixed(facts.best.evaluation.loss)}" if facts.best else "")
            for facts in self.runs
        )

    def write(self, path: Path, refresh: int = 0) -> int:
        """Write the page atomically; its size in bytes. Raises UsageError if it cannot be written."""
        data = page(self.runs, self.looks, charts(self.runs, self.looks), refresh).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, data)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}; name another file: --out") from error
        return len(data)

    def draw(self, folder: Path) -> list[Path]:
        """Draw every chart into `folder`, as PNG and SVG."""
        specs = charts(self.runs, self.looks)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}{suffix}" for name in specs for suffix in (".png", ".svg")]
        for path in paths:
            save(specs[path.stem], path)
        return paths


def reports(runs: Sequence[Run], data_dir: Path) -> Iterator[Report]:
    """The report of `runs` as of now, again and again. Weights are examined only if they, or the best step, are new.
    Raises RunError or CorpusError if the files of a run are damaged."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    examined = lru_cache(len(runs))(lambda run, kept, best: look(run, data_dir))
    while True:
        facts = [gather(run, max(200, POINTS // len(runs)), name) for run, name in zip(runs, names, strict=True)]
        best = [each.best.step if each.best else None for each in facts]
        looks = [examined(run, tuple(steps(run)), step) for run, step in zip(runs, best, strict=True)]
        yield Report(facts, looks)


def require_replaceable(path: Path) -> None:
    """Raise UsageError if `path` is a folder, or a file that is not a report."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of a file: --out {path / 'report.html'}")
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR not in file.read(1024):
                raise UsageError(f"{path} exists but is not a jaxgpt report: remove it, or name another file: --out")
