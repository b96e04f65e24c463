"""`jaxgpt sweep`: train seeds and settings of a recipe together."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt import machine
from jaxgpt.cli import places
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import DataDir, parse, take_recipe
from jaxgpt.config import Config, UsageError, replaced
from jaxgpt.display import charts
from jaxgpt.display.text import count
from jaxgpt.recipes import recipe
from jaxgpt.run import NAME
from jaxgpt.sweep import grid
from jaxgpt.sweep.grid import Member

if TYPE_CHECKING:
    from jaxgpt.sweep.program import Score

SweepsDir = Annotated[Path, tyro.conf.arg(help="Folder of all sweeps.")]


@dataclass(frozen=True)
class Sweep:
    name: str
    """Name of the sweep, a folder in the sweeps folder. The same command again resumes it."""
    config: Config
    seeds: int = 4
    """Seeds of each setting, counted from --seed."""
    lr: str = ""
    """Learning rates: a range LOW:HIGH:HOW-MANY, such as 3e-4:3e-2:6, or a list with commas."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE or NAME=LOW:HIGH:HOW-MANY for any setting of the model or of training; may be repeated."""
    at_once: int = 0
    """Maximum number of members trained together; 0: as many as fit in memory, at most 8 on a CPU."""
    sweeps_dir: SweepsDir = Path("sweeps")
    data_dir: DataDir = Path("data")


def run(args: list[str]) -> int:
    name, args = take_recipe(Sweep, args, "which recipe? jaxgpt sweep gpt-demo --seeds 4 --lr 1e-3:1e-2:4")
    default = Sweep(Path(name).stem, recipe(name).config)
    given = parse(Sweep, args, "sweep", "Train seeds and settings of a recipe together.", default, name)
    rates = [f"lr={given.lr}"] if given.lr else []
    axes = sorted(map(grid.parse, (*rates, *given.set)))
    members = grid.members(given.config, axes, given.seeds)
    identity = {"program": "jaxgpt sweep 2", "values": dict(axes), "seeds": given.seeds}
    members, scores = train(given, given.config, members, identity)
    from jaxgpt import files
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.sweep import view
    from jaxgpt.sweep.results import outcomes

    path, console, found = given.sweeps_dir / given.name, RunConsole(), outcomes(scores)
    console.print(view.table(found))
    console.print(view.verdict(found))
    if not found[0].diverged:
        best = next(member for member in members if member.setting == found[0].setting)
        files.write_atomically(path / "best.json", (json.dumps(asdict(best.config), indent=2) + "\n").encode())
        words = ["jaxgpt", "train", str(path / "best.json"), "--run", f"{given.name}-best"]
        words += ["--data-dir", str(given.data_dir)] if given.data_dir != Path("data") else []
        console.print(f"Train it: {shlex.join(words)}")
    save_charts(path, view.charts(found))
    return 0


def train(
    given: Any, base: Config, members: Sequence[Member], identity: dict[str, Any]
) -> tuple[list[Member], list["Score"]]:
    """Train the unfinished members of a sweep; returns all members, with complete configs, and all scores.

    Args:
      given: the command's options name, at_once, sweeps_dir and data_dir.
      base: the config that the members have in common.
      identity: what else the results depend on.
    """
    if not NAME.fullmatch(f"{given.name}-best"):  # a name that the run of the best setting can have
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
    from jaxgpt.cli import runs
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.sweep import program, view
    from jaxgpt.sweep.results import SweepFolder

    places.require_writable(given.sweeps_dir, "--sweeps-dir")
    devices = jax.devices()[: len(members)]
    program.split([member.config for member in members], len(devices), given.at_once)  # raises if one does not fit
    longest = max(member.config.model.block_size for member in members)
    corpus = runs.prepared(replaced(base, block_size=longest), given.data_dir)
    members = [member._replace(config=runs.resolve(member.config, corpus)) for member in members]
    identity |= {"config": asdict(base), "tokens": corpus.meta["sha256"]}
    identity["precision"] = members[0].config.model.precision
    path, console = given.sweeps_dir / given.name, RunConsole()
    console.print(corpus.summary)
    console.print(f"{count(len(members), 'member')} in {path}, over {len(devices)} x {devices[0].device_kind}")
    with SweepFolder.locked(path, identity) as folder:
        if finished := folder.finished:
            console.print(f"finished already: {len(finished)}")
        try:
            for scores in program.run(members, corpus, devices, given.at_once, finished):
                folder.add(scores)
                console.print(view.progress(scores, len(members)))
        except KeyboardInterrupt:
            console.print(
                f"done and kept: {len(folder.finished)} of {count(len(members), 'member')}; the same command again "
                "trains the others, unfinished ones from their start"
            )
            raise
        return members, folder.scores


def save_charts(folder: Path, specs: dict[str, charts.Spec]) -> None:
    """Draw each chart to the file of its name and print the path, or why not: a sweep is complete without charts."""
    try:
        for name, spec in specs.items():
            charts.save(spec, folder / name)
            print(folder / name)
    except (UsageError, OSError) as error:
        print(f"no plots were drawn: {error}")
