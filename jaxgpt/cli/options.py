"""What commands share: options, how they are parsed, and the command line to type next."""

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import tyro

from jaxgpt.cli import COMMANDS
from jaxgpt.config import UsageError
from jaxgpt.recipes import RECIPES

RunName = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Name of a run, or its folder: ./NAME.")
]
Checkpoint = Annotated[
    Literal["best", "last"], tyro.conf.arg(help="The checkpoint of lowest validation loss, or the newest.")
]
RunsDir = Annotated[Path, tyro.conf.arg(help="Folder of all runs.")]
DataDir = Annotated[Path, tyro.conf.arg(help="Folder of all prepared corpora.")]

T = TypeVar("T")

LEAST_WIDTH = 40
"""Columns of the help, at least: below about 6, tyro wraps text forever."""


@dataclass(frozen=True)
class Folders:
    runs_dir: RunsDir = Path("runs")
    data_dir: DataDir = Path("data")


def parse(kind: type[T], args: list[str], command: str, about: str | None = None, **kwargs: Any) -> T:
    """`args`, the options of `jaxgpt COMMAND`, as a `kind`; its help says `about`, by default the command's line."""
    description = COMMANDS[command][1] if about is None else about
    config = (tyro.conf.OmitArgPrefixes,)
    if shutil.get_terminal_size().columns < LEAST_WIDTH:
        os.environ["COLUMNS"] = str(LEAST_WIDTH)
    try:
        return tyro.cli(kind, args=args, prog=f"jaxgpt {command}", description=description, config=config, **kwargs)
    except SystemExit as refused:  # tyro has printed why
        if refused.code == 2 and (hint := _hint(dict(_types(kind)), args)):
            raise UsageError(hint) from refused
        raise


def take_name(kind: type, args: list[str]) -> tuple[str | None, list[str]]:
    """The recipe or run that stands before, between or after the options of `kind`, and the other arguments.

    After an option that takes several values, or that is unknown, only the name of a recipe or a .json file is one.
    """
    types, values = dict(_types(kind)), 0.0  # how many values the last option still takes
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            of = types.get(_positive(arg), tuple[str, ...])
            values = 0 if of is bool or "=" in arg else float("inf") if get_origin(of) is tuple else 1
        elif values and not (values > 1 and (arg in RECIPES or arg.endswith(".json"))):
            values -= 1
        else:
            return arg, args[:i] + args[i + 1 :]
    return None, args


def take_recipe(kind: type, args: list[str], missing: str, default: str = "gpt-demo") -> tuple[str, list[str]]:
    """As `take_name`, for a command that needs a name; `default` for its help.

    Raises:
      UsageError: there is none: `missing`.
    """
    name, rest = take_name(kind, args)
    if name is None and not {"-h", "--help"} & set(args):
        raise UsageError(missing)
    return name or default, rest


def _types(kind: type) -> Iterator[tuple[str, Any]]:
    """The long options of a dataclass and of the dataclasses in it, each with its type."""
    for name, of in get_type_hints(kind).items():
        if is_dataclass(of):
            yield from _types(of)  # type: ignore[arg-type]
        else:
            yield f"--{name.replace('_', '-')}", of


def _positive(arg: str) -> str:
    """The option that `arg` sets, as tyro reads it: --bias for --no-bias, --run-s for --run_s=x."""
    option = arg.partition("=")[0].replace("_", "-")
    return f"--{option.removeprefix('--no-')}" if option.startswith("--no-") else option


def _hint(types: dict[str, Any], args: list[str]) -> str | None:
    """What to type instead of `args`, which were refused."""
    for arg, following in pairwise([*args, ""]):
        option, (_, equals, value) = _positive(arg), arg.partition("=")
        if types.get(option) is bool and (value if equals else following).lower() in ("true", "false"):
            return f"{option} takes no value: write {option} or --no-{option[2:]}"
        no_option = following.startswith("-") and not following[1:2].isdigit() and _positive(following) not in types
        if types.get(option, bool) is not bool and not equals and no_option:
            return f"a value that begins with '-' is written with '=': {option}={shlex.quote(following)}"
    return None


def typed(text: str) -> str | bytes:
    """An argument as it was typed: bytes where it is not UTF-8, of which Python makes surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)
    return text


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


def words(command: str, run: Path, folders: Folders, *flags: str) -> str:
    """The command line of `command` for the run in `run`, to be pasted in the folder where this one was typed."""
    from jaxgpt.run import Run

    line = Run(run).command(command, *flags)
    if command == "train" and folders.data_dir != Path("data"):
        line += " " + shlex.join(["--data-dir", str(folders.data_dir)])
    return line
