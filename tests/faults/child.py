"""The process that the kill trials kill: it resumes a run, and does nothing else."""

from pathlib import Path

# All that a run needs, imported before the fork: a trial then takes a second instead of four.
import jaxgpt.nn.bigram
import jaxgpt.nn.gpt  # noqa: F401
from jaxgpt.training.loop import fit
from jaxgpt.training.run import Run
from jaxgpt.training.start import corpus_of


def resume(path: str, data_dir: str) -> None:
    run = Run(Path(path))
    fit(run, corpus_of(run, Path(data_dir)))
