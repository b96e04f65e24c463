"""`jaxgpt import-gpt2` makes a run of a Hugging Face folder, `jaxgpt export` a folder of a run."""

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.cli import places
from jaxgpt.cli.options import Checkpoint, Folders, RunName, RunsDir, parse
from jaxgpt.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxgpt.recipes import FINETUNE


@dataclass(frozen=True)
class ImportGPT2:
    """Make a run from a Hugging Face GPT-2, to sample, evaluate and fine-tune with train --resume.

    Text is encoded with the folder's own vocabulary, or with GPT-2's if it has none."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder with config.json and model.safetensors, or the name of a model on the Hugging Face hub, such as gpt2."""
    run: str
    """Name of the new run."""
    block_size: int = 0
    """Keep this many positions, the first ones; 0 keeps all."""
    dropout: float = 0.0
    """Dropout rate for fine-tuning."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of matmuls, as in train."""
    remat: Literal["none", "matmuls", "blocks"] = "none"
    """What the backward pass recomputes to save memory, as in train."""
    deterministic: bool = False
    """Avoid attention kernels with non-deterministic gradients, as in train."""
    data: DataConfig = FINETUNE.data
    optimizer: OptimizerConfig = FINETUNE.optimizer
    train: TrainConfig = FINETUNE.train
    folders: Folders = field(default_factory=Folders)


@dataclass(frozen=True)
class Export:
    """Write a run as a folder that transformers loads: weights, config, vocabulary and a model card."""

    run: RunName
    out: Path
    """The new folder."""
    checkpoint: Checkpoint = "best"
    runs_dir: RunsDir = Path("runs")


def run_import_gpt2(args: list[str]) -> int:
    given = parse(ImportGPT2, args, "import-gpt2", ImportGPT2.__doc__)
    from jaxgpt.huggingface import folders
    from jaxgpt.monitor import cost

    settings: dict[str, Any] = {name: getattr(given, name) for name in folders.TRAINING_SETTINGS}
    run = folders.import_run(
        folders.find(given.folder),
        Config(given.data, ModelConfig(**settings), given.optimizer, given.train),
        given.run,
        given.folders.runs_dir,
        given.folders.data_dir,
        given.block_size,
    )
    print(f"{run.path}: {cost.describe(run.config.model)}")
    print(f"Tokenizer: {run.config.data.tokenizer}")
    print(f"Sample from it: {run.command('sample')}")
    print(f"Fine-tune it: {run.command('train', '--resume', data_dir=given.folders.data_dir)}")
    return 0


def run_export(args: list[str]) -> int:
    given = parse(Export, args, "export", Export.__doc__)
    from jaxgpt.huggingface import folders
    from jaxgpt.run import Run

    places.require_writable(given.out.parent, "--out FOLDER")
    step = folders.export_run(Run.open(given.runs_dir, given.run), given.out, given.checkpoint)
    print(f"step {step:,} of {given.run} written to {given.out}")
    folder = os.path.join(".", given.out)  # not the name of a run
    print(f"Sample from it: {shlex.join(['jaxgpt', 'sample', folder])}")
    return 0
