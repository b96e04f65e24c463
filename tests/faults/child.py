"""The process that the kill trials kill: it only resumes a run."""

from pathlib import Path

# Imported before the fork, so that a trial takes one second instead of four.
import jaxgpt.model  # noqa: F401
from jaxgpt.cli.runs import corpus_of
from jaxgpt.run import Run
from jaxgpt.train import fit


def resume(path: str, data_dir: str) -> None:
    run = Run(Path(path))
    fit(run, corpus_of(run, Path(data_dir)))
