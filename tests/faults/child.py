"""The process that the kill trials kill: it resumes a run, and does nothing else."""

from pathlib import Path

# All that a run needs, imported before the fork: a trial then takes a second instead of four.
import jaxgpt.model  # noqa: F401
from jaxgpt.cli.runs import corpus_of
from jaxgpt.run import Run
from jaxgpt.train import fit


def resume(path: str, data_dir: str) -> None:
    run = Run(Path(path))
    fit(run, corpus_of(run, Path(data_dir)))
