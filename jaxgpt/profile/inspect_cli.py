"""`jaxgpt inspect`: what a recipe or a run is made of, and what the compiler makes of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse, refuse_unused, take_recipe
from jaxgpt.config import Config, UsageError
from jaxgpt.recipes import RECIPES, recipe

Seam = Literal["forward", "loss", "gradient", "step"]


@dataclass(frozen=True)
class Inspect:
    config: Config
    folders: Folders = field(default_factory=Folders)
    jaxpr: tuple[Seam, ...] = ()
    """Print the jaxpr of these, and nothing else."""
    hlo: tuple[Seam, ...] = ()
    """Print the optimised HLO of these, and nothing else."""
    to: Path | None = None
    """A folder for what jaxpr and hlo name, in place of printing it."""
    measure: bool = True
    """Time the machine, each part and the step; else only count and compile."""
    profile: Path | None = None
    """A folder for a trace of five steps, for XProf or Perfetto; its longest operations are printed."""
    roofline: Path | None = None
    """Where to draw the parts under the machine's roof, a PNG, SVG or PDF; None draws nothing."""
    markdown: bool = False
    """Print Markdown in place of the terminal's tables."""
    out: Path | None = None
    """Where to write all of it as JSON; None writes nothing."""


def run(args: list[str]) -> int:
    name, args = take_recipe(Inspect, args, "which recipe or run? jaxgpt inspect gpt-demo")
    default = Inspect(_config(name, args))
    given = parse(Inspect, args, f"inspect {name}", ABOUT, default=default)
    if given.jaxpr or given.hlo:
        why = "with --jaxpr and --hlo, which print or write nothing else"
        refuse_unused(given, default, dict.fromkeys(("measure", "profile", "roofline", "markdown", "out"), why))

    from jaxgpt import files as disk
    from jaxgpt.bench import table
    from jaxgpt.cli.runs import complete
    from jaxgpt.display import plots
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.profile import findings, measured
    from jaxgpt.profile import roofline_plot as rooflines

    disk.require_file(given.out, "--out")
    disk.require_file(given.roofline, "--roofline")
    for option, path in {"--profile": given.profile, "--to": given.to}.items():
        if path:
            disk.require_writable(path, option)
    if given.roofline:
        plots.require(given.roofline)
        if not given.measure:
            raise UsageError("a roofline needs what --no-measure leaves out: name one of the two")
    if given.to and not given.jaxpr and not given.hlo:
        raise UsageError(f"what shall go to {given.to}? --jaxpr forward step, --hlo step")
    use_compile_cache()
    config = complete(given.config, given.folders.data_dir)
    if given.jaxpr or given.hlo:
        for file, text in findings.texts(config, given.jaxpr, given.hlo):
            if given.to:
                given.to.mkdir(parents=True, exist_ok=True)
                disk.write_atomically(given.to / file, text.encode())
            print(given.to / file if given.to else text)
        return 0
    report = findings.inspect(config, name, measured=given.measure, trace=given.profile)
    if given.out:
        table.save(report, given.out)
    if given.roofline:
        rooflines.draw(report, given.roofline)
    if given.markdown:
        print(table.markdown(report))
    else:
        console = RunConsole()
        for part in measured.parts(report, console.width):
            console.print(part)
    return 0


def _config(name: str, args: list[str]) -> Config:
    """Of the recipe of that name, or else of the run."""
    import argparse

    from jaxgpt.run import Run

    if name in RECIPES or name.endswith(".json"):
        return recipe(name).config
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--runs-dir", "--runs_dir", type=Path, default=Path("runs"))
    try:
        return Run.open(peek.parse_known_args(args)[0].runs_dir, name).config
    except UsageError as error:
        raise UsageError(f"{error}; and no recipe of that name: there are {', '.join(RECIPES)}") from error


ABOUT = (
    "Parameters, operations, bytes and memory of a recipe or a run; what computes its products, what is fused, and how "
    "far each part is from what this machine can do. Any setting can be given."
)
