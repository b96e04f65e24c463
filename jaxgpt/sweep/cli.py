"""`jaxgpt sweep`: train seeds and settings of a recipe together."""

import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxgpt import machine
from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError, replaced, to_json, to_tree
from jaxgpt.recipes import recipe
from jaxgpt.run import NAME
from jaxgpt.sweep import grid
from jaxgpt.sweep.grid import Member

SweepsDir = Annotated[Path, tyro.conf.arg(help="Folder of all sweeps.")]


@dataclass(frozen=True)
class Sweep:
    name: str
    """Name of the sweep, a folder in the sweeps folder. The same command again resumes it."""
    config: Config
    seeds: int = 4
    """Seeds of each setting, counted from --seed."""
    lr: str = ""
    """Learning rates: a range LOW:HIGH:HOW-MANY, as in 3e-4:3e-2:6, or a list with commas."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE or NAME=LOW:HIGH:HOW-MANY of any setting of the model or of training; may be repeated."""
    at_once: int = 0
    """Members to train together, at most; 0: as many as the memory holds."""
    sweeps_dir: SweepsDir = Path("sweeps")
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    named, args = take_recipe(Sweep, args, "which recipe? jaxgpt sweep gpt-demo --seeds 4 --lr 1e-3:1e-2:4")
    default = Sweep(Path(named).stem, recipe(named).config)
    given = parse(Sweep, args, f"sweep {named}", "Train seeds and settings of a recipe together.", default=default)
    axes = [grid.parse(text) for text in (*([f"lr={given.lr}"] if given.lr else []), *given.set)]
    members = grid.members(given.config, axes, given.seeds)
    asked = {"program": "jaxgpt sweep 1", "values": dict(axes), "seeds": given.seeds}
    members, lines = train(given, given.config, members, asked)
    from jaxgpt import files
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.sweep import plots, view
    from jaxgpt.sweep.results import outcomes

    path, found = given.sweeps_dir / given.name, outcomes(lines)
    console = RunConsole()
    console.print(view.table(found))
    console.print(view.verdict(found))
    if not math.isnan(found[0].mean):
        best = next(member for member in members if member.setting == found[0].setting)
        files.write_atomically(path / "best.json", to_json(best.config).encode())
        words = ["jaxgpt", "train", str(path / "best.json"), "--run", f"{given.name}-best"]
        console.print(f"Train it: {shlex.join(words)}")
    show_plots(lambda: plots.draw(found, path))
    return 0


def train(
    given: Any, base: Config, members: Sequence[Member], asked: dict[str, Any]
) -> tuple[list[Member], list[dict[str, Any]]]:
    """Train the members of a sweep, or those that are not finished: with complete configs, and all lines of results.

    Args:
      given: options of the command: name, at_once, sweeps_dir, data_dir.
      base: the config that the members have in common.
      asked: what else the results depend on.

    Raises:
      UsageError: the name or the folder cannot be used, one member does not fit, or the corpus is unavailable.
    """
    if not NAME.fullmatch(f"{given.name}-best"):  # the best has a run of this name
        raise UsageError(
            f"--name {given.name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 95 at "
            "most; for a sweep in another folder: --sweeps-dir"
        )
    if given.at_once < 0:
        raise UsageError(f"--at-once is {given.at_once}, expected 0 or more")
    use_compile_cache()
    import jax

    # On a CPU each core is a device, unless the environment sets the number.
    unset = jax.config.values["jax_num_cpu_devices"] < 0
    if unset and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(machine.cores(), len(members)))
    from rich.progress import Progress

    from jaxgpt.cli import runs
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.sweep import view
    from jaxgpt.sweep.chunks import split
    from jaxgpt.sweep.results import SweepFolder

    places.require_writable(given.sweeps_dir, "--sweeps-dir")
    devices = jax.devices()[: len(members)]
    split([member.config for member in members], len(devices), given.at_once)  # raises if one does not fit
    longest = max(member.config.model.block_size for member in members)
    corpus = runs.tokens_of(replaced(base, block_size=longest), given.data_dir)
    members = [each._replace(config=runs.resolve(each.config, corpus)) for each in members]
    asked |= {"config": to_tree(base), "tokens": corpus.meta["sha256"], "precision": members[0].config.model.precision}
    path, console = given.sweeps_dir / given.name, RunConsole()
    console.print(corpus.summary)
    console.print(f"{len(members)} members in {path}, over {len(devices)} x {devices[0].device_kind}")
    with SweepFolder.held(path, asked) as folder:
        if folder.finished:
            console.print(f"{len(folder.finished)} of them are finished already")
        steps = sum(member.config.train.steps for i, member in enumerate(members) if i not in folder.finished)
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                task = bar.add_task("steps", total=steps)
                for event in folder.train(members, corpus, devices, given.at_once):
                    if isinstance(event, int):
                        bar.advance(task, event)
                    else:
                        console.print(view.scores(event, len(members)))
        except KeyboardInterrupt:
            console.print(
                f"{len(folder.finished)} of {len(members)} members are done and kept; the same command again trains "
                "the others, unfinished ones from their start"
            )
            raise
        return members, folder.lines


def show_plots(draw: Callable[[], list[Path]]) -> None:
    """Print the files that `draw` makes, or why it cannot; the results are complete without plots."""
    try:
        for plot in draw():
            print(plot)
    except UsageError as error:
        print(f"no plots were drawn: {error}")
