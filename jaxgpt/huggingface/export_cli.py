"""`jaxgpt export`: a Hugging Face folder from a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxgpt.cli.options import Checkpoint, RunName, RunsDir, parse


@dataclass(frozen=True)
class Export:
    """Write a run as a folder that transformers loads: weights, config, vocabulary and a model card."""

    run: RunName
    out: Path
    """The new folder."""
    format: Literal["hf"] = "hf"
    """hf: Hugging Face's GPT-2."""
    checkpoint: Checkpoint = "best"
    runs_dir: RunsDir = Path("runs")


def run(args: list[str]) -> int:
    given = parse(Export, args, "export", Export.__doc__)
    from jaxgpt.huggingface import folders
    from jaxgpt.run import Run

    step = folders.export_run(Run.open(given.runs_dir, given.run), given.out, given.checkpoint)
    print(f"step {step:,} of {given.run} written to {given.out}")
    print(f"Write with it: {shlex.join(['jaxgpt', 'sample', str(given.out)])}")
    return 0
