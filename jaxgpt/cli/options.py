"""What verbs share: options, how they are read, and the command line to type next."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from jaxgpt.cli import VERBS
from jaxgpt.config import UsageError

RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Name of a run, or its folder.")]
Checkpoint = Annotated[
    Literal["best", "last"], tyro.conf.arg(help="The checkpoint of lowest validation loss, or the newest.")
]
RunsDir = Annotated[Path, tyro.conf.arg(help="Folder of all runs.")]
DataDir = Annotated[Path, tyro.conf.arg(help="Folder of all prepared corpora.")]

T = TypeVar("T")


@dataclass(frozen=True)
class Folders:
    runs_dir: RunsDir = Path("runs")
    data_dir: DataDir = Path("data")


def parse(kind: type[T], args: list[str], command: str, about: str | None = None, **kwargs: Any) -> T:
    """`args`, the options of `jaxgpt COMMAND`, as a `kind`; its help says `about`, by default the verb's line."""
    if about is None:
        _, about = VERBS[command]
    config = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=args, prog=f"jaxgpt {command}", description=about, config=config, **kwargs)


def refuse_unused(given: Any, default: Any, unused: Mapping[str, str]) -> None:
    """Check that options which have no effect here are as by default.

    Args:
      unused: why an option has no effect, as in "without --chips"; "" if it has one.

    Raises:
      UsageError: one is not.
    """
    for name, why in unused.items():
        if why and getattr(given, name) != getattr(default, name):
            raise UsageError(f"--{name} has no effect {why}: leave it out")


def words(verb: str, run: Path, folders: Folders, *flags: str) -> str:
    """The command line that does `verb` with the run in `run`, to be pasted in the folder where this one was typed."""
    from jaxgpt.training.run import Run

    line = Run(run).command(verb, *flags)
    if verb == "train" and folders.data_dir != Path("data"):
        line += " " + shlex.join(["--data-dir", str(folders.data_dir)])
    return line
