"""`jaxgpt sweep`: train seeds and settings of a recipe together."""

import math
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt import machine
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError, to_json, to_tree
from jaxgpt.recipes import recipe
from jaxgpt.run import NAME
from jaxgpt.sweep import grid

if TYPE_CHECKING:
    from jaxgpt.monitor.terminal import RunConsole

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
    require_name(given.name)
    if given.at_once < 0:
        raise UsageError(f"--at-once is {given.at_once}, expected 0 or more")
    axes = [grid.parse(text) for text in (*([f"lr={given.lr}"] if given.lr else []), *given.set)]
    members = grid.members(given.config, axes, given.seeds)
    asked: dict[str, Any] = {
        "program": "jaxgpt sweep 1",
        "config": to_tree(given.config),
        "values": {axis.name: list(axis.values) for axis in axes},
        "seeds": given.seeds,
    }
    use_compile_cache()
    use_cores(len(members))
    import jax

    from jaxgpt import files
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.sweep import plots as sweep_plots
    from jaxgpt.sweep import view as sweeps
    from jaxgpt.sweep.chunks import split
    from jaxgpt.sweep.results import SweepFolder, outcomes, prepare

    files.require_writable(given.sweeps_dir, "--sweeps-dir")
    devices = jax.devices()[: len(members)]
    split([member.config for member in members], len(devices), given.at_once)  # raises if one does not fit
    members, corpus = prepare(given.config, members, given.data_dir)
    asked |= {"tokens": corpus.meta["sha256"], "precision": members[0].config.model.precision}
    path, console = given.sweeps_dir / given.name, RunConsole()
    console.print(corpus.summary)
    console.print(f"{len(members)} members in {path}, over {len(devices)} x {devices[0].device_kind}")
    with SweepFolder.held(path, asked) as folder:
        if folder.finished:
            console.print(f"{len(folder.finished)} of them are finished already")
        with sweeps.SweepDisplay(console, members, folder.lines) as display:
            folder.train(members, corpus, devices, given.at_once, display)
        found = outcomes(folder.lines)
        console.print(sweeps.table(found, members))
        console.print(sweeps.verdict(found))
        best = next(member for member in members if member.setting == found[0].setting)
        if not math.isnan(found[0].mean):
            files.write_atomically(path / "best.json", to_json(best.config).encode())
            words = ["jaxgpt", "train", str(path / "best.json"), "--run", f"{given.name}-best"]
            console.print(f"Train it: {shlex.join(words)}")
        show_plots(console, lambda: sweep_plots.draw(found, path))
    return 0


def require_name(name: str) -> None:
    """Check that NAME is a single folder name, and that NAME-best can name a run.

    Raises:
      UsageError: it is not.
    """
    if not NAME.fullmatch(f"{name}-best"):
        raise UsageError(
            f"--name {name!r}: expected letters, digits, '.', '_' and '-', the first a letter or digit, 95 at most; "
            "for a sweep in another folder: --sweeps-dir"
        )


def show_plots(console: "RunConsole", draw: Callable[[], list[Path]]) -> None:
    """Print the files that `draw` makes, or why it cannot; the results are complete without plots."""
    try:
        for plot in draw():
            console.print(f"{plot}")
    except UsageError as error:
        console.print(f"no plots were drawn: {error}")


def use_cores(most: int) -> None:
    """Make each core of a CPU a device, up to `most`, unless the environment sets the number."""
    import jax

    unset = jax.config.values["jax_num_cpu_devices"] < 0
    if unset and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(machine.cores(), most))
