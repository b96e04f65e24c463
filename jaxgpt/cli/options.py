"""Options that commands share, and their parsing."""

import ast
import inspect
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_origin, get_type_hints

import tyro

from jaxgpt.cli import COMMANDS
from jaxgpt.cli.places import local_path
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
"""Least width of the help, in columns: below about 6, tyro never stops wrapping."""


@dataclass(frozen=True)
class Folders:
    runs_dir: RunsDir = Path("runs")
    data_dir: DataDir = Path("data")


def parse(
    kind: type[T],
    args: list[str],
    command: str,
    about: str | None = None,
    default: Any = tyro.MISSING_NONPROP,
    recipe: str = "",
) -> T:
    """Parse the arguments of a command into a `kind`.

    Args:
      about: describes the command in the help; by default as in COMMANDS.
      recipe: the one that `default` comes from.
    """
    about, prog, config = about or COMMANDS[command][1], f"jaxgpt {command}", (tyro.conf.OmitArgPrefixes,)
    if recipe:
        prog += " RECIPE"
        about += f" RECIPE is a name or a config in a .json file; the defaults shown here are those of {recipe}."
    if shutil.get_terminal_size().columns < LEAST_WIDTH:
        os.environ["COLUMNS"] = str(LEAST_WIDTH)
    if {"-h", "--help"} & set(args):
        _rewrap(kind)
        about = " ".join(about.split())  # a docstring has line breaks and indentation
    try:
        return expand_home(tyro.cli(kind, args=args, prog=prog, description=about, default=default, config=config))
    except SystemExit as refused:  # tyro has printed why
        if refused.code == 2 and (hint := _hint(_types(kind), args)):
            raise UsageError(hint) from refused
        raise


def _rewrap(kind: Any) -> None:
    """Let tyro wrap the text of each option of a dataclass: it would keep the line breaks of an indented docstring."""
    (source,) = ast.parse(inspect.getsource(kind)).body
    by_name = {field.name: field for field in fields(kind)}
    for line, following in pairwise(source.body if isinstance(source, ast.ClassDef) else []):
        match line, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                by_name[name].metadata = MappingProxyType({"help": " ".join(text.split())})
    for of in get_type_hints(kind).values():
        if is_dataclass(of):
            _rewrap(of)


def expand_home(given: Any) -> Any:
    """`given`, a dataclass or a value in one, with the home folder for ~ in its paths: shells leave it in quotes and
    after =."""
    if not is_dataclass(given) or isinstance(given, type):
        return local_path(given) if isinstance(given, Path) else given
    return replace(given, **{name: expand_home(value) for name, value in vars(given).items()})


def take_name(kind: type, args: list[str]) -> tuple[str | None, list[str]]:
    """Find the recipe or run among the options of `kind`, wherever it stands; return it and the other arguments.

    After an option that takes several values or is unknown, only the name of a recipe or of a .json file counts.
    """
    types, values = _types(kind), 0.0  # values that the last option can still take
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            of = types.get(_positive(arg), tuple[str, ...])
            many = float("inf") if get_origin(of) is tuple else 1
            values = 0 if of is bool or "=" in arg else many
        elif values and not (values > 1 and (arg in RECIPES or arg.endswith(".json"))):
            values -= 1
        else:
            return arg, args[:i] + args[i + 1 :]
    return None, args


def take_recipe(kind: type, args: list[str], missing: str, default: str = "gpt-demo") -> tuple[str, list[str]]:
    """As `take_name`, but without a name it raises UsageError(missing), or returns `default` if --help is asked for."""
    name, rest = take_name(kind, args)
    if name is None and not {"-h", "--help"} & set(args):
        raise UsageError(missing)
    return name or default, rest


def _types(kind: Any) -> dict[str, Any]:
    """The type of each long option of a dataclass and of the dataclasses in it."""
    types = dict[str, Any]()
    for name, of in get_type_hints(kind).items():
        types |= _types(of) if is_dataclass(of) else {f"--{name.replace('_', '-')}": of}
    return types


def _positive(arg: str) -> str:
    """The option that `arg` sets, in the form of `_types`: --bias for --no-bias, --runs-dir for --runs_dir=x."""
    option = arg.partition("=")[0].replace("_", "-")
    return f"--{option.removeprefix('--no-')}" if option.startswith("--no-") else option


def _hint(types: dict[str, Any], args: list[str]) -> str | None:
    """What to type instead of `args`, which tyro refused."""
    if "+" in args and "--corpus" in types:
        return "a mixture is one argument, in quotes: '0.7*a.txt + 0.3*b.txt'"
    for arg, following in pairwise([*args, ""]):
        option, (_, equals, value) = _positive(arg), arg.partition("=")
        if types.get(option) is bool and (value if equals else following).lower() in ("true", "false"):
            return f"{option} takes no value: write {option} or --no-{option[2:]}"
        no_option = following.startswith("-") and not following[1:2].isdigit() and _positive(following) not in types
        if types.get(option, bool) is not bool and not equals and no_option:
            return f"a value that begins with '-' is written with '=': {option}={shlex.quote(following)}"
    return None


def refuse_unused(given: Any, default: Any, unused: Mapping[str, str]) -> None:
    """Raise a UsageError if an option without effect was given.

    Args:
      unused: field of the option to why it has no effect, as in "without --chips"; "" if it has one.
    """
    for name, why in unused.items():
        if why and getattr(given, name) != getattr(default, name):
            raise UsageError(f"--{name.replace('_', '-')} has no effect {why}: leave it out")
